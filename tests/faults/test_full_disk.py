"""No space at each write of a save: exit code 6, and the previous checkpoint stays whole."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import argv_of
from tiny_run import arguments, changed, fit

from bert_glue.errors import CheckpointError
from bert_glue.storage import checkpoint
from bert_glue.training.resume import save_checkpoint

PAGE = 4096


@contextmanager
def small_disk(folder: Path, size: int):
    """A file system of `size` bytes; the test is skipped where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run of two steps, to be saved again and again."""
    folder = tmp_path_factory.mktemp("run")
    return fit(arguments(folder, max_steps=2, save_strategy="steps", save_steps=2, save_total_limit=1))


def save(run, output: Path, step: int) -> None:
    run = replace(run, args=changed(run.args, output_dir=str(output)))
    run.progress.step = step
    save_checkpoint(run)
    run.checkpoints.saver.wait()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_no_space_at_any_page_of_a_save(run, tmp_path, monkeypatch, report):
    """A full disk with one more free page each time; the check before writing is made to see enough space."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 1 << 40))
    needed = size_of(run.output_dir / "checkpoint-2") // PAGE + 40
    with small_disk(tmp_path / "disk", 4 * needed * PAGE) as disk:
        save(run, disk, 1)
        first = disk / "checkpoint-1"
        failures = 0
        for pages in range(needed):
            filler = disk / "filler"
            with filler.open("wb") as file:
                free = os.statvfs(disk).f_bavail
                file.write(bytes(max(0, free - pages) * PAGE))
            try:
                save(run, disk, 2)
                break
            except CheckpointError as error:
                assert "No space left" in str(error) and error.exit_code == 6 and "checkpoint-2" in str(error)
                failures += 1
            assert checkpoint.verify(first) == ""
            assert sorted(path.name for path in disk.iterdir()) == ["checkpoint-1", "filler"]
            filler.unlink()
        assert failures > 20
        assert checkpoint.newest_sound(disk) == (disk / "checkpoint-2", [])
    report(f"a tmpfs with 0 to {failures - 1} pages free: {failures} saves failed, the one with more room succeeded")


def test_no_file_may_grow_over_any_limit(run, tmp_path, report):
    """The kernel's limit on file sizes, for machines on which nothing may be mounted."""
    save(run, tmp_path, 1)
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failures = 0
    for limit in range(0, largest, largest // 40):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match="checkpoint-2 cannot be written"):
                save(run, tmp_path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        failures += 1
        assert checkpoint.verify(tmp_path / "checkpoint-1") == ""
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    report(f"RLIMIT_FSIZE at {failures} sizes up to the largest file's: {failures} saves failed")


def test_a_whole_run_on_a_small_disk_is_exit_code_6(server, tmp_path):
    args = arguments(tmp_path, max_steps=40, save_strategy="steps", save_steps=1)
    with small_disk(tmp_path / "disk", 1 << 21) as disk:
        job = server.start(argv_of(changed(args, output_dir=str(disk / "out"))), tmp_path)
        assert job.wait() == 6
        errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in job.text()
        assert "are free; nothing was written" in errors[0] or "No space left" in errors[0]
        found, rejected = checkpoint.newest_sound(disk / "out")
        assert found is not None and rejected == []
