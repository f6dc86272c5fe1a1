"""Labelling a file: the labels, the copied columns, resuming after a kill, and refused inputs."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_run import REPOSITORY, arguments, make_data, make_model, rows

from bert_glue.data.readers import read_table
from bert_glue.data.streaming import STREAMED
from bert_glue.pipeline import run as pipeline
from bert_glue.predict import __main__ as predict
from bert_glue.predict import output

COUNT = 150  # over two chunks of 64 batches of one row


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run on own data, two texts a row."""
    folder = tmp_path_factory.mktemp("run")
    model = make_model(folder / "model")
    args = arguments(
        folder,
        model_name_or_path=str(model),
        do_predict=True,
        num_train_epochs=20.0,
        **make_data(folder / "data", test=40),
    )
    assert pipeline.run(args) == 0
    return Path(args.output_dir)


def write_input(path: Path, count: int = COUNT, extra: dict | None = None) -> Path:
    """`count` rows as csv, tsv, jsonl or parquet."""
    found = [{"id": n, **row, **(extra or {})} for n, row in enumerate(rows(count, seed=5))]
    for row in found:
        del row["label"]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(found)
    return path


def flags(run: Path, source: Path | str, target: Path | str, *more: str) -> list[str]:
    words = ["--model", str(run), "--input", str(source), "--output", str(target), "--device", "cpu"]
    return [*words, "--per_device_eval_batch_size", "1", *more]


def label(*words) -> int:
    return predict.main(flags(*words))


def process(*words, **more) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "bert_glue.predict", *flags(*words)], cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip


def test_labels_are_those_of_run_glue(run, tmp_path):
    source = run.parent / "data" / "test.csv"
    assert label(run, source, tmp_path / "out.csv") == 0
    labelled = read_table(tmp_path / "out.csv").columns
    told = read_table_of_predictions(run / "predict_results_own.txt")
    assert labelled["prediction"] == told and len(told) == 40 and len(set(told)) == 2
    original = read_table(source).columns
    assert {name: labelled[name] for name in original} == original
    assert list(labelled) == [*original, "prediction", "probability_no", "probability_yes"]


def read_table_of_predictions(path: Path) -> list[str]:
    return [line.split("\t")[1] for line in path.read_text().splitlines()[1:]]


def test_probabilities_are_transformers_own(run, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = write_input(tmp_path / "in.jsonl", 12)
    assert label(run, source, tmp_path / "out.jsonl") == 0
    tokenizer, stock = (
        AutoTokenizer.from_pretrained(run),
        AutoModelForSequenceClassification.from_pretrained(run).eval(),
    )
    for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()):
        inputs = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
        with torch.no_grad():
            shares = stock(**inputs).logits.softmax(-1)[0].numpy()
        np.testing.assert_allclose([row["probability_no"], row["probability_yes"]], shares, atol=1e-5)
        assert row["prediction"] == ("no", "yes")[shares.argmax()]


@pytest.mark.parametrize("target", STREAMED)
@pytest.mark.parametrize("source", STREAMED)
def test_any_kind_to_any_kind(run, tmp_path, source, target):
    before = write_input(tmp_path / f"in.{source}", 70)
    after = tmp_path / f"out.{target}"
    assert label(run, before, after) == 0
    given, found = read_table(before).columns, read_table(after).columns
    keeps_numbers = target in ("jsonl", "parquet") and source in ("jsonl", "parquet")
    assert found["id"] == (given["id"] if keeps_numbers else [str(value) for value in given["id"]])
    assert found["sentence2"] == given["sentence2"]
    total = np.array(found["probability_no"], float) + np.array(found["probability_yes"], float)
    assert np.abs(total - 1).max() < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted((before.name, after.name))


@pytest.mark.parametrize("kind", STREAMED)
@pytest.mark.parametrize("written", ["all", "half", "none"])
def test_after_a_kill_the_result_is_byte_for_byte_the_same(run, tmp_path, monkeypatch, kind, written):
    """The kill comes after the second chunk reached the file in full, in half or not, untold to the journal."""
    source = write_input(tmp_path / "in.jsonl")
    assert label(run, source, tmp_path / f"whole.{kind}") == 0
    monkeypatch.setattr(output.ToFile, "append", killed_in_second_chunk(written))
    target = tmp_path / f"out.{kind}"
    with pytest.raises(Killed):
        label(run, source, target)
    assert not target.exists()
    monkeypatch.undo()
    assert label(run, source, target) == 0
    assert target.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(("in.jsonl", target.name, f"whole.{kind}"))


class Killed(BaseException):
    pass


