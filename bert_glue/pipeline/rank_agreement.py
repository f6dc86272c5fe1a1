"""Compares settings and inputs over all ranks before the first step, so that ranks of different runs never mix."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import RankError, UsageError
from bert_glue.results.provenance import package_versions

if TYPE_CHECKING:
    from bert_glue.data.batching import TokenSplit
    from bert_glue.model.classifier import LoadedModel
    from bert_glue.tasks import GlueTask

# Flags that may differ: each host has its own devices and paths, and only the first rank writes. The files behind
# the paths are compared by content.
_OWN_OF_A_HOST = frozenset((
    "device", "device_id", "output_dir", "cache_dir", "model_name_or_path", "config_name", "tokenizer_name",
    "data_path", "train_file", "validation_file", "test_file", "class_weights", "preprocessing_num_workers",
    "num_cpu_threads_per_process", "overwrite_cache", "hub", "log_level", "disable_tqdm", "report_to", "run_name",
    "ddp_timeout", "repeat", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
))  # fmt: skip


def compare_settings(ranks: DistributedContext, args: Arguments) -> None:
    """Compares flags, code and library versions over all ranks, in one collective.

    Raises:
        UsageError: a flag differs.
        RankError: the code or a library differs.
    """
    if ranks.world_size == 1:
        return
    flags = {f"--{n}": getattr(args, n) for n, f in FLAGS.items() if n not in _OWN_OF_A_HOST and not f.secret}
    code = {"python": sys.version.split()[0], "code of bert_glue": _code_hash(), **package_versions()}
    found = ranks.all_gather_object((flags, code))
    _refuse(ranks, [flags for flags, _ in found], UsageError)
    _refuse(ranks, [code for _, code in found], RankError)


def compare_inputs(
    ranks: DistributedContext,
    task: GlueTask,
    splits: dict[str, TokenSplit],
    model: LoadedModel,
    weights: dict[str, float] | None = None,
) -> None:
    """Compares data (rows and their order) and initial weights over all ranks, in one collective.

    It hashes both with SHA-256, which takes about one second for bert-base.

    Args:
        weights: the weights of `--class_weights` by class name.

    Raises:
        RankError: the ranks differ.
    """
    if ranks.world_size == 1:
        return
    data = {f"data of {name}": _split_hash(split) for name, split in splits.items()}
    own = {"class names": json.dumps(task.labels), **data, "starting weights": _weights_hash(model)}
    own["--class_weights"] = json.dumps(weights)
    _refuse(ranks, ranks.all_gather_object(own), RankError)


def _refuse(ranks: DistributedContext, facts: list[dict[str, object]], kind: type[UsageError | RankError]) -> None:
    """Raises `kind` on every rank if one fact differs between ranks."""
    lines = differences(facts)
    if lines:
        # All ranks leave together: if one ended first, the others would report a network error. Closing first is
        # needed because the threads of gloo abort a process that ends while they run.
        with suppress(RankError):
            ranks.barrier()
            ranks.close()
        raise kind("\n".join(lines))


def differences(facts: list[dict[str, object]]) -> list[str]:
    """One line for each fact that differs between ranks.

    Args:
        facts: name -> value, one dict per rank, in the order of ranks.
    """
    lines = []
    for name in dict.fromkeys(name for own in facts for name in own):
        ranks_of: dict[str, list[int]] = {}
        for rank, own in enumerate(facts):
            ranks_of.setdefault(str(own.get(name, "missing")), []).append(rank)
        if len(ranks_of) > 1:
            values = "; ".join(f"{value[:60]} on {_ranks(ranks)}" for value, ranks in ranks_of.items())
            lines.append(f"ranks differ in {name}: {values}; start all ranks with the same value")
    return lines


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"


def _split_hash(split: TokenSplit) -> str:
    digest = hashlib.sha256()
    for array in (split.table.ids, split.table.offsets, split.table.first, split.labels):
        if array is not None:
            digest.update(memoryview(array).cast("B") if array.flags.c_contiguous else array.tobytes())
    return digest.hexdigest()[:16]


def _weights_hash(model: LoadedModel) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(memoryview(value.detach().contiguous().view(-1).cpu().numpy()).cast("B"))
    return digest.hexdigest()[:16]


@cache
def _code_hash() -> str:
    digest, package = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
