"""Weights between files and modules: safetensors in and out, no pickle unless asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from bert_glue.errors import DivergedError, MachineError
from bert_glue.families import Family, weight_names
from bert_glue.packed import PackedClassifier

_LFS_MARK = b"version https://git-lfs"
_HEAD = ("head_dense.", "head_output.")
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_not_lfs_pointer(path: Path) -> None:
    """Refuse a Git-LFS pointer that stands where a file should be.

    Raises:
        MachineError: `path` is a pointer, and the message says how to get the file; or it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_MARK))
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}") from error
    if start == _LFS_MARK:
        raise MachineError(
            f"{path} is a Git-LFS pointer ({path.stat().st_size} bytes), not the file itself: "
            "run `git lfs install && git lfs pull` in that folder, or download the file"
        )


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that hold a model's weights: safetensors, or pickles where that is allowed.

    Raises:
        MachineError: none there, a pointer instead, or pickles only and not allowed.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            check_not_lfs_pointer(index)
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise MachineError(f"{index} is not an index of weight files: {error}") from error
            files = [folder / Path(name).name for name in sorted(set(names))]
        else:
            continue
        if suffix == "bin" and not allow_pickle:
            raise MachineError(
                f"{folder} has only {files[0].name}, a pickle, which can run code when it is read: "
                "convert it to model.safetensors, or trust it with --allow_pickle_weights"
            )
        for file in files:
            if not file.is_file():
                raise MachineError(f"{file} is missing, though {index.name} lists it")
            check_not_lfs_pointer(file)
        return files
    raise MachineError(f"{folder} has no model.safetensors (nor pytorch_model.bin)")


def read_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors of `files`, names as stored.

    Raises:
        MachineError: a file is damaged; it is named.
        DivergedError: a number in it is not finite: such weights came from a run that had diverged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                tensors.update(load_file(file))
            else:
                tensors.update(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:
            raise MachineError(f"{file} cannot be read as weights: {error}") from error
    for name, tensor in tensors.items():
        # The extremes are NaN if any number is: one pass, no copy.
        if tensor.dtype in _CHECKED and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            where = ", ".join(map(str, files))
            raise DivergedError(f"{where}: the weights {name} are not finite (NaN or Inf)")
    return tensors


def normalise_names(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Names as in `*ForSequenceClassification`: the prefix added, TensorFlow's gamma and beta renamed."""
    named = {}
    has_prefix = any(name.startswith(f"{prefix}.") for name in tensors)
    for name, tensor in tensors.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        named[name if has_prefix or name.startswith("classifier.") else f"{prefix}.{name}"] = tensor
    return named


def load_packed(
    module: PackedClassifier, family: Family, tensors: dict[str, torch.Tensor], resize_head: bool
) -> list[str]:
    """Copy a checkpoint's tensors into a packed module, converted to its dtype.

    Args:
        tensors: as stored, names of transformers.
        resize_head: True to keep the random head where the stored one has another shape.

    Returns:
        Our names of head parameters left at their random start.

    Raises:
        MachineError: an encoder weight is missing or has another shape; up to 5 are named.
    """
    stored = normalise_names(tensors, family.prefix)
    fresh, problems = [], []
    parameters = dict(module.named_parameters())
    for ours, theirs in weight_names(family, module.shape).items():
        parts = theirs if isinstance(theirs, tuple) else (theirs,)
        missing = [part for part in parts if part not in stored]
        is_head = ours.startswith(_HEAD)
        if missing and is_head:
            fresh.append(ours)
            continue
        if missing:
            problems.append(f"{', '.join(missing)} is missing")
            continue
        value = torch.cat([stored[part] for part in parts]) if len(parts) > 1 else stored[parts[0]]
        if value.shape == parameters[ours].shape:
            with torch.no_grad():
                parameters[ours].copy_(value)
        elif is_head and resize_head:
            fresh.append(ours)
        else:
            hint = "; --ignore_mismatched_sizes starts a new one" if is_head else ""
            problems.append(f"{theirs} has shape {list(value.shape)}, needed is {list(parameters[ours].shape)}{hint}")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise MachineError("the weights do not fit config.json: " + "; ".join(problems[:5]) + more)
    return fresh


def packed_tensors(
    module: PackedClassifier, family: Family, values: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The module's parameters under transformers' names, as contiguous host tensors; adapters under peft's.

    Args:
        values: instead of the module's own, by our parameter name.
    """
    parameters = {**dict(module.named_parameters()), **(values or {})}
    named: dict[str, torch.Tensor] = {}
    for ours, theirs in weight_names(family, module.shape).items():
        parts = theirs if isinstance(theirs, tuple) else (theirs,)
        named |= _pieces(parameters[ours], parts)
        part = module.get_submodule(ours.rpartition(".")[0])
        if ours.endswith(".weight") and getattr(part, "low_rank", None) is not None:
            adapted = [parts[n].removesuffix("weight") for n in part.low_rank.parts]
            for own, kind in (("down", "lora_A"), ("up", "lora_B")):
                value = parameters[ours.removesuffix("weight") + f"low_rank.{own}"]
                named |= _pieces(value, [f"{name}{kind}.weight" for name in adapted])
    return named


def _pieces(value: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    chunks = value.detach().cpu().chunk(len(names))
    return {name: piece.contiguous().clone() for name, piece in zip(names, chunks, strict=True)}


@torch.no_grad()
def initialise(module: nn.Module, deviation: float) -> None:
    """BERT's start: normal weights of standard deviation `deviation`, zero biases, unit LayerNorm."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, deviation)
        if isinstance(part, nn.Linear):
            part.bias.zero_()
