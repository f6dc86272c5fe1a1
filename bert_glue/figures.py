"""What the results files say of a run besides its scores: what was run, and what training consumed."""

from __future__ import annotations

from bert_glue import result_keys as keys
from bert_glue.arguments import Arguments
from bert_glue.attention import PATHS_TAKEN
from bert_glue.collapse import constant_loss, flat_loss
from bert_glue.global_batch import samples_per_step
from bert_glue.model import LoadedModel
from bert_glue.ranks import Ranks
from bert_glue.sources import TaskData
from bert_glue.training_run import Run


def facts(args: Arguments, data: TaskData, model: LoadedModel, plan, ranks: Ranks) -> dict:
    """What was run, for every results file."""
    return {
        "task_name": data.task.name,
        "headline_metric": data.task.headline,
        "text_columns": list(data.task.columns),
        "model_name_or_path": args.model_name_or_path,
        "data": data.source,
        "sample_data": data.is_sample,
        "device": str(ranks.device.torch_device),
        "device_name": ranks.device.name,
        "world_size": ranks.world_size,
        "precision": plan.name,
        "fallback": plan.note,
        "trained": model.trained,
        "batches": "packed" if model.is_packed else "padded",
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "global_batch_size": samples_per_step(args, ranks.world_size),
        "learning_rate": args.learning_rate,
        "max_seq_length": args.max_seq_length,
        "seed": args.seed,
    }


def train_results(run_of: Run, plan) -> dict:
    """`train_*` results of all ranks together."""
    meter, ranks, progress = run_of.meter, run_of.ranks, run_of.progress
    smoothing = run_of.args.label_smoothing_factor
    counts = ranks.gather([meter.samples, meter.real_tokens, meter.computed_tokens, meter.flops])
    names = ("samples", "real_tokens", "computed_tokens", "flops")
    totals = dict(zip(names, map(sum, zip(*counts, strict=True)), strict=True))
    return {
        keys.TRAIN_LOSS: progress.loss_sum / max(1, progress.step),
        keys.TRAIN_RUNTIME: run_of.seconds,
        keys.TRAIN_STEPS: progress.step,
        keys.TRAIN_COLLAPSED: flat_loss(progress.history, constant_loss(run_of.task, run_of.split.labels, smoothing)),
        "attention": sorted(PATHS_TAKEN),
        "optimizer": run_of.optimizer_used,
        keys.TRAIN_SKIPPED_UPDATES: run_of.precision.skipped_steps,
        keys.TRAIN_SAMPLES_CONSUMED: progress.samples,
        keys.TRAIN_SAMPLES: run_of.order.rows,
        "epoch": run_of.epoch,
        # Of one step and rank; null with apex, which adds them up itself.
        keys.TRAIN_GRADIENT_BYTES: run_of.precision.summed.bytes if run_of.precision.summed.gradients else None,
        keys.SECONDS_TO_FIRST_STEP: meter.to_first_step,
        **meter.rates(totals, plan.dtype),
    }
