"""A link in the place of each file that a run writes: what it points to stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_run import arguments, flags_of, make_model

import run_glue
from bert_glue import soup
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


def linked(folder, name, target):
    """A model folder with one file moved to `target` and linked to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer_config.json", "added_tokens.json"])
def test_a_link_out_of_a_model_folder_is_refused_before_training(tmp_path, capsys, name):
    model, secret = make_model(tmp_path / "model"), tmp_path / "elsewhere" / "secret"
    if not (model / name).exists():
        (model / name).write_text("{}")
    linked(model, name, secret)
    args = arguments(tmp_path, model_name_or_path=str(model), max_steps=1)
    assert run_glue.main(flags_of(args)) == 4
    said = capsys.readouterr()
    (line,) = [line for line in (said.out + said.err).splitlines() if line.startswith("error: ")]
    assert str(model / name) in line and str(secret) in line and "cp -rL" in line
    assert "step 1" not in said.out
    output = tmp_path / "out"
    assert not (output.exists() and list(output.rglob(name)))


@pytest.mark.parametrize("place", ["model/real/vocab.txt", "models--a--b/blobs/0123"], ids=["its own folder", "hub"])
def test_links_within_a_model_folder_and_the_cache_of_the_hub_work(tmp_path, place):
    folder = tmp_path / ("model" if place.startswith("model/") else "models--a--b/snapshots/4567")
    model = make_model(folder)
    linked(model, "vocab.txt", tmp_path / place)
    args = arguments(tmp_path, model_name_or_path=str(model), max_steps=1)
    assert run_glue.main(flags_of(args)) == 0
    copy = Path(args.output_dir) / "vocab.txt"
    assert not copy.is_symlink() and copy.read_text() == (tmp_path / place).read_text()


def test_a_soup_copies_nothing_from_outside_either(tmp_path, capsys):
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, output in enumerate(runs):
        assert run_glue.main(flags_of(arguments(tmp_path, output_dir=str(output), seed=seed, max_steps=1))) == 0
    linked(runs[0], "vocab.txt", tmp_path / "elsewhere" / "vocab.txt")
    assert soup.main([*map(str, runs), "--output_dir", str(tmp_path / "soup")]) == 4
    assert "out of the model's folder" in capsys.readouterr().err
    assert not (tmp_path / "soup" / "vocab.txt").exists()
