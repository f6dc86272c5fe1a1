"""Derives values from other flags and from the number of ranks, and makes notices about flags without effect."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from bert_glue import result_keys as keys
from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.config.checks import STEPS_OR_SHARE, techniques_in_use
from bert_glue.errors import UsageError
from bert_glue.tasks import get_task


def resolve(args: Arguments, given: frozenset[str]) -> Arguments:
    """`args` with the values that are derived from others; expects `find_problems` to be empty.

    Args:
        given: flags that the user set. With `--sample`, the tiny BERT's recipe sets the others.

    The task's name is its row's, `--pad_to_max_length` becomes `padding`, `--eval_strategy` implies
    `--do_eval`, a backend or mode of torch.compile implies `--torch_compile`, `eval_steps` follows
    `logging_steps`, and `metric_for_best_model` loses its `eval_` prefix.
    """
    evaluates = args.eval_strategy != "no"
    compiles = bool(args.torch_compile or args.torch_compile_backend or args.torch_compile_mode)
    by_steps = args.eval_strategy == "steps"
    metric = args.metric_for_best_model
    recipe = {}
    if args.sample and not args.model_name_or_path:
        from bert_glue.config.files import SAMPLE_RECIPE

        recipe = {name: value for name, value in SAMPLE_RECIPE.items() if name not in given}
    steps = {name: getattr(args, name) for name in STEPS_OR_SHARE}
    whole = {name: int(value) for name, value in steps.items() if value is not None and value >= 1}
    args = replace(args, given=given, **whole)
    return replace(
        args,
        **recipe,
        notices=(*args.notices, *_without_effect(args, given), *upload_notices(args)),
        task_name=get_task(args.task_name).name if args.task_name else None,
        torch_compile=compiles,
        torch_compile_backend=(args.torch_compile_backend or "inductor") if compiles else None,
        padding="max_length" if args.pad_to_max_length else args.padding,
        do_eval=args.do_eval or (args.do_train and evaluates),
        eval_steps=args.eval_steps or (args.logging_steps if by_steps else None),
        metric_for_best_model=keys.without_eval(metric) if metric else None,
    )


def _without_effect(args: Arguments, given: frozenset[str]) -> Iterator[str]:
    """One line for each precision flag that this run does not use."""
    yield from techniques_without_effect(args)
    for name in ("cuda_graph", "class_weights"):
        if getattr(args, name) and not args.do_train:
            yield f"--{name} has no effect without --do_train"
    yield from _schedules_without_effect(args, given)
    is_low = (args.fp16 or args.bf16) and args.fp16_opt_level != "O0"
    if "fp16_opt_level" in given and not (args.fp16 or args.bf16) and args.fp16_opt_level != "O0":
        yield f"--fp16_opt_level {args.fp16_opt_level} has no effect without --fp16 or --bf16; the run trains in fp32"
    if args.loss_scale is not None and not (is_low and args.fp16):
        why = "bf16 has the range of fp32" if is_low else "fp32 needs none"
        yield f"--loss_scale {args.loss_scale} has no effect: {why}"
    if args.amp_backend == "apex" and not (args.fp16 or args.bf16):
        yield "--amp_backend apex has no effect without --fp16; the run trains in fp32 natively"


def _schedules_without_effect(args: Arguments, given: frozenset[str]) -> Iterator[str]:
    """A line on each given flag about evaluating and saving while training that nothing in this run reads."""
    chooses = args.load_best_model_at_end or args.early_stopping_patience is not None
    choice = "--load_best_model_at_end or --early_stopping_patience"
    conditions = {
        "eval_steps": (args.eval_strategy == "steps", "--eval_strategy steps"),
        "save_steps": (args.save_strategy == "steps", "--save_strategy steps"),
        "metric_for_best_model": (chooses, choice),
        "greater_is_better": (chooses, choice),
        "early_stopping_threshold": (args.early_stopping_patience is not None, "--early_stopping_patience"),
    }
    for name, (is_read, needed) in conditions.items():
        is_set = name in given and getattr(args, name) != FLAGS[name].default
        if is_set and args.do_train and not is_read:
            yield f"--{name} has no effect without {needed}"


def techniques_without_effect(args: Arguments) -> Iterator[str]:
    """One line for each technique that a run without training does not use."""
    if not args.do_train:
        yield from (
            f"--{name} has no effect without --do_train" for name in techniques_in_use(args) if name != "reinit_layers"
        )


def upload_notices(args: Arguments) -> Iterator[str]:
    """One line for each upload flag without an upload. They are accepted, as in Hugging Face's scripts."""
    for name in ("hub_model_id", "hub_token", "hub_private_repo"):
        if getattr(args, name) and not args.push_to_hub:
            yield f"--{name} has no effect without --push_to_hub"


