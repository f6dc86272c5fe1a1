"""Builds a training run from arguments and loaded parts, resumes it, trains it, and restores the best weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.config.metric_checks import metric_for_best
from bert_glue.config.resolve import samples_per_step, with_step_counts
from bert_glue.data.batching import Collator, TokenSplit, TrainingSampler
from bert_glue.devices import cpu, host_memory
from bert_glue.devices.device import Device, has_slow_products, product_dtype
from bert_glue.devices.distributed import DistributedContext
from bert_glue.devices.host_memory import GIB
from bert_glue.devices.npu import moves_allocations
from bert_glue.errors import CheckpointError, MachineError, UsageError
from bert_glue.evaluation.collapse import CollapseWatch, constant_loss
from bert_glue.evaluation.evaluator import Evaluator, evaluate
from bert_glue.model.attention import BLOCK_SHAPES, PATHS_TAKEN, REFUSALS, least_bytes
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.shape import EncoderShape
from bert_glue.precision.native import InferencePrecision, NativePrecision
from bert_glue.precision.plan import ModelPrecision, PrecisionPlan, TrainingPrecision
from bert_glue.storage import checkpoint
from bert_glue.tasks import GlueTask
from bert_glue.training.checkpoint_contents import read_state, read_tensors
from bert_glue.training.class_weights import named
from bert_glue.training.console import ConsoleLog, StopSignals, Trackers
from bert_glue.training.ema import WeightAverage
from bert_glue.training.embedding_rows import NarrowedEmbedding
from bert_glue.training.loop import EagerStep, train
from bert_glue.training.losses import Objective
from bert_glue.training.optim import build_optimizer, is_elementwise, rate_factors
from bert_glue.training.profiler import NoTrace, StepTrace
from bert_glue.training.resume import choose, resume
from bert_glue.training.state import Learner, Observers, OptimizerStep, TrainData, TrainState, Validation
from bert_glue.training.throughput import Meter, Phases


def build_collator(
    args: Arguments, model: LoadedModel, ranks: DistributedContext, narrowed: NarrowedEmbedding | None
) -> Collator:
    padding = "max_length" if args.padding == "max_length" else "longest"
    if model.is_packed:
        padding = "packed"
    return Collator(
        padding=padding,
        max_length=model.row_limit(args.max_seq_length),
        pad_id=model.pad_id,
        gives_types=model.tokenizer.gives_types,
        pads_left=model.tokenizer.pads_left,
        depends_on_padding=model.depends_on_padding,
        device=ranks.device.torch_device,
        is_rounded=model.is_packed or args.torch_compile or bool(args.cuda_graph),
        # In bf16 oneDNN takes 4 ms and 0.6 MB for each new shape of a product, which a step has 14 of.
        is_coarse=bool(args.cuda_graph) or (args.bf16 and ranks.device.is_host),
        is_pinned=ranks.device.copies_pinned_memory,
        row_of_token=narrowed.row_of_token if narrowed else None,
    )


def settle_threads(args: Arguments, device: Device, models: Sequence[LoadedModel]) -> list[str]:
    """Set the threads of a CPU run, by its largest model; lines for the log."""
    if not device.is_host:
        return []
    batch_size = max(args.per_device_train_batch_size, args.per_device_eval_batch_size)
    work = (cpu.largest_product(one.module, batch_size * one.row_limit(args.max_seq_length)) for one in models)
    return [f"threads: {cpu.use_threads(max(work), args.num_cpu_threads_per_process)}"]


def make_precision(
    args: Arguments, plan: PrecisionPlan, module: nn.Module, ranks: DistributedContext
) -> ModelPrecision:
    """The module at the plan's level, natively or by apex; ready to evaluate, and with `--do_train` to train."""
    if plan.backend == "apex":
        from bert_glue.precision.apex import ApexPrecision

        precision = ApexPrecision(plan, module, ranks, args.use_combine_grad)
        if not args.do_train:
            precision.attach(None)
        return precision
    if not args.do_train:
        return InferencePrecision(plan, module)
    is_joint = not moves_allocations(args.optim, ranks.device.torch_device)
    is_shared = getattr(getattr(module, "shape", None), "shared_layers", False)
    rates = rate_factors((name for name, _ in module.named_parameters()), args.layerwise_lr_decay, is_shared)
    passes = args.gradient_accumulation_steps * (2 if args.fgm_epsilon else 1)
    return NativePrecision(plan, module, passes, is_joint, rates)


