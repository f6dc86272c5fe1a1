"""Checks the content of a checkpoint's files before a run uses it.

A manifest proves that files are unchanged, but not who wrote them. A fused optimizer would read beyond the end of a
tensor of another shape, and a number of another type would fail hours later. Names, shapes, dtypes, types and ranges
are therefore compared with what this run would write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bert_glue.devices.rng import random_tensors
from bert_glue.storage.files import STATE_FILE, json_object
from bert_glue.training.optim import state_shapes
from bert_glue.training.state import TrainProgress, TrainState

_LARGEST = 2**53  # whole numbers up to here are the same in every reader of JSON
_MT19937_WORDS = 624


def _is_whole(value: Any, end: int = _LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= end


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_entry(value: Any) -> bool:
    """True for one line of the history: a step, and finite numbers or null for the values that are plotted."""
    if not isinstance(value, dict) or not _is_whole(value.get("step")):
        return False
    drawn = (value.get(name) for name in ("epoch", "loss", "learning_rate", "grad_norm", "loss_scale"))
    return all(number is None or _is_number(number) for number in drawn)


def _is_list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _or_null(is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_value(value)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **{name: _is_whole for name, value in asdict(TrainProgress()).items() if isinstance(value, int)},
    "loss_sum": _is_number,
    "recent_loss": _is_number,
    "best_metric": _or_null(_is_number),
    "history": _is_list_of(_is_entry),
    "changes": _is_list_of(lambda item: isinstance(item, str)),
    "loss_scale": lambda value: isinstance(value, dict),
    "group_steps": _is_list_of(_or_null(_is_whole)),
    "narrowed_decay": _is_number,
    "average_row_decay": _or_null(_is_number),
    "same": lambda value: isinstance(value, dict),
    "settings": lambda value: isinstance(value, dict),
}
_UP_TO_STEP = ("updates", "best_step", "evaluated_step", "recent_steps", "evaluations_without_gain")


def read_state(folder: Path) -> dict[str, Any]:
    """Read and check the trainer_state.json of a checkpoint.

    Raises:
        OSError, ValueError: it cannot be read, or a field is missing, has another type, or is out of range.
    """
    state = json_object(folder / STATE_FILE)
    for name, is_right in _FIELDS.items():
        if name not in state:
            raise ValueError(f"trainer_state.json has no {name!r}")
        if not is_right(state[name]):
            raise ValueError(f"trainer_state.json: {name!r} is {str(state[name])[:60]}")
    for name in _UP_TO_STEP:
        if state[name] > state["step"]:
            raise ValueError(f"trainer_state.json: {name!r} is {state[name]}, beyond step {state['step']}")
    return state


def check_scale(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Compare the loss scale of a checkpoint with `own`, the state that this run would write.

    Raises:
        ValueError: the keys differ, or a value is not a number.
    """
    if state.keys() != own.keys():
        raise ValueError(f"trainer_state.json: loss_scale has the keys {', '.join(sorted(state))}")
    for name, value in state.items():
        if isinstance(own[name], dict) and isinstance(value, dict):
            continue  # apex checks its own
        if not (_is_number(value) and value > 0 if name == "scale" else _is_whole(value)):
            raise ValueError(f"trainer_state.json: loss_scale: {name!r} is {str(value)[:60]}")


def read_tensors(state: TrainState, folder: Path) -> dict[str, torch.Tensor]:
    """Read and check the optimizer.safetensors of a checkpoint.

    Raises:
        OSError, SafetensorError: it cannot be read.
        ValueError: a name, shape or dtype that this run's parameters, averages and optimizer do not have.
    """
    tensors = load_file(folder / "optimizer.safetensors")
    masters = state.learner.precision.masters
    expected = {f"parameters.{n}": (m.shape, (m.dtype,)) for n, m in enumerate(masters)}
    if any(name.startswith("average.") for name in tensors):
        expected |= {f"average.{n}": (m.shape, (torch.float32,)) for n, m in enumerate(masters)}
    if any(name.startswith("state.") for name in tensors):  # an optimizer whose steps were all skipped has none
        for number, parameter in enumerate(
            p for group in state.learner.optimizer.param_groups for p in group["params"]
        ):
            for name, (shape, dtypes) in state_shapes(state.learner.optimizer, parameter).items():
                expected[f"state.{number}.{name}"] = (shape, dtypes)
    _compare("optimizer.safetensors", tensors, expected)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"optimizer.safetensors: {name} is not finite")
    return tensors


def read_randoms(state: TrainState, path: Path) -> dict[str, torch.Tensor]:
    """Read and check the states of a rank's random generators; the state of another device is left out.

    Raises:
        OSError, SafetensorError: the file cannot be read.
        ValueError: the tensors are not states of these generators.
    """
    tensors, own = load_file(path), random_tensors(state.ranks.device)
    if "device" in tensors and ("device" not in own or tensors["device"].shape != own["device"].shape):
        del tensors["device"]
    if "python_gauss" in tensors and tensors["python_gauss"].numel() <= 1:  # one number or none
        own["python_gauss"] = own["python_gauss"].new_zeros(tensors["python_gauss"].numel())
    _compare(path.name, tensors, {n: (t.shape, (t.dtype,)) for n, t in own.items() if n != "device" or n in tensors})
    position = tensors["numpy_rest"][0].item()
    if not (position.is_integer() and 0 <= position <= _MT19937_WORDS):
        raise ValueError(f"{path.name}: numpy's position is {position}")
    return tensors


def _compare(
    file: str,
    tensors: dict[str, torch.Tensor],
    expected: dict[str, tuple[Iterable[int], tuple[torch.dtype, ...]]],
) -> None:
    if tensors.keys() != expected.keys():
        other = ", ".join(sorted(tensors.keys() ^ expected.keys())[:3])
        raise ValueError(f"{file}: tensors that are missing or do not belong there: {other}")
    for name, (shape, dtypes) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in dtypes:
            raise ValueError(f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, not {dtypes[0]} {list(shape)}")
