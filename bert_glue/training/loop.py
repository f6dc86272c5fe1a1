"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from bert_glue.data.batching import Batch, prefetch, rank_share
from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import DivergedError
from bert_glue.evaluation.evaluator import EvaluationStopped
from bert_glue.precision.flat_buffers import GradientBuffers
from bert_glue.result_keys import is_loss
from bert_glue.training.class_weights import step_weight
from bert_glue.training.optim import schedule, set_rate
from bert_glue.training.profiler import NoTrace
from bert_glue.training.resume import save_checkpoint
from bert_glue.training.state import Learner, TrainState


def training_batches(state: TrainState) -> Iterator[tuple[list[Batch | None], int]]:
    """This rank's batches of each remaining optimizer step, with the step's samples on all ranks.

    A forward pass with fewer samples than ranks is None on the ranks that get nothing.
    """
    data, ranks, sampler = state.data, state.ranks, state.data.sampler
    epoch = -1
    for step in range(state.progress.step, data.total_steps):
        if step // sampler.steps_per_epoch != epoch:
            epoch = step // sampler.steps_per_epoch
            permutation = sampler.permutation(epoch)
        passes = sampler.step(permutation, step % sampler.steps_per_epoch)
        shares = [rank_share(rows, ranks.rank, ranks.world_size) for rows in passes]
        batches = [data.collate(data.split, rows) if len(rows) else None for rows in shares]
        if data.class_weights is not None:
            total = step_weight(data.class_weights, data.split.labels[np.concatenate(passes)])
            on_device = data.collate.move(torch.tensor(total))
            batches = [batch and replace(batch, step_weight=on_device) for batch in batches]
        yield batches, sum(len(rows) for rows in passes)


class EagerStep:
    """An optimizer step as it comes; see `OptimizerStep`.

    Args:
        max_norm: L2 norm gradients are clipped to, 0 for none.
    """

    def __init__(self, learner: Learner, max_norm: float):
        self.learner = learner
        self.max_norm = max_norm

    def run_pass(self, batch: Batch, samples: int, is_last: bool = True) -> torch.Tensor:
        """A batch forward and backward; returns the loss to show, 0-d."""
        precision = self.learner.precision
        total = torch.zeros((), device=batch.labels.device)
        for loss, shown in self.learner.objective.losses(batch, samples, precision.autocast):
            precision.backward(loss, is_last)
            total += shown
        return total

    def gather_gradients(self) -> torch.Tensor:
        """The gradients' norm, 0-d."""
        return self.learner.precision.gather_gradients()

    def finish(self, norm: torch.Tensor) -> bool:
        """Clip and update; False where the step was skipped for overflow."""
        return self.learner.precision.step(self.learner.optimizer, norm, self.max_norm)

    def summary(self) -> str | None:
        """Nothing to tell."""
        return None


class StopVote:
    """Whether a signal asked any rank to stop: all ranks must leave the loop after the same step."""

    def __init__(self, ranks: DistributedContext):
        self.ranks = ranks
        self._previous: Callable[[], float] = lambda: 0.0

    def all_reduce(self, buffers: GradientBuffers, is_requested: bool) -> bool:
        """Add up the gradients of a step over all ranks, and this vote with them.

        Args:
            buffers: gradients of this rank; summed in place.
            is_requested: whether this rank was asked to stop.

        Returns:
            The same on all ranks: whether one of them was asked to stop. On devices that run behind the host it is the
            answer of the step before: reading this one's would make the host wait for the step, every step.
        """
        if self.ranks.world_size == 1:
            return is_requested
        buffers.stop_votes.fill_(float(is_requested))
        buffers.all_reduce(self.ranks)
        current = self.ranks.device.read_later(buffers.stop_votes)
        answer = current if self.ranks.device.is_host else self._previous
        self._previous = current
        return answer() > 0.0


