"""What follows from the number of ranks: how a global batch is dealt out, and the learning rate that goes with it."""

from __future__ import annotations

import math
from dataclasses import replace

from bert_glue.arguments import Arguments
from bert_glue.errors import UsageError

# Factor of the learning rate when a step has `share` times the samples it was meant for. Linear: Goyal et al.
# 2017 (arXiv 1706.02677); square root: Krizhevsky 2014 (arXiv 1404.5997), You et al. 2020 for LAMB.
_FACTORS = {"none": lambda share: 1.0, "linear": lambda share: share, "sqrt": math.sqrt}


def for_ranks(args: Arguments, world_size: int) -> tuple[Arguments, list[str]]:
    """Settings of a run on `world_size` ranks, and lines that say what was derived.

    `--global_batch_size` becomes a batch size per device and forward passes per step; `--lr_scaling` becomes
    the learning rate itself.

    Raises:
        UsageError: the global batch cannot be dealt out evenly.
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
            f"from --lr_base_batch_size {args.lr_base_batch_size} to {samples} samples a step"
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
        raise UsageError(f"--global_batch_size {total} does not divide over {world_size} ranks")
    if share <= most:
        return share, 1
    if share % most:
        raise UsageError(
            f"--global_batch_size {total}: {share} samples a rank (of {world_size}) are not a number of whole "
            f"forward passes of --per_device_train_batch_size {most}"
        )
    return most, share // most
