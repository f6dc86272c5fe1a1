"""Checkpoints appear whole or not at all, and a damaged one is never used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import REPOSITORY, arguments, changed, fit, make_data, make_model

from bert_glue.devices.device import Device
from bert_glue.devices.rng import random_tensors, set_random_tensors
from bert_glue.errors import CheckpointError
from bert_glue.storage import checkpoint
from bert_glue.storage import files as storage_files

FILES = {"model.safetensors": b"w" * 300, "optimizer.safetensors": b"o" * 200, "trainer_state.json": b"{}"}


def publish(output: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    folder = output / f"checkpoint-{step}"

    def write(into: Path) -> None:
        for name, content in files.items():
            (into / name).write_bytes(content)

    checkpoint.publish(folder, write, 1000)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_published_checkpoint_is_sound_and_alone(tmp_path):
    folder = publish(tmp_path / "new", 5)
    assert checkpoint.verify(folder) == ""
    assert names(folder) == {*FILES, "manifest.json"}
    assert names(tmp_path / "new") == {"checkpoint-5"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_are_as_open_as_the_umask_says(tmp_path, umask):
    """safetensors alone would close each of them to all other users."""
    from safetensors.torch import save_file

    before = os.umask(umask)
    try:
        folder = tmp_path / "run" / "checkpoint-1"
        checkpoint.publish(folder, lambda into: save_file({"w": torch.zeros(3)}, into / "model.safetensors"), 10)
        checkpoint.replace_files(folder, lambda into: save_file({"w": torch.zeros(3)}, into / "other.safetensors"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": lambda f: flip(f / "model.safetensors"),
    "truncated": lambda f: os.truncate(f / "optimizer.safetensors", 100),
    "longer": lambda f: (f / "trainer_state.json").write_bytes(b"{} "),
    "missing": lambda f: (f / "trainer_state.json").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "half a manifest": lambda f: os.truncate(f / "manifest.json", 60),
    "a list": lambda f: (f / "manifest.json").write_text("[]"),
    "odd entry": lambda f: (f / "manifest.json").write_text('{"format": 2, "files": {"a": 3}}'),
    "later format": lambda f: (f / "manifest.json").write_text('{"format": 3, "files": {}}'),
    "empty": lambda f: (f / "manifest.json").write_text('{"format": 2, "files": {}, "written": 3.0}'),
    "a folder": lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over_and_named(tmp_path, damage):
    older, newer = publish(tmp_path, 5), publish(tmp_path, 10)
    DAMAGES[damage](newer)
    assert checkpoint.verify(newer) != ""
    found, rejected = checkpoint.newest_sound(tmp_path)
    assert found == older
    assert len(rejected) == 1 and str(newer) in rejected[0] and checkpoint.verify(newer) in rejected[0]


def test_where_none_is_sound_there_is_none(tmp_path):
    assert checkpoint.newest_sound(tmp_path / "absent") == (None, [])
    flip(publish(tmp_path, 5) / "model.safetensors")
    found, rejected = checkpoint.newest_sound(tmp_path)
    assert found is None and len(rejected) == 1


def test_steps_are_numbers_and_the_newest_is_the_last_written(tmp_path):
    for step in (9, 100, 20):
        publish(tmp_path, step)
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-²", "checkpoint-5.old"):
        (tmp_path / name).mkdir()
    # An earlier and longer run in the same folder left 100: the run that goes on is at 20.
    assert checkpoint.newest_sound(tmp_path)[0] == tmp_path / "checkpoint-20"
    assert [f.name for f in checkpoint.list_checkpoints(tmp_path)] == [f"checkpoint-{s}" for s in (9, 100, 20)]


def test_an_interrupted_write_leaves_the_previous_one(tmp_path):
    before = publish(tmp_path, 5)

    def write(into: Path) -> None:
        (into / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(tmp_path / "checkpoint-10", write, 10)
    assert names(tmp_path) == {"checkpoint-5"} and checkpoint.verify(before) == ""


def test_what_a_killed_process_left_is_cleared(tmp_path):
    left = tmp_path / ".writing-checkpoint-5-99999"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert checkpoint.newest_sound(tmp_path) == (None, [])
    publish(tmp_path, 10)
    assert names(tmp_path) == {"checkpoint-10"}


@pytest.mark.parametrize("is_sound", [True, False])
def test_a_step_written_again_is_replaced_and_other_files_stay(tmp_path, is_sound):
    folder = publish(tmp_path, 5)
    (folder / "notes.md").write_text("mine")
    (folder / "mine").mkdir()
    if not is_sound:
        flip(folder / "model.safetensors")
    publish(tmp_path, 5, {"model.safetensors": b"new"})
    assert checkpoint.verify(folder) == ""
    assert (folder / "model.safetensors").read_bytes() == b"new"
    assert names(folder) == {"model.safetensors", "manifest.json", "notes.md", "mine"}
    assert names(tmp_path) == {"checkpoint-5"}


def test_no_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    before = publish(tmp_path, 5)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 1, 999))
    with pytest.raises(CheckpointError, match="needs 1000 bytes, 999 are free") as caught:
        publish(tmp_path, 10)
    assert caught.value.exit_code == 6
    assert names(tmp_path) == {"checkpoint-5"} and checkpoint.verify(before) == ""


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_disk_that_fails_while_writing_leaves_the_previous_one(tmp_path, writer):
    """The kernel refuses to grow a file over a limit: the same path as a full disk."""
    from safetensors.torch import save_file

    before = publish(tmp_path, 5)

    def write(into: Path) -> None:
        if writer == "python":
            (into / "big").write_bytes(bytes(1 << 20))
        else:
            save_file({"w": torch.zeros(1 << 18)}, into / "model.safetensors")

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CheckpointError, match="checkpoint-10 cannot be written"):
            checkpoint.publish(tmp_path / "checkpoint-10", write, 1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == {"checkpoint-5"} and checkpoint.verify(before) == ""


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, {1, 2, 3, 4}),
        (3, None, {2, 3, 4}),
        (2, 1, {1, 4}),
        (1, None, {4}),
        (1, 2, {2, 4}),
        (2, 4, {3, 4}),
        (9, None, {1, 2, 3, 4}),
    ],
)
def test_the_limit_keeps_best_and_newest(tmp_path, limit, best, kept):
    for step in (1, 2, 3, 4):
        publish(tmp_path, step)
    checkpoint.keep_newest(tmp_path, limit, f"checkpoint-{best}", tmp_path / "checkpoint-4")
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept}


def test_nothing_is_deleted_before_the_new_one_verifies(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    flip(tmp_path / "checkpoint-3" / "model.safetensors")
    with pytest.raises(CheckpointError, match="checkpoint-3: when read back, model.safetensors does not have"):
        checkpoint.keep_newest(tmp_path, 1, None, tmp_path / "checkpoint-3")
    assert checkpoint.newest_sound(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_other_peoples_files_survive_the_limit(tmp_path):
    for step in (1, 2):
        publish(tmp_path, step)
    (tmp_path / "checkpoint-1" / "notes.md").write_text("mine")
    (tmp_path / "checkpoint-plan").mkdir()
    checkpoint.keep_newest(tmp_path, 1, None, tmp_path / "checkpoint-2")
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-plan"}
    assert names(tmp_path / "checkpoint-1") == {"notes.md"}


def foreign(output: Path, step: int) -> Path:
    """A checkpoint as another program leaves it, transformers' Trainer for one."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text("theirs")
    return folder