_LEAST_LOG_LINES = 20


def with_step_counts(args: Arguments, total: int) -> Arguments:
    """Converts `--logging_steps`, `--eval_steps` and `--save_steps` below 1 to numbers of steps of a run of `total`.

    Without `--logging_steps`, a short run also logs its loss 20 times.

    Raises:
        UsageError: `--load_best_model_at_end` or early stopping would never see an evaluation.
    """
    steps = {name: getattr(args, name) for name in STEPS_OR_SHARE}
    counts = {name: math.ceil(total * value) for name, value in steps.items() if value is not None and value < 1}
    if args.is_default("logging_steps"):
        counts["logging_steps"] = min(args.logging_steps, max(1, total // _LEAST_LOG_LINES))
    args = replace(args, **counts)
    every = args.eval_steps or args.logging_steps
    if args.eval_strategy == "steps" and every > total:
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(args, name):
                raise UsageError(
                    f"--{name} needs an evaluation, but --eval_steps {every} is larger than the run's {total} steps; "
                    "lower it, or give --eval_strategy epoch"
                )
    return args


# Factor of the learning rate if a step has `share` times the samples for which it is meant. Linear: Goyal et al.
# 2017 (arXiv 1706.02677); square root: Krizhevsky 2014 (arXiv 1404.5997), You et al. 2020 for LAMB.
_FACTORS = {"none": lambda share: 1.0, "linear": lambda share: share, "sqrt": math.sqrt}


def for_ranks(args: Arguments, world_size: int) -> tuple[Arguments, list[str]]:
    """Settings of a run on `world_size` ranks, and lines that report the derived values.

    `--global_batch_size` becomes a batch size per device and forward passes per step; `--lr_scaling` becomes
    the learning rate itself.

    Raises:
        UsageError: the global batch cannot be divided evenly.
    """
    lines = []
    if args.global_batch_size is not None:
        batch, passes = _dealt_out(args.global_batch_size, world_size, args.per_device_train_batch_size)
        args = replace(args, per_device_train_batch_size=batch, gradient_accumulation_steps=passes)
        total = args.global_batch_size
        lines.append(f"batch: --global_batch_size {total} = {batch} x {world_size} rank(s) x {passes} accumulated")
    if args.lr_scaling != "none":
        samples = samples_per_step(args, world_size)
        share = samples / args.lr_base_batch_size
        rate = args.learning_rate * _FACTORS[args.lr_scaling](share)
        lines.append(
            f"learning rate: {rate:.6g} = {args.learning_rate:g} scaled by --lr_scaling {args.lr_scaling} "
            f"from --lr_base_batch_size {args.lr_base_batch_size} to {samples} samples per step"
        )
        args = replace(args, learning_rate=rate)
    return args, lines


def samples_per_step(args: Arguments, world_size: int) -> int:
    """Samples of one full optimizer step on all ranks together."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size


def _dealt_out(total: int, world_size: int, most: int) -> tuple[int, int]:
    """Samples per device and forward pass (`most` at most), and forward passes per step."""
    share, rest = divmod(total, world_size)
    if rest:
        raise UsageError(f"--global_batch_size {total} cannot be divided evenly over {world_size} ranks")
    if share <= most:
        return share, 1
    if share % most:
        raise UsageError(
            f"--global_batch_size {total}: {share} samples a rank (of {world_size}) are not a number of whole "
            f"forward passes of --per_device_train_batch_size {most}"
        )
    return most, share // most
