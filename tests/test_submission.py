"""The leaderboard archive: what is in it, what is refused and why, and that it is the same bytes each time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_run import REPOSITORY, arguments, make_model

from bert_glue import submission
from bert_glue.errors import DataError
from bert_glue.pipeline import run as pipeline
from bert_glue.pipeline.outputs import write_predictions
from bert_glue.tasks import TASKS, also_predicted, get_task

FILES = {
    "CoLA.tsv": 1063, "SST-2.tsv": 1821, "MRPC.tsv": 1725, "STS-B.tsv": 1379, "MNLI-m.tsv": 9796, "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463, "QQP.tsv": 390965, "RTE.tsv": 3000, "WNLI.tsv": 146, "AX.tsv": 1104,
}  # fmt: skip


def make_run(folder: Path, name: str, **changes) -> Path:
    """The folder of a finished run of a task, with random predictions of every test row."""
    folder.mkdir()
    task, draw = get_task(name), np.random.default_rng(0)
    results = {"task_name": name, "sample_data": False, **changes}
    for part in (task, *also_predicted(task)):
        for split, suffix in part.test:
            rows = part.rows[split]
            values = draw.uniform(-0.5, 5.5, rows) if part.is_regression else draw.integers(0, part.num_labels, rows)
            write_predictions(folder, part, suffix, values)
            results[f"predict_samples_{part.name}{suffix}"] = rows
    (folder / "all_results.json").write_text(json.dumps(results))
    (folder / "run.json").write_text(json.dumps({"arguments": {"task_name": name, "test_file": None}}))
    return folder


def change(path: Path, line: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name, task in TASKS.items() if task.predicted_with is None}


@pytest.fixture
def wnli(tmp_path) -> Path:
    return make_run(tmp_path / "wnli", "wnli")


def command(*words: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "bert_glue.submission", *map(str, words)], capture_output=True, text=True, cwd=REPOSITORY
    )
    return done.returncode, done.stdout, done.stderr


def members(path: Path) -> dict[str, list[str]]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode().splitlines() for name in archive.namelist()}


def test_the_archive_has_all_eleven_files_with_the_official_rows(runs, tmp_path):
    output = tmp_path / "all.zip"
    lines = submission.build(list(runs.values()), output, partial=False, allow_sample=False)
    files = members(output)
    assert {name: len(rows) - 1 for name, rows in files.items()} == FILES
    assert list(files) == sorted(files) and lines[-1] == f"wrote {output}"
    for name, rows in files.items():
        assert rows[0] == "index\tprediction", name
        assert [row.split("\t")[0] for row in rows[1:]] == [str(i) for i in range(FILES[name])], name


def test_labels_are_what_the_leaderboard_reads(runs, tmp_path):
    submission.build(list(runs.values()), tmp_path / "all.zip", partial=False, allow_sample=False)
    labels = {name: {row.split("\t")[1] for row in rows[1:]} for name, rows in members(tmp_path / "all.zip").items()}
    for name in ("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "WNLI.tsv"):
        assert labels[name] == {"0", "1"}, name
    for name in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):
        assert labels[name] == {"entailment", "neutral", "contradiction"}, name
    for name in ("QNLI.tsv", "RTE.tsv"):
        assert labels[name] == {"entailment", "not_entailment"}, name
    assert all(0 <= float(value) <= 5 and len(value) == 5 for value in labels["STS-B.tsv"])
    assert {"0.000", "5.000"} <= labels["STS-B.tsv"]  # drawn beyond the range, written within it


def test_a_number_stands_for_its_class(tmp_path, wnli):
    change(wnli / "predict_results_wnli.txt", 2, "0\tentailment")
    change(wnli / "predict_results_wnli.txt", 3, "1\tnot_entailment")
    values = submission.collect([wnli])[0]["WNLI.tsv"]
    assert values[:2] == ["1", "0"]


def test_the_same_predictions_are_the_same_bytes(runs, tmp_path):
    first, second = tmp_path / "a.zip", tmp_path / "b.zip"
    chosen = [runs["mnli"], runs["rte"]]
    submission.build(chosen, first, partial=True, allow_sample=False)
    time.sleep(2.1)  # a zip keeps times to two seconds
    submission.build(chosen[::-1], second, partial=True, allow_sample=False)
    assert first.read_bytes() == second.read_bytes()


def test_missing_files_are_named_and_nothing_is_written(runs, tmp_path):
    output = tmp_path / "part.zip"
    code, _, errors = command(runs["mnli"], runs["cola"], "--output", output)
    assert code == 3 and not output.exists()
    assert "SST-2.tsv" in errors and "WNLI.tsv" in errors and "--partial" in errors
    assert "AX.tsv" not in errors and "MNLI" not in errors


def test_a_partial_archive_is_complete_and_says_what_is_constant(runs, tmp_path):
    output = tmp_path / "part.zip"
    code, out, _ = command(runs["mnli"], "--output", output, "--partial")
    assert code == 0
    files = members(output)
    assert {name: len(rows) - 1 for name, rows in files.items()} == FILES
    assert {row.split("\t")[1] for row in files["RTE.tsv"][1:]} == {"entailment"}
    assert {row.split("\t")[1] for row in files["STS-B.tsv"][1:]} == {"2.500"}
    assert "RTE.tsv: no run; every row is 'entailment', so its score has no meaning" in out
    assert "MNLI-m.tsv: 9796 rows from" in out


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        (1, "id\tprediction", ":1: the header must be index<TAB>prediction, not id, prediction"),
        (5, "4\tentailment", ":5: index '4' instead of 3"),
        (9, "7\tmaybe", ":9: label 'maybe' is not one of: not_entailment, entailment"),
        (9, "7", ":9: 1 columns instead of 2"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(wnli, line, text, expected):
    change(wnli / "predict_results_wnli.txt", line, text)
    with pytest.raises(DataError) as error:
        submission.collect([wnli])
    assert expected in str(error.value)


@pytest.mark.parametrize("text", ["5.001", "-0.1", "nan", "inf", "high"])
def test_a_score_outside_its_range_is_refused(tmp_path, text):
    run = make_run(tmp_path / "stsb", "stsb")
    change(run / "predict_results_stsb.txt", 3, f"1\t{text}")
    with pytest.raises(DataError, match=r":3: score .* is not a number in \[0, 5\]"):
        submission.collect([run])


def test_another_number_of_rows_is_refused(tmp_path):
    run = make_run(tmp_path / "rte", "rte")
    path = run / "predict_results_rte.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:101]))
    with pytest.raises(DataError, match="100 rows, but all_results.json says 3000"):
        submission.collect([run])
    results = json.loads((run / "all_results.json").read_text())
    (run / "all_results.json").write_text(json.dumps({**results, "predict_samples_rte": 100}))
    with pytest.raises(DataError, match="100 rows; RTE.tsv has 3000"):
        submission.collect([run])


def test_predictions_left_from_an_earlier_run_are_refused(wnli):
    results = json.loads((wnli / "all_results.json").read_text())
    del results["predict_samples_wnli"]
    (wnli / "all_results.json").write_text(json.dumps(results))
    with pytest.raises(DataError, match="may be from an earlier run"):
        submission.collect([wnli])


def test_own_test_data_is_refused(wnli):
    (wnli / "run.json").write_text(json.dumps({"arguments": {"test_file": "mine.csv"}}))
    with pytest.raises(DataError, match="--test_file mine.csv, which may not be GLUE's test set"):
        submission.collect([wnli])


def test_two_runs_of_one_task_are_refused(wnli, tmp_path):
    other = make_run(tmp_path / "wnli-seed2", "wnli")
    with pytest.raises(DataError, match="WNLI.tsv also comes from .*wnli; give only one of them"):
        submission.collect([wnli, other])


def test_every_wrong_run_is_named_at_once(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    trained = make_run(tmp_path / "trained", "rte")
    (trained / "predict_results_rte.txt").unlink()
    own = make_run(tmp_path / "own", "wnli", task_name="reviews")
    code, _, errors = command(empty, trained, own)
    assert code == 3 and len(errors.splitlines()) == 3
    assert "empty" in errors and "no predictions of rte" in errors and "'reviews' is not a GLUE task" in errors


def test_an_output_that_cannot_be_written_is_exit_code_6(runs, tmp_path):
    code, _, errors = command(runs["wnli"], "--partial", "--output", tmp_path / "none" / "x.zip")
    assert code == 6 and "--output" in errors and "Traceback" not in errors


def test_no_run_at_all_is_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        submission.main([])
    assert ended.value.code == 2 and "RUN" in capsys.readouterr().err


def test_sample_data_is_refused_and_a_dry_run_is_marked(tmp_path):
    model = make_model(tmp_path / "model")
    args = arguments(
        tmp_path, sample=True, task_name="wnli", model_name_or_path=str(model), do_train=False, do_predict=True
    )
    assert pipeline.run(args) == 0
    output = tmp_path / "dry.zip"
    code, _, errors = command(args.output_dir, "--output", output, "--partial")
    assert code == 3 and "sample data, not GLUE" in errors and not output.exists()
    code, out, _ = command(args.output_dir, "--output", output, "--partial", "--allow_sample")
    assert code == 0 and "do not submit" in out.splitlines()[-1]
    files = members(output)
    assert files["SAMPLE-DATA-NOT-GLUE.txt"] == ["sample data, not GLUE: a dry run, do not submit"]
    assert set(files) == {*FILES, "SAMPLE-DATA-NOT-GLUE.txt"}
    assert len(files["WNLI.tsv"]) > 1


def test_the_archive_opens_everywhere(runs, tmp_path):
    submission.build([runs["wnli"]], tmp_path / "x.zip", partial=True, allow_sample=False)
    content = (tmp_path / "x.zip").read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        assert all(info.date_time == (1980, 1, 1, 0, 0, 0) for info in archive.infolist())
    assert len(content) < 2_000_000
