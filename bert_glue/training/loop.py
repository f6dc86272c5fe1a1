"""The training loop: batches, optimizer steps, log lines, evaluations, checkpoints and the end of a run."""

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

# With 50, resident memory of rows like RTE was 6 % higher and still grew after 100 steps. It costs a model of width 128
# 5 to 10 % of its speed in fp32, and MiniLM nothing that two pairs of runs showed (0.98x and 1.01x).
_STEPS_BETWEEN_TRIMS = 10


def training_batches(state: TrainState) -> Iterator[tuple[list[Batch | None], int]]:
    """Yield this rank's batches of each remaining optimizer step, and the number of the step's samples on all ranks.

    The batch of a forward pass with fewer samples than ranks is None on the ranks that get no sample.
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
        # Every rank draws the whole permutation and knows the step's labels on all ranks, so that the sum of their
        # weights needs no collective. The mean over several labels is over rows and classes, whatever their weights.
        if data.class_weights is not None and not state.task.is_multi_label:
            total = step_weight(data.class_weights, data.split.labels[np.concatenate(passes)])
            on_device = data.collate.move(torch.tensor(total))
            batches = [batch and replace(batch, step_weight=on_device) for batch in batches]
        yield batches, sum(len(rows) for rows in passes)


class EagerStep:
    """An optimizer step that runs eagerly, operation by operation; see `OptimizerStep`.

    Args:
        learner: the weights in training and what changes them.
        max_norm: L2 norm that gradients are clipped to; 0 for no clipping.
    """

    def __init__(self, learner: Learner, max_norm: float):
        self.learner = learner
        self.max_norm = max_norm

    def run_pass(self, batch: Batch, samples: int, is_last: bool = True) -> torch.Tensor:
        """Run a batch forward and backward; return the loss to log, 0-d."""
        precision = self.learner.precision
        total = torch.zeros((), device=batch.labels.device)
        for loss, shown in self.learner.objective.losses(batch, samples, precision.autocast):
            precision.backward(loss, is_last)
            total += shown
        return total

    def gather_gradients(self) -> torch.Tensor:
        """The L2 norm of the gradients, 0-d."""
        return self.learner.precision.gather_gradients()

    def finish(self, norm: torch.Tensor) -> bool:
        """Clip and update; return False where an overflow skips the step."""
        return self.learner.precision.step(self.learner.optimizer, norm, self.max_norm)

    def summary(self) -> str | None:
        """None: eager steps have nothing to report."""
        return None


class StopVote:
    """Agreement of all ranks to stop after the same step, once a signal has reached any of them."""

    def __init__(self, ranks: DistributedContext):
        self.ranks = ranks
        self._previous: Callable[[], float] = lambda: 0.0

    def all_reduce(self, buffers: GradientBuffers, is_requested: bool) -> bool:
        """Add up the gradients of a step over all ranks, and the votes to stop with them.

        Args:
            buffers: gradients of this rank; summed in place.
            is_requested: whether a signal has asked this rank to stop.

        Returns:
            Whether a signal has asked any rank to stop; the same on all ranks. On devices that run behind the host it
            is the answer of the previous step.
        """
        if self.ranks.world_size == 1:
            return is_requested
        # Reading the current answer would make the host wait for the device in every step. The previous one has arrived
        # long ago and costs nothing but one more step after a signal.
        buffers.stop_votes.fill_(float(is_requested))
        buffers.all_reduce(self.ranks)
        current = self.ranks.device.read_later(buffers.stop_votes)
        answer = current if self.ranks.device.is_host else self._previous
        self._previous = current
        return answer() > 0.0


def train(state: TrainState, trace: NoTrace | None = None) -> None:
    """Fine-tune until `total_steps`, early stopping or a signal that asks for the end.

    Args:
        state: the run; changed in place.
        trace: profiler of `--profile_steps`.

    Raises:
        DivergedError: the loss, a gradient or a weight is not finite.
        CheckpointError: a checkpoint cannot be written.
    """
    trace = trace or NoTrace()
    args, progress, ranks = state.args, state.progress, state.ranks
    precision, meter = state.learner.precision, state.observers.meter
    factor = schedule(args.lr_scheduler_type, state.data.total_steps, args.warmup_steps)
    vote = StopVote(ranks)
    # The sum of the losses since the last log line. Each rank holds its share; after a resume the first rank holds the
    # sum of the checkpoint. It stays on the device: reading every step's loss would make the host wait in every step.
    recent_loss = torch.zeros((), device=ranks.device.torch_device)
    if ranks.is_first:
        recent_loss += progress.recent_loss
    batches = training_batches(state)
    if not ranks.device.is_host:  # a thread collates while the device works; on a CPU both would need the same cores
        batches = prefetch(batches)
    if not _continues_after_resume(state, recent_loss):
        batches = iter(())
    meter.start()
    for micro_batches, samples in batches:
        trace.begin(progress.step + 1)
        # ---- one optimizer step: one all_reduce; the host waits for the device only under a dynamic loss scale ----
        state.learner.model.module.train()  # an evaluation switches dropout off
        precision.zero_gradients()  # one write of 2 or 4 bytes a parameter
        step_loss = _run_passes(state, micro_batches, samples)
        # The only collective of a step: gradients and votes, 2 or 4 bytes a parameter over the network.
        stop_requested = vote.all_reduce(precision.summed, state.signals.is_requested())
        norm = state.step.gather_gradients()  # one read of every gradient, and at O2 and O3 a copy to fp32
        rate = args.learning_rate * factor(progress.updates)
        _update(state, norm, rate)
        progress.step += 1
        progress.samples += samples
        recent_loss += step_loss
        progress.recent_steps += 1
        meter.end_step()
        # ---- end of the step ----
        if progress.step % _STEPS_BETWEEN_TRIMS == 0:
            ranks.device.return_freed_pages()  # 0.06 s on a CPU of 1.2 GB: 1 % of ten steps of MiniLM
        trace.end(progress.step)
        if _is_due(state, args.logging_steps) or (args.logging_first_step and progress.step == 1):
            ranks.all_reduce([recent_loss])
            _log_step(state, recent_loss.item(), rate, norm.item())  # the host waits here, once a log line
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
    """Run all forward and backward passes of a step on this rank; return its share of the loss, 0-d on the device.

    Each loss is divided by the number of the step's samples on all ranks, or by the sum of their weights. Plain sums
    over passes and ranks are then the mean over all samples, however they are split, and need no scaling afterwards.
    """
    objective, progress = state.learner.objective, state.progress
    step_loss = torch.zeros((), device=state.ranks.device.torch_device)
    for number, batch in enumerate(micro_batches, 1):
        is_last = number == len(micro_batches)
        # Dropout masks are a function of this number, so that a resumed run and a recomputed layer draw the same masks.
        objective.begin(progress.forward_passes)
        progress.forward_passes += 1
        if batch is None:  # fewer samples than ranks: apex still has to join its all_reduce, or the others hang
            state.learner.precision.backward(None, is_last=is_last)
            continue
        step_loss += state.step.run_pass(batch, samples, is_last)
        state.observers.meter.count(batch, objective.passes)
    return step_loss


def _update(state: TrainState, norm: torch.Tensor, rate: float) -> None:
    """Clip and update at the learning rate `rate`; after an update that counts, advance everything that follows it."""
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
    """Write one log line; stop the run if a number is not finite."""
    progress = state.progress
    state.learner.precision.check_finite()
    if not math.isfinite(loss_sum):
        raise DivergedError(f"the loss of step {progress.step} is {loss_sum}; nothing was saved since")
    entry = {
        "step": progress.step,
        "epoch": round(state.epoch, 4),
        "loss": loss_sum / progress.recent_steps,
        "learning_rate": rate,
        # The norm of a step that a dynamic scale skips is not finite, and JSON has no Infinity.
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
        # The best weights must exist at the end, also if --save_steps is larger than --eval_steps. The last weights
        # must be saved too, because the best ones replace them in memory. This costs one write for each new best step.
        return True
    if args.save_strategy == "steps":
        return progress.step % args.save_steps == 0
    return args.save_strategy == "epoch" and _is_due(state, state.data.sampler.steps_per_epoch)


def _has_patience(state: TrainState) -> bool:
    patience = state.args.early_stopping_patience
    return patience is None or state.progress.evaluations_without_gain < patience


def _continues_after_resume(state: TrainState, recent_loss: torch.Tensor) -> bool:
    """Repeat an evaluation that a signal interrupted; return False if the resumed run has already ended."""
    if state.progress.step and state.progress.evaluated_step != state.progress.step and _must_evaluate(state):
        return _after_step(state, recent_loss)
    return _has_patience(state)


def _after_step(state: TrainState, recent_loss: torch.Tensor, stop_requested: bool = False) -> bool:
    """Evaluates, saves and checks for early stopping at the steps that need it. Returns False to end training."""
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
    """Begin a checkpoint of the current step; `recent_loss` is this rank's share since the last log line."""
    # The checkpoint holds the sum over the ranks, which the first rank keeps; the others go on from 0.
    state.ranks.all_reduce([recent_loss])
    state.progress.recent_loss = recent_loss.item()
    if not state.ranks.is_first:
        recent_loss.zero_()
    with state.observers.phases("save"):
        save_checkpoint(state)


def _evaluate_now(state: TrainState) -> bool:
    """Evaluate and record the best step and the gain; return False, with nothing recorded, if a signal interrupts."""
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
