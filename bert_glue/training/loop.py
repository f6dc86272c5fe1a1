"""The training loop, and the vote of all ranks whether it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from bert_glue.data.batching import Batch, prefetch, rank_share
from bert_glue.errors import DivergedError
from bert_glue.evaluation.evaluator import EvaluationStopped
from bert_glue.result_keys import is_loss
from bert_glue.training.losses import Objective
from bert_glue.training.optim import schedule, set_rate
from bert_glue.training.resume import save_checkpoint
from bert_glue.training.state import Run

if TYPE_CHECKING:
    from bert_glue.devices.distributed import DistributedContext
    from bert_glue.precision.flat_buffers import GradientBuffers
    from bert_glue.training.cuda_graphs import RecordedStep


class StopVote:
    """Whether a signal asked any rank to stop: all ranks must leave the loop after the same step.

    Args:
        ranks: that vote.
    """

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


def training_batches(run: Run) -> Iterator[tuple[list[Batch | None], int]]:
    """This rank's batches of each remaining optimizer step, with the step's samples on all ranks.

    A forward pass with fewer samples than ranks is None on the ranks that get nothing.
    """
    first, epoch, permutation = run.progress.step, -1, None
    for step in range(first, run.total_steps):
        if step // run.order.steps_per_epoch != epoch:
            epoch = step // run.order.steps_per_epoch
            permutation = run.order.permutation(epoch)
        passes = run.order.step(permutation, step % run.order.steps_per_epoch)
        shares = (rank_share(rows, run.ranks.rank, run.ranks.world_size) for rows in passes)
        yield [run.collate(run.split, rows) if len(rows) else None for rows in shares], sum(map(len, passes))


def train(run: Run) -> None:
    """Fine-tune until `total_steps`, early stopping or a signal that asks for an end.

    Raises:
        DivergedError: loss or gradients stopped being finite.
        CheckpointError: a checkpoint could not be written.
    """
    args, progress, ranks, precision = run.args, run.progress, run.ranks, run.precision
    factor = schedule(args.lr_scheduler_type, run.total_steps, args.warmup_steps)
    objective, vote = Objective(args, run.task, run.model.module, ranks.rank), StopVote(ranks)
    # Sum over the steps since the last log line; each rank has its share, a resumed one is the first rank's.
    recent_loss = torch.zeros((), device=ranks.device.torch_device)
    if ranks.is_first:
        recent_loss += progress.recent_loss
    step = _step_of(run, objective)
    batches = training_batches(run)
    if not ranks.device.is_host:
        batches = prefetch(batches)
    if not _goes_on_after_resume(run, recent_loss):
        batches = iter(())
    run.meter.start()
    for micro_batches, samples in batches:
        run.trace.begin(progress.step + 1)
        # ---- one optimizer step: one collective; nothing waits for the device, but for a dynamic loss scale ----
        run.model.module.train()
        precision.zero_gradients()
        step_loss = torch.zeros_like(recent_loss)
        for number, batch in enumerate(micro_batches, 1):
            objective.begin(progress.forward_passes)
            progress.forward_passes += 1
            if batch is None:
                precision.backward(None, is_last=number == len(micro_batches))
                continue
            step_loss += step.run_pass(batch, samples, number == len(micro_batches))
            run.meter.count(batch, objective.passes)
        stop_requested = vote.all_reduce(precision.summed, run.log.stop_requested())
        norm = step.gather_gradients()
        rate = args.learning_rate * factor(progress.updates)
        for group in run.optimizer.param_groups:
            set_rate(group, rate * group.get("rate_factor", 1.0))
        if step.finish(norm):
            progress.updates += 1
            if run.narrowed is not None:
                run.narrowed.count_decay(rate, args.weight_decay)
            if run.average is not None:
                run.average.update(progress.updates)
        progress.step += 1
        progress.samples += samples
        recent_loss += step_loss
        progress.recent_steps += 1
        run.meter.end_step()
        # ---- end of the step ----
        run.trace.end(progress.step)
        if _is_due(run, args.logging_steps) or (args.logging_first_step and progress.step == 1):
            ranks.all_reduce([recent_loss])
            _log_step(run, recent_loss.item(), rate, norm.item())
            recent_loss.zero_()
        run.log.advance(progress.step, run.total_steps, run.epoch)
        if not _after_step(run, recent_loss, stop_requested):
            break
    objective.close()
    run.meter.stop()
    ranks.all_reduce([recent_loss])
    progress.loss_sum += recent_loss.item()
    progress.recent_loss, progress.recent_steps = 0.0, 0
    precision.check_finite()


class _EagerStep:
    """What an optimizer step asks of the device, in three parts."""

    def __init__(self, run: Run, objective: Objective):
        self.run, self.objective = run, objective

    def run_pass(self, batch: Batch, samples: int, is_last: bool = True) -> torch.Tensor:
        """A batch forward and backward, the step having `samples`; returns the loss to show, 0-d."""
        total = torch.zeros((), device=self.run.ranks.device.torch_device)
        for loss, shown in self.objective.losses(batch, samples, self.run.precision.autocast):
            self.run.precision.backward(loss, is_last)
            total += shown
        return total

    def gather_gradients(self) -> torch.Tensor:
        """After the sum over ranks: their norm, 0-d."""
        return self.run.precision.gather_gradients()

    def finish(self, norm: torch.Tensor) -> bool:
        """Clip and update; False where the step was skipped for overflow."""
        return self.run.precision.step(self.run.optimizer, norm, self.run.args.max_grad_norm)


def _step_of(run: Run, objective: Objective) -> _EagerStep | RecordedStep:
    eager = _EagerStep(run, objective)
    if not run.args.cuda_graph:
        return eager
    from bert_glue.training.cuda_graphs import RecordedStep, Recorder

    recorder, longest = Recorder(run.ranks.device), run.collate.max_length
    run.recorded = RecordedStep(recorder, eager.run_pass, longest, run.precision, run.optimizer, run.args.max_grad_norm)
    return run.recorded


def _is_due(run: Run, every: int) -> bool:
    return run.progress.step % every == 0 or run.progress.step == run.total_steps


def _log_step(run: Run, loss_sum: float, rate: float, norm: float) -> None:
    """One log line; stops the run where a number is not finite."""
    progress = run.progress
    run.precision.check_finite()
    if not math.isfinite(loss_sum):
        raise DivergedError(f"the loss of step {progress.step} is {loss_sum}; nothing was saved since")
    entry = {
        "step": progress.step,
        "epoch": round(run.epoch, 4),
        "loss": loss_sum / progress.recent_steps,
        "learning_rate": rate,
        # Of a step that a dynamic scale skipped; JSON has no Infinity.
        "grad_norm": norm if math.isfinite(norm) else None,
        "loss_scale": run.precision.scale,
    }
    progress.loss_sum += loss_sum
    progress.recent_steps = 0
    progress.history.append(entry)
    run.log.entry(entry)


def _must_evaluate(run: Run) -> bool:
    args, step = run.args, run.progress.step
    if args.eval_strategy == "steps":
        return step % (args.eval_steps or args.logging_steps) == 0
    return args.eval_strategy == "epoch" and _is_due(run, run.order.steps_per_epoch)


def _must_save(run: Run) -> bool:
    args, progress = run.args, run.progress
    is_last = progress.step == run.total_steps or not _has_patience(run)
    if args.load_best_model_at_end and (is_last or progress.step == progress.best_step):
        # The best weights must be there at the end, also if --save_steps is longer than --eval_steps; and
        # before they take the place of the last ones, those must be somewhere too.
        return True
    if args.save_strategy == "steps":
        return progress.step % args.save_steps == 0
    return args.save_strategy == "epoch" and _is_due(run, run.order.steps_per_epoch)


def _has_patience(run: Run) -> bool:
    patience = run.args.early_stopping_patience
    return patience is None or run.progress.evaluations_without_gain < patience


def _goes_on_after_resume(run: Run, recent_loss: torch.Tensor) -> bool:
    """Make up for an evaluation that a signal cut off; False where the resumed run had come to its end."""
    if run.progress.step and run.progress.evaluated_step != run.progress.step and _must_evaluate(run):
        return _after_step(run, recent_loss)
    return _has_patience(run)


def _after_step(run: Run, recent_loss: torch.Tensor, stop_requested: bool = False) -> bool:
    """Evaluation, checkpoint and early stopping where they are due; False ends training."""
    run.saver.check()
    must_evaluate, must_save = _must_evaluate(run), _must_save(run)
    if not (must_evaluate or must_save or stop_requested):
        return True
    run.meter.stop()
    run.precision.check_finite()
    if must_evaluate and not stop_requested:
        stop_requested = not _evaluate_now(run)
    if stop_requested or _must_save(run):
        save_now(run, recent_loss)
    run.meter.start()
    return not stop_requested and _has_patience(run)


def save_now(run: Run, recent_loss: torch.Tensor) -> None:
    """Begin a checkpoint of the present step; `recent_loss` is this rank's share since the last log line."""
    run.ranks.all_reduce([recent_loss])
    run.progress.recent_loss = recent_loss.item()
    if not run.ranks.is_first:
        recent_loss.zero_()
    with run.phase("save"):
        save_checkpoint(run)


def _evaluate_now(run: Run) -> bool:
    """Evaluate, note the best and the gain; False, and nothing noted, where a signal cut it off."""
    args, progress = run.args, run.progress
    try:
        with run.averaged(), run.phase("evaluate"):
            results = run.evaluate()
    except EvaluationStopped:
        return False
    entry = {"step": progress.step, "epoch": round(run.epoch, 4), **results}
    progress.history.append(entry)
    progress.evaluated_step = progress.step
    run.log.entry(entry)
    value = results.get(run.best_key)
    greater = not is_loss(run.best_key) if args.greater_is_better is None else args.greater_is_better
    sign = 1.0 if greater else -1.0
    gain = None if value is None or progress.best_metric is None else sign * (value - progress.best_metric)
    if value is not None and (gain is None or gain > 0):
        progress.best_metric, progress.best_step = value, progress.step
    is_gain = value is not None and (gain is None or gain > args.early_stopping_threshold)
    progress.evaluations_without_gain = 0 if is_gain else progress.evaluations_without_gain + 1
    return True