def train(state: TrainState, trace: NoTrace | None = None) -> None:
    """Fine-tune until `total_steps`, early stopping or a signal that asks for an end.

    Args:
        trace: of the steps of `--profile_steps`.

    Raises:
        DivergedError: loss or gradients stopped being finite.
        CheckpointError: a checkpoint could not be written.
    """
    trace = trace or NoTrace()
    args, progress, ranks = state.args, state.progress, state.ranks
    precision, meter = state.learner.precision, state.observers.meter
    factor = schedule(args.lr_scheduler_type, state.data.total_steps, args.warmup_steps)
    vote = StopVote(ranks)
    # Sum over the steps since the last log line; each rank has its share, a resumed one is the first rank's. It stays
    # on the device: reading the loss of each step would make the host wait for each step.
    recent_loss = torch.zeros((), device=ranks.device.torch_device)
    if ranks.is_first:
        recent_loss += progress.recent_loss
    batches = training_batches(state)
    if not ranks.device.is_host:  # collate in a thread while the device works; on the host it would take the same cores
        batches = prefetch(batches)
    if not _continues_after_resume(state, recent_loss):
        batches = iter(())
    meter.start()
    for micro_batches, samples in batches:
        trace.begin(progress.step + 1)
        # ---- one optimizer step: one all_reduce, and no wait for the device but under a dynamic loss scale ----
        state.learner.model.module.train()  # an evaluation has switched dropout off
        precision.zero_gradients()  # one write of 2 or 4 bytes a parameter
        step_loss = _run_passes(state, micro_batches, samples)
        # All ranks' gradients and votes, 2 or 4 bytes a parameter over the network; ranks meet here and nowhere else.
        stop_requested = vote.all_reduce(precision.summed, state.signals.is_requested())
        norm = state.step.gather_gradients()  # reads every gradient once, and copies them to fp32 at O2 and O3
        rate = args.learning_rate * factor(progress.updates)
        _update(state, norm, rate)
        progress.step += 1
        progress.samples += samples
        recent_loss += step_loss
        progress.recent_steps += 1
        meter.end_step()
        # ---- end of the step ----
        trace.end(progress.step)
        if _is_due(state, args.logging_steps) or (args.logging_first_step and progress.step == 1):
            ranks.all_reduce([recent_loss])
            _log_step(state, recent_loss.item(), rate, norm.item())  # here the host does wait
            recent_loss.zero_()
        state.observers.log.advance(progress.step, state.data.total_steps, state.epoch)
        if not _after_step(state, recent_loss, stop_requested):
            break
    state.learner.objective.close()
    meter.stop()
    ranks.all_reduce([recent_loss])
    progress.loss_sum += recent_loss.item()
    progress.recent_loss = 0.0
    progress.recent_steps = 0
    precision.check_finite()


def _run_passes(state: TrainState, micro_batches: list[Batch | None], samples: int) -> torch.Tensor:
    """All forward and backward passes of a step on this rank; returns its share of the loss, 0-d on the device.

    Each loss is divided by the step's `samples` on all ranks (or by their weights), so that plain sums, over passes and
    over ranks, make the mean over all samples, whatever their split: nothing is scaled afterwards.
    """
    objective, progress = state.learner.objective, state.progress
    step_loss = torch.zeros((), device=state.ranks.device.torch_device)
    for number, batch in enumerate(micro_batches, 1):
        is_last = number == len(micro_batches)
        # Dropout masks are a function of this number: a resumed run, and a recomputed layer, draw the same ones.
        objective.begin(progress.forward_passes)
        progress.forward_passes += 1
        if batch is None:  # fewer samples than ranks: apex still takes part in its all_reduce
            state.learner.precision.backward(None, is_last=is_last)
            continue
        step_loss += state.step.run_pass(batch, samples, is_last)
        state.observers.meter.count(batch, objective.passes)
    return step_loss


def _update(state: TrainState, norm: torch.Tensor, rate: float) -> None:
    """Clip and update with a learning rate, and all that follows an update that was not skipped."""
    learner, progress = state.learner, state.progress
    for group in learner.optimizer.param_groups:
        set_rate(group, rate * group.get("rate_factor", 1.0))
    if not state.step.finish(norm):
        return
    progress.updates += 1
    if learner.narrowed is not None:
        learner.narrowed.count_decay(rate, state.args.weight_decay)
    if learner.average is not None:
        learner.average.update(progress.updates)


def _is_due(state: TrainState, every: int) -> bool:
    return state.progress.step % every == 0 or state.progress.step == state.data.total_steps


