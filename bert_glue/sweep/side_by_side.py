"""Decides how many runs of a sweep share one GPU: as many as fit into its memory, each a process of its own.

Processes take turns on a device, so runs side by side train no faster together than one after the other. They fill the
seconds in which one run leaves the device idle: imports, tokenizing, saving. Beyond four at once this gains nothing
(docs/scaling.md), and NVIDIA's MPS, which overlaps kernels of several processes, needs no flag here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_glue.storage.files import json_object
from bert_glue.sweep.plan import SweepRun

AUTO = "auto"
MOST = 4
# One core launches the kernels of a run, and one collates its batches.
_CORES_A_RUN = 2
# Share of the free memory that is given away; an allocator keeps blocks that it cannot use.
_SHARE = 0.9
# Weights, gradients, fp32 masters and two moments at the level that takes most, O2.
_BYTES_A_PARAMETER = 20
# Kept for the backward pass, a token, layer and element of the width: fp32, every row as long as --max_seq_length.
_BYTES_A_CELL = 80
# CUDA's context, the libraries' workspaces and the recordings of steps.
_FIXED = 3 << 29
_WEIGHTS = ("*.safetensors", "*.bin")
_HIDDEN, _LAYERS = ("hidden_size", "dim"), ("num_hidden_layers", "n_layers")


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that decide its memory.

    Args:
        hidden: width.
        is_guess: the model is not on this machine yet, and counts as bert-large.
    """

    parameters: int
    hidden: int
    layers: int
    is_guess: bool = False


_LARGE = ModelSize(335_000_000, 1024, 24, is_guess=True)
_SAMPLE = ModelSize(1_000_000, 64, 2)


def model_size(name: str | None) -> ModelSize:
    """The sizes of `--model_name_or_path`, from the config.json and the weights in its folder.

    Args:
        name: folder, or name on a hub. None: the tiny BERT of `--sample`.
    """
    if name is None:
        return _SAMPLE
    folder = Path(name).expanduser()
    stored = max(sum(file.stat().st_size for file in folder.glob(pattern)) for pattern in _WEIGHTS)
    try:
        config = json_object(folder / "config.json")
        hidden, layers = (_first(config, names) for names in (_HIDDEN, _LAYERS))
    except (OSError, ValueError, KeyError):
        return _LARGE
    # Most models are stored in fp32; one in 16 bits counts half, which the share of free memory does not cover.
    return ModelSize(stored // 4, hidden, layers) if stored else _LARGE


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int:
    """The number under the first of `names` that is there.

    Raises:
        KeyError: there is none.
        ValueError: it is no number.
    """
    for name in names:
        if name in config:
            return int(config[name])
    raise KeyError(names[0])


def run_bytes(run: SweepRun) -> tuple[int, ModelSize]:
    """Device memory that a run needs at most, and the sizes that it comes from."""
    size = model_size(run.settings.get("model_name_or_path"))
    tokens = run.settings["per_device_train_batch_size"] * run.settings["max_seq_length"]
    cells = tokens * size.hidden * size.layers
    return _FIXED + _BYTES_A_PARAMETER * size.parameters + _BYTES_A_CELL * cells, size


def runs_at_once(run: SweepRun, free: dict[str, int], cores: int) -> tuple[int, str]:
    """Runs at once on each device, >= 1, and a line that says why.

    Args:
        run: one of the sweep; all have the same model.
        free: free memory of each device that several runs may share, bytes; {} for none.
        cores: of this host.
    """
    if not free:
        return 1, ""
    need, size = run_bytes(run)
    device, least = min(free.items(), key=lambda item: item[1])
    fitting = int(_SHARE * least) // need
    count = max(1, min(MOST, fitting, cores // (_CORES_A_RUN * len(free))))
    guess = " (as bert-large would: the model is not here yet)" if size.is_guess else ""
    return count, (
        f"runs at once per device: {count}, each a process; one takes up to {need / 1e9:.1f} GB{guess} of "
        f"{least / 1e9:.1f} GB that are free on {device}, and {_CORES_A_RUN} of {cores} cores; more than {MOST} gain "
        "nothing; --jobs N chooses another number"
    )


def settle(
    jobs: int | str | None, devices: str, listed: Callable[[], dict[str, Any]], run: SweepRun
) -> tuple[int, str]:
    """Runs at once on each device for `--jobs` and `--devices`, and a line that says why, or "".

    Args:
        jobs: a number; auto; or None for auto where `--devices` is auto too, else 1.
        listed: asks for `devices` of this machine, and the `free_bytes` of those that runs may share.
        run: one of the sweep.
    """
    if isinstance(jobs, int):
        return jobs, ""
    if jobs is None and devices != AUTO:
        return 1, ""
    chosen = [name.strip() for name in devices.split(",")]
    free = {name: size for name, size in listed()["free_bytes"].items() if devices == AUTO or name in chosen}
    return runs_at_once(run, free, len(os.sched_getaffinity(0)))


def read_jobs(text: str) -> int | str:
    """The value of `--jobs`.

    Raises:
        ValueError: neither a whole number nor auto.
    """
    return AUTO if text == AUTO else int(text)