def fine_tune(
    args: Arguments,
    task: GlueTask,
    splits: dict[str, TokenSplit],
    *,
    model: LoadedModel,
    evaluator: Evaluator,
    narrowed: NarrowedEmbedding | None,
    log: ConsoleLog,
    trackers: Trackers,
    signals: StopSignals,
    phases: Phases | None = None,
    class_weights: np.ndarray | None = None,
) -> TrainState:
    """Build the run, resume it if requested, train, and load the best weights if requested."""
    split, ranks = splits["train"], evaluator.ranks
    sampler = _sampler(args, split, model, ranks)
    steps = max(1, math.ceil(args.num_train_epochs * sampler.steps_per_epoch))
    data = TrainData(
        split=split, sampler=sampler, collate=evaluator.collate,
        total_steps=args.max_steps if args.max_steps > 0 else steps, class_weights=class_weights,
    )  # fmt: skip
    args = with_step_counts(args, data.total_steps)
    _refuse_too_long(args, model.shape, int(split.table.lengths.max()), evaluator)
    learner = build_learner(args, task, model, evaluator.precision, narrowed, ranks, class_weights)
    metric = metric_for_best(args, task)
    state = TrainState(
        args=args, task=task, ranks=ranks, data=data, learner=learner,
        step=build_step(args, learner, data, ranks, log.line),
        validation=Validation(
            evaluate=lambda: evaluate(evaluator, task, splits), best_key=keys.evaluation_key(metric)
        ),
        observers=Observers(
            log=log,
            trackers=trackers,
            watch=CollapseWatch(
                constant_loss(task, split.labels, args.label_smoothing_factor, class_weights), data.total_steps
            ),
            meter=Meter(ranks.device, args.skip_steps, model.shape, model.passes, model.is_packed),
            phases=phases or Phases(),
        ),
        signals=signals,
    )  # fmt: skip
    _tell_setup(state)
    _resume(state)
    log.line(
        f"training: {len(split)} rows, {sampler.steps_per_epoch} steps an epoch, {data.total_steps} steps, "
        f"batch {args.per_device_train_batch_size} x {ranks.world_size} ranks x "
        f"{args.gradient_accumulation_steps} accumulated"
    )
    log.set_scale(samples_per_step(args, ranks.world_size), state.validation.best_key)
    signals.ends_at_once = False
    _train(state)
    log.close()
    _say_if_stopped_early(state)
    if args.load_best_model_at_end:
        _load_best(state)
    return state


def _refuse_too_long(args: Arguments, shape: EncoderShape | None, longest: int, evaluator: Evaluator) -> None:
    """Refuses a run whose longest row cannot fit; the system would kill it without a word in the middle of an epoch.

    Args:
        shape: of a packed model; None for a padded one.

    Raises:
        MachineError: a CPU has less memory than attention over that row takes at least.
    """
    available, device = host_memory.total_and_available()[1], evaluator.ranks.device
    if shape is None or available is None or not device.is_host:
        return
    element = product_dtype(device.kind, evaluator.precision.plan.dtype).itemsize
    needs = [least_bytes(shape, longest, element, is_checkpointed) for is_checkpointed in (False, True)]
    needed = needs[args.gradient_checkpointing]
    if needed <= available:
        return
    ways = ["a smaller --max_seq_length"]
    if needed > needs[1] and needs[1] <= available:
        ways.append(f"--gradient_checkpointing ({needs[1] / GIB:.1f} GiB)")
    if shape.attention_dropout and not shape.has_relative_scores:
        ways.append("--attention_probs_dropout_prob 0, which keeps no probabilities of rows beyond 1,024 tokens")
    raise MachineError(
        f"--max_seq_length {args.max_seq_length}: the longest training row has {longest} tokens, and its attention "
        f"takes at least {needed / GIB:.1f} GiB; {available / GIB:.1f} GiB are available. Give {', or '.join(ways)}"
    )


