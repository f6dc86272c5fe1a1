"""Checkpoints that are whole or not there: written aside, flushed, hashed, renamed; no pickle.

A checkpoint folder holds the model as transformers reads it (config.json, model.safetensors,
tokenizer), `optimizer.safetensors` (masters and moments in flat buffers), `random-<rank>.safetensors`,
`trainer_state.json` and, written last, `manifest.json` with the hash and size of every other file.
A folder counts only if its manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from bert_glue.device import Device
from bert_glue.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1


def step_of(folder: Path) -> int:
    """Optimizer steps done at a folder named `checkpoint-<step>`; -1 for another name."""
    prefix, _, number = folder.name.partition("-")
    return int(number) if prefix == "checkpoint" and number.isdecimal() else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, sound or not, first written first.

    By time and not by step: an earlier, longer run in the same folder may have left higher steps.
    """
    found = [folder for folder in output_dir.glob("checkpoint-*") if step_of(folder) >= 0 and folder.is_dir()]
    return sorted(found, key=lambda folder: (_written(folder), step_of(folder)))


def _written(folder: Path) -> float:
    """When a checkpoint was written, seconds since 1970; the manifest's word survives copying."""
    try:
        return float(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.stat().st_mtime


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> str:
    """Why a checkpoint cannot be used; "" if it is sound."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != _FORMAT:
            return f"its format {manifest['format']!r} is not {_FORMAT}"
        for name, entry in files.items():
            path = folder / Path(name).name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if file_hash(path) != entry["sha256"]:
                return f"{name} does not have the hash of its manifest"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to its end"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return ""


def newest_sound(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one that was rejected."""
    rejected = []
    for folder in reversed(list_checkpoints(output_dir)):
        reason = verify(folder)
        if not reason:
            return folder, rejected
        rejected.append(f"{folder} rejected: {reason}")
    return None, rejected


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def plain_errors(target: Path) -> Iterator[None]:
    """Turn a file system's refusal to write `target` into one line with exit code 6.

    Raises:
        CheckpointError: the block raised OSError, or what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Put files into `folder`, each of them whole; those of an earlier run stay until all are written.

    Args:
        write: called with a temporary folder to fill.

    Raises:
        CheckpointError: no space, or the file system failed.
    """
    aside = folder / f".writing-{os.getpid()}"
    with plain_errors(folder):
        try:
            _remove_leftovers(folder)
            aside.mkdir()
            write(aside)
            for path in aside.iterdir():
                _flush(path)
            for path in aside.iterdir():
                os.replace(path, folder / path.name)
        finally:
            if aside.is_dir():
                _remove_files(aside, [p.name for p in aside.iterdir()])


def publish(folder: Path, write: Callable[[Path], None], expected_bytes: int) -> None:
    """Write a checkpoint so that it appears whole or not at all.

    Args:
        folder: final name, `checkpoint-<step>`; replaced if it exists, other people's files kept.
        write: called with the temporary folder to fill.
        expected_bytes: size to be written, checked against the free space first.

    Raises:
        CheckpointError: no space, or the file system failed; earlier checkpoints are untouched.
    """
    with plain_errors(folder):
        _publish(folder, write, expected_bytes)


def _publish(folder: Path, write: Callable[[Path], None], expected_bytes: int) -> None:
    aside, old = (folder.with_name(f".{kind}-{folder.name}-{os.getpid()}") for kind in ("writing", "replaced"))
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        free = shutil.disk_usage(aside.parent).free
        if free < expected_bytes:
            raise CheckpointError(f"{folder}: needs {expected_bytes} bytes, {free} are free; nothing was written")
        aside.mkdir()
        write(aside)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(aside.iterdir())}
        manifest = {"format": _FORMAT, "written": time.time(), "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in aside.iterdir():
            _flush(path)
        _flush(aside)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        _flush(folder.parent)
        if old.exists():
            remove(old)
        for kept in old.iterdir() if old.exists() else ():
            os.rename(kept, folder / kept.name)
        _remove_files(old, [])
    finally:
        if aside.is_dir():
            _remove_files(aside, [p.name for p in aside.iterdir()])


def _remove_leftovers(output_dir: Path) -> None:
    """Delete what a killed process was writing; the folder's lock says that nobody else is."""
    for left in output_dir.glob(".writing-*"):
        _remove_files(left, [p.name for p in left.iterdir()])


def remove(folder: Path) -> None:
    """Delete a checkpoint: only files that its manifest lists, or our own names where it has none."""
    try:
        names = list(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        names = [p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt")]
    # The manifest goes first: from then on the folder is no checkpoint, whatever happens.
    _remove_files(folder, [MANIFEST, *names])


def _remove_files(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / Path(name).name).unlink(missing_ok=True)
    with suppress(OSError):  # someone keeps files of their own there: not ours to delete
        folder.rmdir()


def keep_newest(output_dir: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints over `limit`, never the newest sound one nor the best."""
    if limit is None:
        return
    newest, _ = newest_sound(output_dir)
    folders = list_checkpoints(output_dir)
    spare = [f for f in folders if f != newest and f.name != best]
    for folder in spare[: max(0, len(folders) - limit)]:
        remove(folder)


def random_tensors(device: Device) -> dict[str, torch.Tensor]:
    """State of python's, numpy's, torch's and the device's generators as tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    device_state = device.random_state()
    return state if device_state is None else {**state, "device": device_state}


def set_random_tensors(state: dict[str, torch.Tensor], device: Device) -> None:
    """Take back `random_tensors`."""
    version, *numbers = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "device" in state:
        device.set_random_state(state["device"])