def killed_in_second_chunk(written: str):
    append = output.ToFile.append

    def until_killed(self, table, columns, input_hash):
        if self.rows:
            content = self.encode(table, columns)
            self._file.write(content[: {"all": len(content), "half": len(content) // 2, "none": 0}[written]])
            self._file.flush()
            raise Killed
        append(self, table, columns, input_hash)

    return until_killed


def test_kill_9_and_go_on(run, tmp_path):
    source = write_input(tmp_path / "in.csv", 1280)
    assert label(run, source, tmp_path / "whole.csv") == 0
    target, progress = tmp_path / "out.csv", tmp_path / ".out.csv.progress.json"
    killed = process(run, source, target, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not progress.exists() and time.monotonic() < until:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL and not target.exists()
    done = json.loads(progress.read_text())["rows"]
    assert 0 < done < 1280
    resumed = process(run, source, target, stdout=subprocess.PIPE, text=True)
    out = resumed.communicate()[0]
    assert resumed.returncode == 0 and f"continuing after row {done}" in out
    assert f"labelled {1280 - done} rows" in out
    assert target.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def interrupted(run, tmp_path, monkeypatch) -> tuple[Path, Path]:
    source, target = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(output.ToFile, "append", killed_in_second_chunk("half"))
        with pytest.raises(Killed):
            label(run, source, target)
    return source, target


def test_another_setting_does_not_go_on(run, tmp_path, monkeypatch, capsys):
    source, target = interrupted(run, tmp_path, monkeypatch)
    assert label(run, source, target, "--max_seq_length", "16") == 6
    errors = capsys.readouterr().err
    assert "64 rows were labelled with another --max_seq_length" in errors and "--overwrite" in errors
    assert label(run, source, target, "--max_seq_length", "16", "--overwrite") == 0
    assert len(target.read_text().splitlines()) == COUNT


def test_another_input_does_not_go_on(run, tmp_path, monkeypatch, capsys):
    source, target = interrupted(run, tmp_path, monkeypatch)
    source.write_text(source.read_text().replace('"id": 3,', '"id": 4,'))
    assert label(run, source, target) == 3
    assert "its first 64 rows are not the rows labelled so far" in capsys.readouterr().err


def test_a_finished_output_is_kept(run, tmp_path, capsys):
    source, target = write_input(tmp_path / "in.csv", 5), tmp_path / "out.csv"
    target.write_text("mine")
    assert label(run, source, target) == 6 and target.read_text() == "mine"
    assert "exists; choose another path, or give --overwrite" in capsys.readouterr().err
    assert label(run, source, target, "--overwrite") == 0 and len(target.read_text().splitlines()) == 6


def test_two_processes_do_not_share_an_output(run, tmp_path, capsys):
    held = output.ToFile(tmp_path / "out.csv", "csv", {}, overwrite=False)
    assert label(run, write_input(tmp_path / "in.csv", 5), tmp_path / "out.csv") == 6
    assert "another process is writing it" in capsys.readouterr().err
    held.close()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("in.jsonl", '{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "a", "sentence2": null}\n', ":2: column"),
        ("in.jsonl", '{"sentence1": "a", "sentence2": "b"}\n{"sentence1": "a"\n', ":2: not JSON"),
        ("in.csv", "sentence1,sentence2\na,b\nc\n", ":3: 1 columns instead of 2"),
        ("in.tsv", "sentence1\tother\na\tb\n", "no column 'sentence2'; columns: sentence1, other; name the text"),
        ("in.csv", "sentence1,sentence2,prediction\na,b,c\n", "already has a column 'prediction'"),
    ],
)
def test_broken_input_is_exit_code_3_with_its_line(run, tmp_path, capsys, name, content, expected):
    (tmp_path / name).write_text(content)
    assert label(run, tmp_path / name, tmp_path / "out.csv") == 3
    assert expected in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_mended_line_goes_on(run, tmp_path, capsys):
    source, target = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    good = source.read_text()
    lines = good.splitlines(keepends=True)
    source.write_text("".join([*lines[:100], "broken\n", *lines[101:]]))
    assert label(run, source, target) == 3 and ":101: not JSON" in capsys.readouterr().err
    source.write_text(good)
    assert label(run, source, target) == 0
    assert "continuing after row 64" in capsys.readouterr().out
    assert [json.loads(line)["id"] for line in target.read_text().splitlines()] == list(range(COUNT))


def test_standard_input_to_standard_output(run, tmp_path):
    source = write_input(tmp_path / "in.jsonl", 70)
    assert label(run, source, tmp_path / "file.jsonl") == 0
    piped = process(run, "-", "-", stdin=source.open("rb"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = piped.communicate()
    assert piped.returncode == 0 and out == (tmp_path / "file.jsonl").read_bytes()
    assert b"labelled 70 rows" in errors and errors.count(b"\n") == 1


def test_a_reader_that_leaves_is_no_traceback(run, tmp_path):
    source = write_input(tmp_path / "in.jsonl", 3200)
    piped = process(run, source, "-", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.stdout.readline()
    piped.stdout.close()
    errors = piped.stderr.read()
    assert piped.wait() == 6 and errors == b"error: --output -: the reader of standard output has ended\n"


def test_columns_by_name(run, tmp_path, capsys):
    source = tmp_path / "in.csv"
    source.write_text("x,y\na dog runs,a dog waits\n")
    assert label(run, source, tmp_path / "out.csv", "--text_columns", "x", "y") == 0
    assert label(run, source, tmp_path / "out.csv", "--overwrite", "--text_columns", "x") == 2
    assert "--text_column_names x: the model reads 2 texts per row: sentence1, sentence2" in capsys.readouterr().err


def test_what_a_kind_cannot_hold_is_refused(run, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    row = {"sentence1": "a dog", "sentence2": "a cat", "note": "x"}
    source.write_text("".join(json.dumps({**row, **more}) + "\n" for more in ({}, {"note": "tab\there"})))
    assert label(run, source, tmp_path / "out.tsv") == 3
    assert ":2: a text has a tab or line break" in capsys.readouterr().err
    lines = [json.dumps(row)] * 64 + [json.dumps({**row, "late": 1})]
    source.write_text("\n".join(lines) + "\n")
    assert label(run, source, tmp_path / "out.csv") == 3
    assert ":65: the first rows have no column 'late'" in capsys.readouterr().err
    assert label(run, source, tmp_path / "late.jsonl") == 0
    lines[64] = json.dumps({**row, "note": 7})
    source.write_text("\n".join(lines) + "\n")
    assert label(run, source, tmp_path / "out.parquet") == 3
    assert ":65: 'note' is '7', which does not fit" in capsys.readouterr().err


def test_line_breaks_survive_csv(run, tmp_path):
    source = write_input(tmp_path / "in.jsonl", 3, {"note": 'a\rb\nc\r\n"d", e'})
    assert label(run, source, tmp_path / "out.csv") == 0
    assert read_table(tmp_path / "out.csv").columns["note"] == ['a\rb\nc\r\n"d", e'] * 3


def test_a_model_without_classifier_is_refused(run, tmp_path, capsys):
    model = make_model(tmp_path / "encoder")
    source = write_input(tmp_path / "in.csv", 3)
    assert label(model, source, tmp_path / "out.csv") == 4
    assert "has no fine-tuned classifier; train it first with run_glue.py" in capsys.readouterr().err


def test_what_a_folder_leaves_open_is_told(run, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    assert label(folder, write_input(tmp_path / "in.csv", 3), tmp_path / "out.csv") == 0
    assert "note: config.json has no model_type" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output", "x.xlsx"], "--output x.xlsx: unknown extension. Choices: csv, tsv, jsonl, parquet"),
        (["--output", "-", "--output_format", "parquet"], "--output -: parquet cannot be piped"),
    ],
)
def test_usage(run, tmp_path, capsys, words, expected):
    source = write_input(tmp_path / "in.csv", 3)
    assert predict.main(["--model", str(run), "--input", str(source), *words]) == 2
    assert expected in capsys.readouterr().err


def test_regression_gives_scores_only(tmp_path):
    data = tmp_path / "train.csv"
    data.write_text("sentence1,sentence2,label\n" + "".join(f"a dog runs,a cat {n},{n / 7}\n" for n in range(20)))
    args = arguments(tmp_path, train_file=str(data), max_steps=2)
    assert pipeline.run(args) == 0
    source = write_input(tmp_path / "in.jsonl", 5)
    assert label(Path(args.output_dir), source, tmp_path / "out.jsonl") == 0
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(isinstance(row["prediction"], float) and list(row)[-1] == "prediction" for row in found)


def peak_memory(run: Path, source: Path, target: Path) -> int:
    """Bytes of a process that labels `source`."""
    code = (
        "import sys; from bert_glue.predict import __main__ as predict; from bert_glue.devices.device import Device\n"
        f"assert predict.main({flags(run, source, target)!r}[:-2]) == 0\n"
        "print(Device('cpu').peak_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(run, tmp_path):
    filler = {"note": "n" * 4000}
    few = peak_memory(run, write_input(tmp_path / "few.jsonl", 4 * 2048, filler), tmp_path / "a.jsonl")
    many = peak_memory(run, write_input(tmp_path / "many.jsonl", 12 * 2048, filler), tmp_path / "b.jsonl")
    added = (tmp_path / "many.jsonl").stat().st_size - (tmp_path / "few.jsonl").stat().st_size
    assert added > 60e6 and many - few < added / 4