def build_learner(
    args: Arguments,
    task: GlueTask,
    model: LoadedModel,
    precision: TrainingPrecision,
    narrowed: NarrowedEmbedding | None,
    ranks: DistributedContext,
    class_weights: np.ndarray | None = None,
) -> Learner:
    """The model with its optimizer, and the parts for `--ema_decay`, `--rdrop_alpha` and `--fgm_epsilon`."""
    optimizer, name = build_optimizer(args, precision.optimizer_groups(not is_elementwise(args.optim)))
    _set_rates(optimizer, precision, narrowed)
    return Learner(
        model=model,
        precision=precision,
        optimizer=precision.attach(optimizer),
        optimizer_name=name,
        objective=Objective(args, task, model.module, ranks.rank, class_weights),
        narrowed=narrowed,
        average=WeightAverage(precision, narrowed, args.ema_decay) if args.ema_decay else None,
    )


def build_step(
    args: Arguments,
    learner: Learner,
    data: TrainData,
    ranks: DistributedContext,
    say: Callable[[str], None] = lambda line: None,
) -> OptimizerStep:
    """Eager optimizer steps, or recorded ones with `--cuda_graph`."""
    eager = EagerStep(learner, args.max_grad_norm)
    if not args.cuda_graph:
        return eager
    from bert_glue.training.cuda_graphs import RecordedStep, Recorder

    return RecordedStep(
        Recorder(ranks.device),
        eager.run_pass,
        longest=data.collate.max_length,
        precision=learner.precision,
        optimizer=learner.optimizer,
        max_norm=args.max_grad_norm,
        say=say,
    )


def _sampler(args: Arguments, split: TokenSplit, model: LoadedModel, ranks: DistributedContext) -> TrainingSampler:
    """Which rows each step takes.

    Raises:
        UsageError: `--dataloader_drop_last` leaves no step.
    """
    # Encoders that cannot be packed waste least when batches hold similar lengths.
    grouped = args.train_sampling_strategy == "group_by_length" or (
        not model.is_packed and args.padding in ("auto", "packed")
    )
    sampler = TrainingSampler(
        rows=len(split),
        micro_batch=args.per_device_train_batch_size * ranks.world_size,
        accumulation=args.gradient_accumulation_steps,
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=args.dataloader_drop_last,
        lengths=split.table.lengths if grouped else None,
        whole_steps=args.global_batch_size is not None,
    )
    if sampler.steps_per_epoch == 0:
        raise UsageError(
            f"--dataloader_drop_last: {len(split)} training rows do not fill one batch of {sampler.unit}; "
            f"lower --{'global' if sampler.whole_steps else 'per_device_train'}_batch_size or leave the flag out"
        )
    return sampler


def _set_rates(optimizer: Optimizer, precision: TrainingPrecision, narrowed: NarrowedEmbedding | None) -> None:
    """Set the factor of the learning rate for each group of the optimizer."""
    for group, flat in zip(optimizer.param_groups, precision.groups, strict=True):
        group["rate_factor"] = flat.rate
        if narrowed and "words.weight" in flat.names:
            narrowed.rate = flat.rate


def _tell_setup(state: TrainState) -> None:
    """Log the optimizer, the storage of gradients, and the effect of the chosen techniques."""
    args, log, learner = state.args, state.observers.log, state.learner
    log.line(f"optimizer: {learner.optimizer_name}")
    log.line(f"gradients: {learner.precision.describe()}")
    if has_slow_products(state.ranks.device.kind, learner.precision.plan.dtype):
        log.line("note: this device has no 16-bit matrix products: they are computed in fp32 and rounded")
    if state.data.class_weights is not None:
        weights = named(state.task, state.data.class_weights)
        log.line(f"class weights: {', '.join(f'{name} {weight:.4g}' for name, weight in weights.items())}")
    every = args.eval_steps or args.logging_steps
    if args.eval_strategy == "steps" and every > state.data.total_steps:
        log.line(
            f"note: --eval_strategy steps evaluates nothing while this run trains: --eval_steps {every} is larger than "
            f"its {state.data.total_steps} steps"
        )
    if args.layerwise_lr_decay != 1.0:
        lowest = min(group.rate for group in learner.precision.groups)
        log.line(f"learning rates: head and top layer {args.learning_rate:g}, lowest {args.learning_rate * lowest:g}")
    if args.rdrop_alpha and not _has_dropout(learner.model.module):
        log.line("note: --rdrop_alpha has no effect: this model has no dropout (--hidden_dropout_prob)")


def _has_dropout(module: nn.Module) -> bool:
    """False if a packed model drops nothing; True for padded ones, whose configurations differ."""
    shape = getattr(module, "shape", None)
    if shape is None:
        return True
    return any((shape.hidden_dropout, shape.attention_dropout, shape.output_dropout, *shape.head_dropouts))


