"""run.json: the flags, machine, inputs and outputs of a run, with hashes; enough to repeat it (`repeat.py`)."""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_glue import __version__
from bert_glue.config.arguments import FLAGS, Arguments, without_secrets
from bert_glue.data.tables import pieces
from bert_glue.devices.npu_versions import installed_version
from bert_glue.result_keys import CUT_ROWS, is_of_evaluation
from bert_glue.storage.files import file_hash

if TYPE_CHECKING:
    from bert_glue.data.sources import TaskData
    from bert_glue.devices.distributed import DistributedContext
    from bert_glue.model.classifier import LoadedModel

_PACKAGES = (
    "torch",
    "torch_npu",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "scikit-learn",
    "peft",
)
_NOT_SCORES = ("runtime", "per_second", CUT_ROWS)


def provenance(
    args: Arguments,
    data: TaskData,
    model: LoadedModel,
    ranks: DistributedContext,
    weights: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The part of run.json that is known before training; it holds no secrets.

    Args:
        args: as given, without what was made on the spot.
        weights: of `--class_weights`, by class name.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "bert_glue": __version__,
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "argv": [without_secrets(word, args) for word in sys.argv],
        "working_directory": os.getcwd(),
        "arguments": {name: getattr(args, name) for name, flag in FLAGS.items() if not flag.secret},
        "data": {"source": data.source, "sample_data": data.is_sample, "sha256": data_hashes(data)},
        **({} if weights is None else {"class_weights": weights}),
        "model_sha256": {path.name: found for path, found in model.file_hashes.items()},
        "device_name": ranks.device.name,
        "product_library": ranks.device.product_library,
        "world_size": ranks.world_size,
    }


def with_outcome(
    record: dict[str, Any], folder: Path, results: dict, is_saved: bool, changes: list[str]
) -> dict[str, Any]:
    """run.json with the outcome of the run.

    Args:
        is_saved: whether this run wrote `folder`'s model.safetensors.
        changes: settings changed by resumes, a line each.
    """
    timed = [name for name in results if any(part in name for part in _NOT_SCORES)]
    scores = {name: value for name, value in results.items() if is_of_evaluation(name) and name not in timed}
    weights = folder / "model.safetensors"
    return {
        **record,
        "changes": changes,
        "scores": scores,
        "weights_sha256": file_hash(weights) if is_saved and weights.is_file() else None,
    }


def package_versions() -> dict[str, str | None]:
    """The versions of the packages that can change a result; None for one that is not installed."""
    return {name: installed_version(name) for name in _PACKAGES}


def data_hashes(data: TaskData) -> dict[str, str]:
    """SHA-256 of the texts and labels of each split."""
    hashes = {}
    for name, split in data.splits.items():
        digest = hashlib.sha256()
        for column in split.texts:
            for number, part in enumerate(pieces(column)):
                text = ("\0" if number else "") + "\0".join(part)
                digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(repr(split.labels).encode())
        hashes[name] = digest.hexdigest()
    return hashes