def test_checkpoints_of_another_program_are_neither_counted_nor_deleted(tmp_path):
    theirs = foreign(tmp_path, 1)
    for step in (2, 3):
        publish(tmp_path, step)
    checkpoint.keep_newest(tmp_path, 2, None, tmp_path / "checkpoint-3")
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    checkpoint.keep_newest(tmp_path, 1, None, tmp_path / "checkpoint-3")
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-3"}
    assert len(names(theirs)) == 3


def test_a_checkpoint_of_another_program_in_the_way_is_kept_whole(tmp_path):
    foreign(tmp_path, 5)
    folder = publish(tmp_path, 5)
    assert checkpoint.verify(folder) == "" and names(folder) == {*FILES, "manifest.json"}
    assert names(tmp_path / "checkpoint-5.kept-1") == {"model.safetensors", "optimizer.pt", "trainer_state.json"}


class Killed(BaseException):
    """Replaces kill -9, without any `finally` being run."""


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_kill_between_the_renames_of_a_rewritten_checkpoint_loses_nothing(tmp_path, calls):
    """The process ends after `calls` renames: before, between and after the two."""
    publish(tmp_path, 4)
    folder = publish(tmp_path, 5)
    (folder / "notes.md").write_text("mine")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom bert_glue.storage import checkpoint\n"
        "done, rename = [], os.rename\n"
        "def fatal(a, b):\n"
        f"    if len(done) == {calls}: os._exit(9)\n"
        "    rename(a, b); done.append(b)\n"
        f"    if len(done) == {calls}: os._exit(9)\n"
        "os.rename = fatal\n"
        "checkpoint.publish(Path(sys.argv[1]), lambda into: (into / 'new').write_bytes(b'new'), 10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=REPOSITORY, timeout=60)
    assert done.returncode == 9
    assert any(name.startswith(".") for name in names(tmp_path))
    checkpoint.finish_interrupted(tmp_path)
    assert names(tmp_path) == {"checkpoint-4", "checkpoint-5"}
    assert checkpoint.newest_sound(tmp_path) == (folder, [])
    own = {"new"} if calls == 2 else set(FILES)
    assert names(folder) == {*own, "manifest.json", "notes.md"}