def _train(state: TrainState) -> None:
    """Train, until the first rank has written all checkpoints."""
    log, meter = state.observers.log, state.observers.meter
    with meter.whole_training():
        with state.checkpoints.saver, closing(_trace(state)) as trace:
            train(state, trace)
        summary = state.step.summary()
        if summary is not None:
            log.line(summary)
        if PATHS_TAKEN:
            log.line(f"attention: {'; '.join(sorted(PATHS_TAKEN))}")
        for name, reason in REFUSALS.items():
            log.line(f"note: attention: {name} does not run here: {reason}")
        # Each is a kernel of its own to libraries that make one for a shape, and a graph to a compiler.
        log.line(f"shapes: {len(state.data.collate.shapes)} token count(s), {len(BLOCK_SHAPES)} block(s) of attention")
        with state.observers.phases("save"):
            state.ranks.barrier()


def _trace(state: TrainState) -> NoTrace:
    """A context that traces `--profile_steps`; at its end it writes the trace, whatever ends training."""
    steps = state.args.profile_steps
    if steps is None:
        return NoTrace()
    path = state.output_dir / f"trace-{state.ranks.rank}.json"
    observers = state.observers
    return StepTrace(
        steps, state.progress.step, state.data.total_steps, state.ranks.device, observers.meter, observers.log, path
    )


def _resume(state: TrainState) -> None:
    """Act on `--resume_from_checkpoint`; the first rank chooses for all."""
    wanted, ranks = state.args.resume_from_checkpoint, state.ranks
    if not wanted:
        return
    folder, lines, problem = ranks.all_gather_object(choose(state, wanted) if ranks.is_first else None)[0]
    for line in lines:
        state.observers.log.line(f"note: {line}")
    if problem:
        raise CheckpointError(problem)
    if folder is None:
        return
    for line in resume(state, folder):
        state.observers.log.line(f"note: {line}")
    state.observers.log.line(f"resumed after step {state.progress.step} from {folder}")


def _say_if_stopped_early(state: TrainState) -> None:
    progress, best_key, total = state.progress, state.validation.best_key, state.data.total_steps
    count, patience = progress.evaluations_without_gain, state.args.early_stopping_patience
    if patience is not None and count >= patience and progress.step < total:
        why = _why_no_value(state)
        state.observers.log.line(
            f"early stopping after step {progress.step} of {total}: "
            f"{count} evaluations without a gain in {best_key}{f', which is null: {why}' if why else ''}"
        )


def _why_no_value(state: TrainState) -> str:
    """The reason why the last evaluation has no value for the metric that chooses; "" if it has one."""
    best_key = state.validation.best_key
    last = next((entry for entry in reversed(state.progress.history) if best_key in entry), {})
    return "" if last.get(best_key) is not None else str(last.get(keys.reason_key(best_key)))


def _load_best(state: TrainState) -> None:
    """Restores the parameters of the best checkpoint. Logs a line if no metric could choose one."""
    if not state.progress.best_step:
        state.observers.log.line(
            "note: --load_best_model_at_end chose nothing and the last weights stay: "
            f"{state.validation.best_key} is null, {_why_no_value(state)}"
        )
        return
    folder = state.output_dir / f"checkpoint-{state.progress.best_step}"
    resumed = Path(state.args.resume_from_checkpoint or "")
    if not folder.exists() and checkpoint.step_of(resumed) >= 0:  # the best was before a resume from elsewhere
        folder = resumed.parent / folder.name
    reason = checkpoint.verify(folder)
    if reason:
        raise CheckpointError(f"--load_best_model_at_end: {folder}: {reason}")
    try:
        tensors = read_tensors(state, folder)
        stored = read_state(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"--load_best_model_at_end: {folder}: {error}") from error
    learner = state.learner
    learner.precision.load_masters([tensors[f"parameters.{n}"] for n in range(len(learner.precision.masters))])
    if learner.narrowed is not None:
        learner.narrowed.decay = stored["narrowed_decay"]
    if learner.average is not None:
        learner.average.load(tensors, stored["average_row_decay"])
    state.observers.log.line(
        f"best checkpoint: step {state.progress.best_step}, {state.validation.best_key} {state.progress.best_metric}"
    )