def _log_step(state: TrainState, loss_sum: float, rate: float, norm: float) -> None:
    """One log line; stops the run where a number is not finite."""
    progress = state.progress
    state.learner.precision.check_finite()
    if not math.isfinite(loss_sum):
        raise DivergedError(f"the loss of step {progress.step} is {loss_sum}; nothing was saved since")
    entry = {
        "step": progress.step,
        "epoch": round(state.epoch, 4),
        "loss": loss_sum / progress.recent_steps,
        "learning_rate": rate,
        # Of a step that a dynamic scale skipped; JSON has no Infinity.
        "grad_norm": norm if math.isfinite(norm) else None,
        "loss_scale": state.learner.precision.scale,
    }
    progress.loss_sum += loss_sum
    progress.recent_steps = 0
    progress.history.append(entry)
    state.observers.record(entry, progress.history)


def _must_evaluate(state: TrainState) -> bool:
    args, step = state.args, state.progress.step
    if args.eval_strategy == "steps":
        return step % (args.eval_steps or args.logging_steps) == 0
    return args.eval_strategy == "epoch" and _is_due(state, state.data.sampler.steps_per_epoch)


def _must_save(state: TrainState) -> bool:
    args, progress = state.args, state.progress
    is_last = progress.step == state.data.total_steps or not _has_patience(state)
    if args.load_best_model_at_end and (is_last or progress.step == progress.best_step):
        # The best weights must be there at the end, also if --save_steps is longer than --eval_steps; and
        # before they take the place of the last ones, those must be somewhere too.
        return True
    if args.save_strategy == "steps":
        return progress.step % args.save_steps == 0
    return args.save_strategy == "epoch" and _is_due(state, state.data.sampler.steps_per_epoch)


def _has_patience(state: TrainState) -> bool:
    patience = state.args.early_stopping_patience
    return patience is None or state.progress.evaluations_without_gain < patience


def _continues_after_resume(state: TrainState, recent_loss: torch.Tensor) -> bool:
    """Make up for an evaluation that a signal cut off; False where the resumed run had come to its end."""
    if state.progress.step and state.progress.evaluated_step != state.progress.step and _must_evaluate(state):
        return _after_step(state, recent_loss)
    return _has_patience(state)


def _after_step(state: TrainState, recent_loss: torch.Tensor, stop_requested: bool = False) -> bool:
    """Evaluation, checkpoint and early stopping where they are due; False ends training."""
    state.checkpoints.saver.check()
    must_evaluate, must_save = _must_evaluate(state), _must_save(state)
    if not (must_evaluate or must_save or stop_requested):
        return True
    state.observers.meter.stop()
    state.learner.precision.check_finite()
    if must_evaluate and not stop_requested:
        stop_requested = not _evaluate_now(state)
    if stop_requested or _must_save(state):
        save_now(state, recent_loss)
    state.observers.meter.start()
    return not stop_requested and _has_patience(state)


def save_now(state: TrainState, recent_loss: torch.Tensor) -> None:
    """Begin a checkpoint of the present step; `recent_loss` is this rank's share since the last log line."""
    state.ranks.all_reduce([recent_loss])
    state.progress.recent_loss = recent_loss.item()
    if not state.ranks.is_first:
        recent_loss.zero_()
    with state.observers.phases("save"):
        save_checkpoint(state)


def _evaluate_now(state: TrainState) -> bool:
    """Evaluate, note the best and the gain; False, and nothing noted, where a signal cut it off."""
    args, progress = state.args, state.progress
    try:
        with state.learner.averaged(), state.observers.phases("evaluate"):
            results = state.validation.evaluate()
    except EvaluationStopped:
        return False
    entry = {"step": progress.step, "epoch": round(state.epoch, 4), **results}
    progress.history.append(entry)
    progress.evaluated_step = progress.step
    state.observers.record(entry, progress.history)
    value = results.get(state.validation.best_key)
    greater = not is_loss(state.validation.best_key) if args.greater_is_better is None else args.greater_is_better
    sign = 1.0 if greater else -1.0
    gain = None if value is None or progress.best_metric is None else sign * (value - progress.best_metric)
    if value is not None and (gain is None or gain > 0):
        progress.best_metric, progress.best_step = value, progress.step
    is_gain = value is not None and (gain is None or gain > args.early_stopping_threshold)
    progress.evaluations_without_gain = 0 if is_gain else progress.evaluations_without_gain + 1
    return True