@pytest.mark.parametrize("left", range(len(FILES) + 1))
def test_a_removal_that_was_killed_is_finished_later(tmp_path, monkeypatch, left):
    for step in (1, 2):
        publish(tmp_path, step)
    original, calls = Path.unlink, []

    def fatal(path: Path, missing_ok: bool = False) -> None:
        if len(calls) == left:
            raise Killed
        calls.append(path)
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", fatal)
    with pytest.raises(Killed):
        checkpoint.remove(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    assert checkpoint.verify(tmp_path / "checkpoint-1") != ""
    checkpoint.finish_interrupted(tmp_path)
    assert names(tmp_path) == {"checkpoint-2"}


def test_every_bit_of_a_manifest_counts(tmp_path):
    folder = publish(tmp_path, 5)
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(0, len(whole) * 8, 7):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        manifest.write_bytes(damaged)
        assert checkpoint.verify(folder) != "", at
    manifest.write_bytes(whole[:-1])
    assert checkpoint.verify(folder) != ""
    manifest.write_bytes(whole)
    assert checkpoint.verify(folder) == ""


def test_a_manifest_reaches_no_file_outside(tmp_path):
    outside = tmp_path / "precious.txt"
    outside.write_text("keep")
    folder = publish(tmp_path / "run", 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../precious.txt"] = {"bytes": 4, "sha256": storage_files.file_hash(outside)}
    text = checkpoint._manifest_text(manifest["files"], manifest["written"])  # as someone who means harm would
    (folder / "manifest.json").write_text(text)
    assert checkpoint.verify(folder) != ""
    checkpoint.remove(folder)
    assert outside.read_text() == "keep"


def test_generators_continue_where_they_were():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()

    draw()
    saved = random_tensors(Device("cpu"))
    expected = [draw() for _ in range(3)]
    set_random_tensors(saved, Device("cpu"))
    assert [draw() for _ in range(3)] == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, object]:
    folder = tmp_path_factory.mktemp("saved")
    args = arguments(folder, save_strategy="steps", save_steps=2, max_steps=2, eval_strategy="epoch")
    fit(args)
    return folder, args


REFUSED = {
    "batch size": {"per_device_train_batch_size": 4},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "seed": {"seed": 7},
    "seed of the order": {"data_seed": 7},
    "drop_last": {"dataloader_drop_last": True},
    "length": {"train_sampling_strategy": "group_by_length"},
    "rows": {"max_train_samples": 20},
    "optimizer": {"optim": "lamb"},
    "model": {"padding": "longest"},
}


@pytest.mark.parametrize("named", REFUSED)
def test_resume_refuses_another_run_and_says_what_differs(saved, named):
    folder, args = saved
    other = changed(args, resume_from_checkpoint=str(folder / "out" / "checkpoint-2"), **REFUSED[named])
    with pytest.raises(CheckpointError, match=named):
        fit(other)


def test_resume_refuses_a_model_of_another_shape(saved, tmp_path):
    folder, args = saved
    model = make_model(tmp_path / "wide", width=32)
    with pytest.raises(CheckpointError, match="another model"):
        fit(changed(args, resume_from_checkpoint="auto", model_name_or_path=str(model)))


def test_resume_refuses_other_words(saved, tmp_path):
    folder, args = saved
    flags = make_data(tmp_path / "data")
    lines = Path(flags["validation_file"]).read_text().splitlines()
    Path(flags["validation_file"]).write_text("\n".join([*lines, "a unused3 sleeps,a dog eats,no"]) + "\n")
    with pytest.raises(CheckpointError, match="words in use"):
        fit(changed(args, resume_from_checkpoint="auto", **flags))


def test_resume_refuses_a_damaged_checkpoint_by_name_and_auto_starts_anew(saved, tmp_path):
    folder, args = saved
    shutil.copytree(folder / "out", tmp_path / "out")
    broken = tmp_path / "out" / "checkpoint-2"
    flip(broken / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="optimizer.safetensors does not have the hash"):
        fit(changed(args, resume_from_checkpoint=str(broken)))
    run = fit(changed(args, resume_from_checkpoint="auto", output_dir=str(tmp_path / "out")))
    assert run.progress.step == 2 and len(run.progress.history) == 3
    assert checkpoint.verify(broken) == ""  # written again


@pytest.mark.parametrize("name", [".writing-x", ".writing-checkpoint-5-1", ".replaced-checkpoint-5-1", "checkpoint-7"])
def test_nothing_is_deleted_through_a_link(tmp_path, name):
    victim = publish(tmp_path / "other", 1)
    (victim / "thesis.txt").write_text("precious")
    before = sorted(path.name for path in victim.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(victim)
    checkpoint.finish_interrupted(tmp_path / "out")
    checkpoint.keep_newest(tmp_path / "out", 1, None, publish(tmp_path / "out", 8))
    publish(tmp_path / "out", 7)
    checkpoint.finish_interrupted(tmp_path / "out")
    assert sorted(path.name for path in victim.iterdir()) == before


def test_a_folder_in_the_place_of_a_file_bars_nothing(tmp_path):
    folder = publish(tmp_path, 5)
    name = next(iter(FILES))
    (folder / name).unlink()
    (folder / name).mkdir()
    assert checkpoint.verify(folder) == f"{name} is missing"
    (tmp_path / ".writing-x" / "inside").mkdir(parents=True)
    for _ in range(2):
        checkpoint.finish_interrupted(tmp_path)
        assert checkpoint.verify(publish(tmp_path, 5)) == ""


@pytest.mark.parametrize("name", ["../victim", "..", "", "a/b", "manifest.json", "\0"])
def test_a_manifest_lists_files_of_its_folder_alone(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = publish(tmp_path, 5)
    entry = {"bytes": 8, "sha256": hashlib.sha256(b"precious").hexdigest()}
    (folder / "manifest.json").write_text(checkpoint._manifest_text({name: entry}, 1.0))
    assert "is not the size and hash of a file beside it" in checkpoint.verify(folder)
    checkpoint.remove(folder)
    assert victim.read_text() == "precious"
