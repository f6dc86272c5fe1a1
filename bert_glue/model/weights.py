"""Copies weights between files and modules: safetensors in both directions, pickles by torch's restricted reader."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from bert_glue.errors import DivergedError, MachineError, UsageError, first_line
from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.families import HEAD, Family, weight_names
from bert_glue.storage.files import check_not_lfs_pointer, json_object


@torch.no_grad()
def reinitialise(module: PackedClassifier, count: int, deviation: float) -> str:
    """Initialise the top layers and BERT's pooler again (Zhang et al. 2021, arXiv 2006.05987, section 4).

    Args:
        count: number of layers, >= 1.
        deviation: standard deviation of the new weights.

    Returns:
        A line for the log.

    Raises:
        UsageError: the model has fewer layers, or its layers share their weights.
    """
    total = module.shape.layers
    if module.shape.shared_layers:
        raise UsageError(f"--reinit_layers {count}: the layers of this model share their weights")
    if count > total:
        raise UsageError(f"--reinit_layers {count}: the model has {total} layers")
    head = [module.head_dense] if module.head_norm is None else [module.head_dense, module.head_norm]
    for part in (*module.layers[total - count :], *head):
        initialise(part, deviation)
        for norm in part.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()
    layers = f"layers {total - count + 1} to {total}"
    return f"--reinit_layers {count}: the head's dense layer and {layers} are initialised at random"


_WRAPPED = "module."
# Before 2.6 `weights_only=True` could be made to run code (CVE-2025-32434).
_SAFE_PICKLE_TORCH = (2, 6)
_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files that hold a model's weights: safetensors, or else pickles.

    Args:
        allow_pickle: True accepts pickles with a torch whose restricted reader is not safe.

    Raises:
        MachineError: there are no weights, a pointer takes their place, or there are only pickles, which this torch
            does not read safely.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            check_not_lfs_pointer(index)
            try:
                names = json_object(index)["weight_map"].values()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise MachineError(f"{index} is not an index of weight files: {error}") from error
            files = [folder / Path(name).name for name in sorted(set(names))]
        else:
            continue
        if suffix == "bin" and not allow_pickle and torch.__version__ < _SAFE_PICKLE_TORCH:
            raise MachineError(
                f"{folder} has only {files[0].name}, a pickle, and torch {torch.__version__} can run code from it: "
                "install torch 2.6 or later, convert it to model.safetensors, or trust it with --allow_pickle_weights"
            )
        for file in files:
            if not file.is_file():
                raise MachineError(f"{file} is missing, though {index.name} lists it")
            check_not_lfs_pointer(file)
        return files
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".h5", ".msgpack", ".ckpt", ".onnx"))
    instead = f"; {', '.join(others)} must be converted to PyTorch first" if others else ""
    raise MachineError(f"{folder} has no model.safetensors (nor pytorch_model.bin){instead}")


def read_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors of `files` under their stored names, without the prefix `module.` that DDP adds.

    Raises:
        MachineError: a file is damaged or holds anything but named tensors, or quantized weights; the message names it.
        DivergedError: a number is not finite; such weights come from a run that has diverged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                tensors.update(load_file(file))
            else:
                tensors.update(_checked(torch.load(file, map_location="cpu", weights_only=True)))
        except Exception as error:
            raise MachineError(f"{file} cannot be read as weights: {first_line(error)}") from error
    tensors = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name.endswith(".weight") and not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise MachineError(f"the weights {name} are {kind}: the model is quantized; give the one it was made from")
        # Both extremes are NaN if any number is NaN: one pass over memory and no copy.
        if tensor.dtype in _CHECKED and tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor))):
            where = ", ".join(map(str, files))
            raise DivergedError(f"{where}: the weights {name} are not finite (NaN or Inf)")
    return tensors


def _checked(stored: object) -> dict[str, torch.Tensor]:
    """The content of a pickle, which must be a dict of tensors."""
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}, not a dict of tensors")
    others = [str(name) for name, value in stored.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"it holds more than tensors ({', '.join(others[:5])}): save the model's state_dict() alone")
    return stored


def normalise_names(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Translate names to those of `*ForSequenceClassification`: add the prefix, rename TensorFlow's gamma and beta."""
    named = {}
    has_prefix = any(name.startswith(f"{prefix}.") for name in tensors)
    for name, tensor in tensors.items():
        name = re.sub(r"([Nn]orm)\.gamma$", r"\1.weight", name)
        name = re.sub(r"([Nn]orm)\.beta$", r"\1.bias", name)
        named[name if has_prefix or name.startswith("classifier.") else f"{prefix}.{name}"] = tensor
    return named


def load_packed(
    module: PackedClassifier, family: Family, tensors: dict[str, torch.Tensor], resize_head: bool
) -> list[str]:
    """Copy a checkpoint's tensors into a packed module, converted to its dtype.

    Args:
        tensors: the stored tensors, under the names of transformers.
        resize_head: True keeps the random head where the stored one has another shape.

    Returns:
        Our names of the head parameters that keep their random values.

    Raises:
        MachineError: an encoder weight is missing or has another shape; the message names up to 5.
    """
    stored = normalise_names(tensors, family.prefix)
    fresh, problems = [], []
    parameters = dict(module.named_parameters())
    for ours, theirs in weight_names(family, module.shape).items():
        parts = theirs if isinstance(theirs, tuple) else (theirs,)
        missing = [part for part in parts if part not in stored]
        is_head = ours.startswith(HEAD)
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
    """The module's parameters as contiguous host tensors under the names of transformers; adapters under peft's names.

    Args:
        values: replace the module's own parameters, by our name.
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
    """Initialise as BERT does: normal weights of standard deviation `deviation`, zero biases, unit LayerNorm."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, deviation)
        if isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.zero_()
