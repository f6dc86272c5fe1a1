"""Checkpoints that are complete or absent: a thread writes, flushes, hashes and renames them. No pickle.

A checkpoint folder holds the model in the format of transformers (config.json, model.safetensors, tokenizer),
`optimizer.safetensors` (masters and moments in flat buffers), `random-<rank>.safetensors` and `trainer_state.json`. The
last file is `manifest.json`, with the hash and size of every other file and a hash of itself. A folder is a checkpoint
only if its manifest verifies, and only files that a manifest lists are deleted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from bert_glue.errors import CheckpointError, UserError
from bert_glue.storage.files import file_hash, json_object, plain_errors, read_plain_text, remove_abandoned

MANIFEST = "manifest.json"
_REMOVING = "removing.json"  # the name of the manifest while its checkpoint is being deleted
_FORMAT = 2


def step_of(folder: Path) -> int:
    """The step in the name of a folder `checkpoint-<step>`; -1 for another name."""
    prefix, _, number = folder.name.partition("-")
    return int(number) if prefix == "checkpoint" and number.isdecimal() else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, valid or not, in the order of their writing.

    The order is by time and not by step, because an earlier and longer run may have left higher steps in the folder.
    """
    found = [folder for folder in output_dir.glob("checkpoint-*") if step_of(folder) >= 0 and folder.is_dir()]
    return sorted(found, key=lambda folder: (_written(folder), step_of(folder)))


