"""A link in the place of each file that a run writes: what it points to stays as it is."""

from __future__ import annotations

import os

import pytest
from tiny_run import arguments, flags_of

import run_glue
from bert_glue.launch import results
from bert_glue.predict import __main__ as predict
from bert_glue.report import __main__ as report


def write_everything(folder, output):
    """Every command that writes into an output folder, one after the other."""
    flags = flags_of(
        arguments(folder, output_dir=str(output), max_steps=2, do_eval=True, do_predict=True, save_strategy="epoch")
    )
    assert run_glue.main(flags) == 0
    table = ["--input", str(folder / "data" / "test.csv"), "--output", str(output / "labelled.csv")]
    assert predict.main(["--model", str(output), *table]) == 0
    assert report.main([str(output)]) == 0
    assert results.main(["report", str(output), "--case", "perf"]) == 0


@pytest.mark.parametrize("plant", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_nothing_is_written_through_a_link(tmp_path, plant):
    write_everything(tmp_path, tmp_path / "first")
    victims, output = tmp_path / "victims", tmp_path / "second"
    victims.mkdir()
    output.mkdir()
    names = sorted(path.name for path in (tmp_path / "first").iterdir() if path.is_file() and path.name != ".lock")
    assert len(names) > 15
    for name in [*names, f".labelled.csv.{os.getpid()}"]:
        (victims / name).write_text("precious")
        # Read before it is written: these must not be there, or be the other command's own.
        if name not in ("labelled.csv", "bert_glue.json", "run.json", "all_results.json"):
            plant(victims / name, output / name)
    write_everything(tmp_path, output)
    assert {(victims / name).read_text() for name in names} == {"precious"}
    assert not any((output / name).is_symlink() for name in names)
