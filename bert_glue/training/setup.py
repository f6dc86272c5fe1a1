"""From arguments and loaded parts to a training run: built, resumed if asked, trained, best weights restored."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.config.resolve import with_step_counts
from bert_glue.data.batching import Collator, TokenSplit, TrainingSampler
from bert_glue.devices.device import has_slow_products
from bert_glue.devices.distributed import DistributedContext
from bert_glue.devices.npu import moves_allocations
from bert_glue.errors import CheckpointError, UsageError
from bert_glue.evaluation.collapse import CollapseWatch, constant_loss
from bert_glue.evaluation.evaluator import Evaluator, evaluate
from bert_glue.model.attention import PATHS_TAKEN
from bert_glue.model.classifier import LoadedModel
from bert_glue.precision.native import InferencePrecision, Precision
from bert_glue.precision.plan import ModelPrecision, PrecisionPlan, TrainingPrecision
from bert_glue.storage import checkpoint
from bert_glue.tasks import GlueTask
from bert_glue.training.checkpoint_contents import read_state, read_tensors
from bert_glue.training.console import ProgressLog
from bert_glue.training.ema import WeightAverage
from bert_glue.training.embedding_rows import NarrowedEmbedding
from bert_glue.training.loop import train
from bert_glue.training.optim import build_optimizer, is_elementwise, rate_factors
from bert_glue.training.profiler import StepTrace
from bert_glue.training.resume import choose, resume
from bert_glue.training.state import Run
from bert_glue.training.throughput import Meter, Phases


def build_collator(
    args: Arguments, model: LoadedModel, ranks: DistributedContext, narrowed: NarrowedEmbedding | None
) -> Collator:
    fixed = args.padding == "max_length"
    padding = "packed" if model.is_packed else ("max_length" if fixed else "longest")
    return Collator(
        padding=padding,
        max_length=min(args.max_seq_length, model.position_limit),
        pad_id=model.pad_id,
        gives_types=model.tokenizer.gives_types,
        pads_left=model.tokenizer.pads_left,
        depends_on_padding=model.depends_on_padding,
        device=ranks.device.torch_device,
        is_rounded=args.torch_compile or args.cuda_graph,
        row_of_token=narrowed.row_of_token if narrowed else None,
    )


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
    return Precision(plan, module, passes, is_joint, rates)


def fine_tune(
    args: Arguments,
    task: GlueTask,
    splits: dict[str, TokenSplit],
    model: LoadedModel,
    evaluator: Evaluator,
    narrowed: NarrowedEmbedding | None,
    log: ProgressLog,
    phase: Phases | None = None,
) -> Run:
    """Build the run, resume it if asked, train, and end with the best weights if asked."""
    split, ranks, precision = splits["train"], evaluator.ranks, evaluator.precision
    order = _order(args, split, model, ranks)
    total = args.max_steps if args.max_steps > 0 else max(1, math.ceil(args.num_train_epochs * order.steps_per_epoch))
    args = with_step_counts(args, total)
    optimizer, used = build_optimizer(args, precision.parameter_groups(not is_elementwise(args.optim)))
    _set_rates(optimizer, precision, narrowed)
    optimizer = precision.attach(optimizer)
    log.line(f"optimizer: {used}")
    log.line(f"gradients: {precision.describe()}")
    if has_slow_products(ranks.device.kind, precision.plan.dtype):
        log.line("note: this device has no 16-bit matrix products: they are computed in fp32 and rounded")
    meter = Meter(ranks.device, args.skip_steps, model.shape, model.passes, model.is_packed)
    metric = keys.without_eval(args.metric_for_best_model or task.headline)
    run_of = Run(
        args, task, ranks, model, precision, optimizer, evaluator.collate, split, order, total, meter, log,
        lambda: evaluate(evaluator, task, splits), keys.evaluation_key(metric), narrowed, used,
        phase or Phases(),
    )  # fmt: skip
    _start_techniques(run_of)
    _resume(run_of)
    log.line(
        f"training: {len(split)} rows, {order.steps_per_epoch} steps an epoch, {total} steps, "
        f"batch {args.per_device_train_batch_size} x {ranks.world_size} ranks x "
        f"{args.gradient_accumulation_steps} accumulated"
    )
    constant = constant_loss(task, split.labels, args.label_smoothing_factor)
    log.watch = CollapseWatch(constant, total, run_of.progress.history)
    log.ends_at_once = False
    _train(run_of)
    log.watch = None
    log.close()
    _say_if_stopped_early(run_of)
    if args.load_best_model_at_end:
        _load_best(run_of)
    return run_of


def _order(args: Arguments, split: TokenSplit, model: LoadedModel, ranks: DistributedContext) -> TrainingSampler:
    """Which rows each step takes.

    Raises:
        UsageError: `--dataloader_drop_last` leaves no step.
    """
    # Encoders that cannot be packed waste least when batches hold similar lengths.
    grouped = args.train_sampling_strategy == "group_by_length" or (
        not model.is_packed and args.padding in ("auto", "packed")
    )
    order = TrainingSampler(
        rows=len(split),
        micro_batch=args.per_device_train_batch_size * ranks.world_size,
        accumulation=args.gradient_accumulation_steps,
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=args.dataloader_drop_last,
        lengths=split.table.lengths if grouped else None,
        whole_steps=args.global_batch_size is not None,
    )
    if order.steps_per_epoch == 0:
        raise UsageError(
            f"--dataloader_drop_last: {len(split)} training rows do not fill one batch of {order.unit}; "
            f"lower --{'global' if order.whole_steps else 'per_device_train'}_batch_size or leave the flag out"
        )
    return order


def _set_rates(optimizer: Optimizer, precision: TrainingPrecision, narrowed: NarrowedEmbedding | None) -> None:
    """Give each group of the optimizer its factor of the learning rate."""
    for group, flat in zip(optimizer.param_groups, precision.groups, strict=True):
        group["rate_factor"] = flat.rate
        if narrowed and "words.weight" in flat.names:
            narrowed.rate = flat.rate


def _start_techniques(run_of: Run) -> None:
    """Begin the average of `--ema_decay`, and say what the other techniques come to."""
    args, log = run_of.args, run_of.log
    if args.ema_decay:
        run_of.average = WeightAverage(run_of.precision, run_of.narrowed, args.ema_decay)
    if args.layerwise_lr_decay != 1.0:
        lowest = min(group.rate for group in run_of.precision.groups)
        log.line(f"learning rates: head and top layer {args.learning_rate:g}, lowest {args.learning_rate * lowest:g}")
    shape = getattr(run_of.model.module, "shape", None)
    drops = (
        (shape.hidden_dropout, shape.attention_dropout, shape.output_dropout, *shape.head_dropouts) if shape else (1,)
    )
    if args.rdrop_alpha and not any(drops):
        log.line("note: --rdrop_alpha has no effect: this model has no dropout (--hidden_dropout_prob)")


def _train(run_of: Run) -> None:
    """Train, until the first rank has written all checkpoints."""
    began = time.perf_counter()
    with run_of.saver, _trace(run_of):
        train(run_of)
    if run_of.recorded is not None:
        run_of.recorded.say(run_of.log)
    if PATHS_TAKEN:
        run_of.log.line(f"attention: {'; '.join(sorted(PATHS_TAKEN))}")
    with run_of.phase("save"):
        run_of.ranks.barrier()
    run_of.seconds = time.perf_counter() - began


def _trace(run_of: Run) -> AbstractContextManager:
    """Traces `--profile_steps` meanwhile; what was begun is written, whatever ends training."""
    steps = run_of.args.profile_steps
    path = run_of.output_dir / f"trace-{run_of.ranks.rank}.json"
    if steps is None:
        return nullcontext()
    done, total = run_of.progress.step, run_of.total_steps
    run_of.trace = StepTrace(steps, done, total, run_of.ranks.device, run_of.meter, run_of.log, path)
    return closing(run_of.trace)


def _resume(run_of: Run) -> None:
    """Act on `--resume_from_checkpoint`; the first rank chooses for all."""
    wanted, ranks = run_of.args.resume_from_checkpoint, run_of.ranks
    if not wanted:
        return
    folder, lines, problem = ranks.all_gather_object(choose(run_of, wanted) if ranks.is_first else None)[0]
    for line in lines:
        run_of.log.line(f"note: {line}")
    if problem:
        raise CheckpointError(problem)
    if folder is None:
        return
    for line in resume(run_of, folder):
        run_of.log.line(f"note: {line}")
    run_of.log.line(f"resumed after step {run_of.progress.step} from {folder}")


def _say_if_stopped_early(run_of: Run) -> None:
    count, patience = run_of.progress.evaluations_without_gain, run_of.args.early_stopping_patience
    if patience is not None and count >= patience and run_of.progress.step < run_of.total_steps:
        why = _why_no_value(run_of)
        run_of.log.line(
            f"early stopping after step {run_of.progress.step} of {run_of.total_steps}: "
            f"{count} evaluations without a gain in {run_of.best_key}{f', which is null: {why}' if why else ''}"
        )


def _why_no_value(run_of: Run) -> str:
    """Why the last evaluation gave no value for the metric that chooses; "" where it gave one."""
    last = next((entry for entry in reversed(run_of.progress.history) if run_of.best_key in entry), {})
    return "" if last.get(run_of.best_key) is not None else str(last.get(keys.reason_key(run_of.best_key)))


def _load_best(run_of: Run) -> None:
    """Put the best checkpoint's parameters back into the module; say so where there was nothing to choose by."""
    if not run_of.progress.best_step:
        run_of.log.line(
            "note: --load_best_model_at_end chose nothing and the last weights stay: "
            f"{run_of.best_key} is null, {_why_no_value(run_of)}"
        )
        return
    folder = run_of.output_dir / f"checkpoint-{run_of.progress.best_step}"
    resumed = Path(run_of.args.resume_from_checkpoint or "")
    if not folder.exists() and checkpoint.step_of(resumed) >= 0:  # the best was before a resume from elsewhere
        folder = resumed.parent / folder.name
    reason = checkpoint.verify(folder)
    if reason:
        raise CheckpointError(f"--load_best_model_at_end: {folder}: {reason}")
    try:
        tensors, state = read_tensors(run_of, folder), read_state(folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"--load_best_model_at_end: {folder}: {error}") from error
    run_of.precision.load_masters([tensors[f"parameters.{n}"] for n in range(len(run_of.precision.masters))])
    if run_of.narrowed is not None:
        run_of.narrowed.decay = state["narrowed_decay"]
    if run_of.average is not None:
        run_of.average.load(tensors, state["average_row_decay"])
    run_of.log.line(
        f"best checkpoint: step {run_of.progress.best_step}, {run_of.best_key} {run_of.progress.best_metric}"
    )
