"""Truncations and bit flips anywhere in a checkpoint: never loaded, named, and the previous one is used."""

from __future__ import annotations

import random
import shutil

import pytest
from jobs import last_state
from tiny_run import arguments, changed, fit

from bert_glue.errors import CheckpointError
from bert_glue.training.resume import choose

DAMAGES = 500


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("run")
    return fit(arguments(folder, max_steps=6, save_strategy="steps", save_steps=2))


def damage(content: bytes, draw: random.Random) -> bytes:
    """One bit flipped, or the end cut off."""
    if draw.random() < 0.5:
        return content[: draw.randrange(len(content))]
    flipped = bytearray(content)
    flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def test_none_is_loaded_silently_and_the_previous_is_used(run, report):
    draw = random.Random(0)
    newest, previous = run.output_dir / "checkpoint-6", run.output_dir / "checkpoint-4"
    files = sorted(newest.iterdir())
    for at in range(DAMAGES):
        path = files[at % len(files)]
        whole = path.read_bytes()
        path.write_bytes(damage(whole, draw))
        # A damaged manifest says no more when it was written; the time of the file is the newest too.
        folder, lines, problem = choose(run, "auto")
        assert folder == previous and problem == ""
        assert len(lines) == 1 and lines[0].startswith(f"{newest} rejected: ")
        assert path.name in lines[0]
        assert choose(run, str(newest))[2] == f"--resume_from_checkpoint {newest}: {lines[0].split(': ', 1)[1]}"
        path.write_bytes(whole)
    assert choose(run, "auto") == (newest, [], "")
    report(f"{DAMAGES} damages over {len(files)} files: {DAMAGES} named, {DAMAGES} times the previous one was chosen")


def test_a_run_goes_on_from_the_previous_one_to_the_same_bits(run, tmp_path, capsys):
    shutil.copytree(run.output_dir, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint-6" / "optimizer.safetensors"
    path.write_bytes(damage(path.read_bytes(), random.Random(1)))
    resumed = fit(changed(run.args, output_dir=str(tmp_path / "out"), resume_from_checkpoint="auto"))
    assert resumed.progress.step == 6
    assert last_state(tmp_path / "out") == last_state(run.output_dir)


def test_a_named_one_that_is_damaged_is_refused(run, tmp_path):
    shutil.copytree(run.output_dir / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "random-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-4: random-0.safetensors is missing") as caught:
        fit(changed(run.args, resume_from_checkpoint=str(tmp_path / "checkpoint-4")))
    assert caught.value.exit_code == 6
    with pytest.raises(CheckpointError, match="there is no such folder"):
        fit(changed(run.args, resume_from_checkpoint=str(tmp_path / "checkpoint-9")))