def _written(folder: Path) -> float:
    """The time at which a checkpoint was written, seconds since 1970; from its manifest, which survives copying."""
    try:
        return float(_read_manifest(folder)["written"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return folder.stat().st_mtime


def _manifest_text(files: dict, written: float) -> str:
    """The text of a manifest with its own hash, so that no bit of it can change unnoticed."""
    content = {"format": _FORMAT, "written": written, "files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1)


def _is_plain(name: str) -> bool:
    """True for the name of a file directly in the folder."""
    return name not in ("", ".", "..", MANIFEST) and not {"/", "\0"} & set(name)


def _read_manifest(folder: Path) -> dict:
    text = read_plain_text(folder / MANIFEST)
    manifest = json.loads(text)
    if manifest["format"] != _FORMAT:
        raise ValueError(f"its format {str(manifest['format'])[:40]!r} is not {_FORMAT}")
    if not isinstance(manifest["written"], int | float) or not math.isfinite(manifest["written"]):
        raise ValueError("it has no time of writing")
    for name, entry in manifest["files"].items():
        if not _is_plain(name) or not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
            raise ValueError(f"its entry {name[:40]!r} is not the size and hash of a file beside it")
    if text != _manifest_text(manifest["files"], manifest["written"]):
        raise ValueError("it does not have the hash that stands in it")
    return manifest


def verify(folder: Path) -> str:
    """The reason why a checkpoint cannot be used; "" if it is valid."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        for name, entry in _read_manifest(folder)["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if file_hash(path) != entry["sha256"]:
                return f"{name} does not have the hash of its manifest"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not written to its end, or not by this program"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return ""


def newest_sound(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one that does not."""
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


def _flush_files(aside: Path) -> None:
    """Flush all files to the disk, and let everyone with access to the folder read them (safetensors writes 0600)."""
    for path in aside.iterdir():
        path.chmod(aside.stat().st_mode & 0o666)
        _flush(path)


def replace_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Put complete files into `folder`; the files of an earlier run stay until all new ones are written.

    Args:
        write: function that fills a temporary folder.

    Raises:
        CheckpointError: the disk is full, or the file system fails.
    """
    aside = folder / f".writing-{os.getpid()}"
    with plain_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            finish_interrupted(folder)
            aside.mkdir()
            write(aside)
            _flush_files(aside)
            for path in aside.iterdir():
                os.replace(path, folder / path.name)
            _flush(folder)
        finally:
            _remove_all_of(aside)


def publish(folder: Path, write: Callable[[Path], None], expected_bytes: int) -> None:
    """Write a checkpoint so that it appears complete or not at all.

    Args:
        folder: final name, `checkpoint-<step>`; replaced if it exists, but files of others stay.
        write: function that fills a temporary folder.
        expected_bytes: size of the checkpoint, compared with the free space first.

    Raises:
        CheckpointError: the disk is full, or the file system fails; earlier checkpoints are untouched.
    """
    with plain_errors(folder):
        _publish(folder, write, expected_bytes)


def _publish(folder: Path, write: Callable[[Path], None], expected_bytes: int) -> None:
    aside, old = (folder.with_name(f".{kind}-{folder.name}-{os.getpid()}") for kind in ("writing", "replaced"))
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        finish_interrupted(folder.parent)
        free = shutil.disk_usage(aside.parent).free
        if free < expected_bytes:
            raise CheckpointError(f"{folder}: needs {expected_bytes} bytes, {free} are free; nothing was written")
        aside.mkdir()
        write(aside)
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(_manifest_text(files, time.time()), encoding="utf-8")
        _flush_files(aside)
        _flush(aside)
        if folder.exists():
            os.rename(folder, old)
        os.rename(aside, folder)
        _flush(folder.parent)
    finally:
        _remove_all_of(aside)
        _finish_replaced(old)


def finish_interrupted(output_dir: Path) -> None:
    """Finish or undo what a killed process began; the caller holds the folder's lock, so that nobody else is at work.

    Raises:
        OSError: the file system fails.
    """
    remove_abandoned(output_dir)
    for left in (*output_dir.glob(".writing-*"), *output_dir.glob("sample_bert/.making-*")):
        _remove_all_of(left)
    for old in output_dir.glob(".replaced-checkpoint-*"):
        _finish_replaced(old)
    for mark in output_dir.glob(f"checkpoint-*/{_REMOVING}"):
        if _is_own(mark.parent):
            _remove_listed(mark)


def _finish_replaced(old: Path) -> None:
    """Choose between a checkpoint that was renamed for its replacement and the one that has its name now."""
    if not _is_own(old):
        return
    folder = old.with_name(old.name.removeprefix(".replaced-").rpartition("-")[0])
    if not folder.exists():  # the process ended between the two renames
        os.rename(old, folder)
    elif verify(folder) and not verify(old):
        os.rename(folder, _free_name(folder, "damaged"))
        os.rename(old, folder)
    elif _listed(old / MANIFEST) is None:  # not ours, or no longer recognisable
        os.rename(old, _free_name(folder, "kept"))
    else:
        _remove_listed(old / MANIFEST)
        for own in list(old.iterdir()) if old.is_dir() else ():  # someone keeps files of their own there
            if not (folder / own.name).exists():
                os.rename(own, folder / own.name)
        with suppress(OSError):
            old.rmdir()


def _is_own(folder: Path) -> bool:
    """True for a folder, False for a link to one, whose content is not ours to delete."""
    return folder.is_dir() and not folder.is_symlink()


def _free_name(folder: Path, why: str) -> Path:
    """`checkpoint-5.kept-1` or the next free name, which no checkpoint has, so that nothing deletes the folder."""
    names = (folder.with_name(f"{folder.name}.{why}-{n}") for n in count(1))
    return next(path for path in names if not path.exists())


def remove(folder: Path) -> None:
    """Delete the files of a checkpoint that its manifest lists; nothing if the manifest cannot be read."""
    if _is_own(folder) and _listed(folder / MANIFEST) is not None:
        # From this rename on the folder is no checkpoint, and what was begun is finished by `settle`.
        os.replace(folder / MANIFEST, folder / _REMOVING)
        _remove_listed(folder / _REMOVING)


def _listed(manifest: Path) -> list[str] | None:
    """The names of the files in a manifest; None if it cannot be read."""
    try:
        return [name for name in json_object(manifest)["files"] if _is_plain(name)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _remove_listed(manifest: Path) -> None:
    """Delete the files that `manifest` lists, then the manifest, and the folder if it is empty."""
    for name in [*(_listed(manifest) or ()), manifest.name]:
        _remove_file(manifest.parent / name)
    with suppress(OSError):  # someone keeps files of their own there: not ours to delete
        manifest.parent.rmdir()


def _remove_file(path: Path) -> None:
    """Delete a file or a link; a folder in its place is not ours and stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)


def _remove_all_of(aside: Path) -> None:
    """Delete a folder into which only we write; anything in it that cannot be ours stays."""
    if _is_own(aside):
        for path in aside.iterdir():
            _remove_file(path)
        with suppress(OSError):
            aside.rmdir()


def keep_newest(output_dir: Path, limit: int | None, best: str | None, newest: Path) -> None:
    """Delete the oldest checkpoints over `limit`, never the newest nor the best.

    Args:
        best: name of the folder to keep whatever its age.
        newest: the checkpoint just written; nothing is deleted before it has been read back and verified.

    Raises:
        CheckpointError: the newest checkpoint does not verify.
    """
    if limit is None:
        return
    with plain_errors(output_dir):
        # Folders of others with such a name do not count and are not touched.
        ours = [folder for folder in list_checkpoints(output_dir) if _listed(folder / MANIFEST) is not None]
        spare = [folder for folder in ours if folder not in (newest, output_dir / (best or ""))]
        spare = spare[: max(0, len(ours) - limit)]
        reason = verify(newest) if spare else ""
        if reason:
            raise CheckpointError(f"{newest}: when read back, {reason}; no earlier checkpoint was deleted")
        for folder in spare:
            remove(folder)


class Saver:
    """Runs one job at a time in a thread. As a context it waits for the last job.

    The next call of any method raises the error of a job, so that the run ends no later than the next optimizer step.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Start `job` when the previous one has ended."""
        self.wait()
        # A daemon: a second signal ends the process at once, and what is half written is cleared later.
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True, name="checkpoint")
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Wait until no job is running."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of the last job, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, SystemExit):  # a second signal does not wait
            try:
                self.wait()  # a job that began from a valid state must be complete on the disk
            except UserError as second:
                if isinstance(error, UserError) and error is not second:
                    error.args = (f"{error}\n{second}",)
