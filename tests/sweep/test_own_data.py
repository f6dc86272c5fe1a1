"""Sweeps over own data: what is read first, what the runs get, and what is refused before anything starts."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from sweep_stubs import Sweep

from bert_glue.config.arguments import FLAGS
from bert_glue.config.expectations import read_expectations
from bert_glue.errors import DataError, UsageError
from bert_glue.sweep.own_data import DATA_FLAGS, read_own_data
from bert_glue.sweep.plan import SweepRun, tasks_of
from bert_glue.sweep.summary import best_mean

WORDS = ["river", "stone", "cloud", "green", "seven", "paper", "night"]


def write(path: Path, labels: list, **more: str) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "verdict", *more])
        for at, label in enumerate(labels):
            text = " ".join(WORDS[(at + step) % 7] for step in range(2 + at % 3)) + f" {at}"
            writer.writerow([text, label, *more.values()])
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    train = write(tmp_path / "train.csv", ["good", "bad", "bad"] * 8)
    dev = write(tmp_path / "dev.csv", ["bad", "bad", "bad", "good"] * 5)
    return ["--train_file", train, "--validation_file", dev, "--text_column_names", "body", "--label_column_name",
            "verdict"]  # fmt: skip


def test_a_run_for_each_seed_and_rate_and_a_group_for_each_rate(sweep: Sweep, files) -> None:
    sweep.stub = {"own-1": {"score": 0.8}, "own-2": {"score": 0.6}}
    done = sweep.run("--tasks", "own", *files, "--seeds", "1,2", "--learning_rates", "2e-5,3e-5,2e-5", "--", "--bf16")
    assert done.returncode == 0, done.stderr
    folders = sorted(path.parent.name for path in sweep.output.glob("own/*/all_results.json"))
    assert folders == [f"seed{seed}_learning_rate{rate}" for seed in (1, 2) for rate in ("2e-5", "3e-5")]
    argv = json.loads((sweep.output / "own/seed2_learning_rate3e-5/attempts").read_text())["argv"]
    assert {"--text_column_names=body", "--label_column_name=verdict", "--learning_rate=3e-5", "--bf16"} <= set(argv)
    assert not [word for word in argv if word.startswith(("--task_name", "--fp16", "--num_train_epochs"))]
    groups = sweep.summary()["groups"]
    assert [(g["task"], g["chosen"]["learning_rate"], g["runs"]) for g in groups] == [
        ("own", "2e-5", 2),
        ("own", "3e-5", 2),
    ]
    assert "own learning_rate=2e-5" in done.stdout and "own learning_rate=3e-5" in done.stdout
    assert (sweep.output / "report.html").is_file()


def test_the_choice_of_columns_and_the_majority_are_shown_first(sweep: Sweep, files) -> None:
    done = sweep.run(*files, "--seeds", "1", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "validation: 20 rows; always the most frequent class: accuracy 75.00" in done.stdout
    assert "text 'body'" in done.stdout and "'verdict'" in done.stdout and "2 classes" in done.stdout
    assert "to start: own seed 1" in done.stdout and not sweep.output.exists()


def test_finished_runs_stay_and_changed_data_is_refused(sweep: Sweep, files) -> None:
    assert sweep.run(*files, "--seeds", "1").returncode == 0
    done = sweep.run(*files, "--seeds", "1,2")
    assert done.returncode == 0 and "1 runs are already done; 1 to do" in done.stdout
    with Path(files[1]).open("a") as file:
        file.write("one more text,bad\n")
    done = sweep.run(*files, "--seeds", "1,2")
    assert done.returncode == 2 and "the texts or labels of the data have changed since" in done.stderr


def test_scores_have_the_metrics_of_a_regression(sweep: Sweep, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [at / 4 for at in range(24)])
    own = ["--train_file", train, "--validation_split_percentage", "25", "--text_column_names", "body",
           "--label_column_name", "verdict", "--seeds", "1"]  # fmt: skip
    done = sweep.run(*own, "--expect", "own.spearmanr>=0.4")
    assert done.returncode == 0, done.stderr
    assert sweep.group("own")["metric"] == "spearmanr" and "each seed holds out different rows" in done.stdout
    assert "most frequent class" not in done.stdout
    done = sweep.run(*own, "--expect", "own.spearmanr>=0.9")
    assert done.returncode == 8 and "--expect own.spearmanr>=0.9: missed" in done.stderr
    done = sweep.run(*own, "--expect", "own.accuracy>=0.4")
    assert done.returncode == 2 and "unknown metric 'accuracy'" in done.stderr and "pearson" in done.stderr


def test_label_maps_dropped_rows_and_switches_are_handed_on(sweep: Sweep, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", ["0", "1", "-", "0"] * 6, source="web")
    done = sweep.run(
        "--tasks", "own", "--train_file", train, "--validation_split_percentage=20", "--text_column_names", "body",
        "--label_column_name", "verdict", "--label_map", "0=neg", "1=pos", "--drop_rows", "verdict=-",
        "--drop_broken_rows", "--seeds", "7", "--", "--data_seed", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "most frequent class: accuracy" in done.stdout and "holds out different rows" not in done.stdout
    argv = sweep.attempts("own", 7)[0]["argv"]
    assert {"--label_map=0=neg,1=pos", "--drop_rows=verdict=-", "--drop_broken_rows=true"} <= set(argv)


def test_a_search_goes_over_own_data_too(sweep: Sweep, files) -> None:
    pytest.importorskip("optuna")
    done = sweep.run(*files, "--seeds", "1", "--search", "2", "--space", "learning_rate=1e-5:5e-5")
    assert done.returncode == 0, done.stderr
    best = json.loads((sweep.output / "best_own.json").read_text())
    assert best["train_file"] == files[1] and best["label_column_name"] == "verdict"
    assert set(best) <= set(FLAGS)
    assert "best of 2 trials, own" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tasks", "own"], "--tasks own needs --train_file or --dataset_name"),
        (["--tasks", "own,mrpc", "--train_file", "x.csv"], "--train_file is for own data"),
        (["--tasks", "own,mrpc"], "own cannot be combined"),
        (
            ["--tasks", "rte", "--label_map", "0=a"],
            "--label_map is for own data: it needs --tasks own, not --tasks rte",
        ),
        (["--tasks", "own", "--sample", "--train_file", "x.csv"], "--tasks own and --sample exclude each other"),
        (["--train_file", "x.csv", "--model", ""], "needs --model"),
        (["--train_file", "x.csv", "--recipe", "stable"], "--recipe stable has settings for GLUE tasks only"),
        (["--train_file", "x.csv"], "--do_eval needs --validation_file"),
        (["--tasks", "onw"], "Did you mean own?"),
        (["--train_file", "x.csv", "--", "--train_file", "y.csv"], "--train_file cannot follow --"),
    ],
)
def test_mistakes_are_told_before_anything_starts(sweep: Sweep, flags: list[str], says: str) -> None:
    done = sweep.run(*flags)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not sweep.output.exists()


def test_a_broken_file_stops_the_sweep_once(sweep: Sweep, files, tmp_path: Path) -> None:
    files[3] = write(tmp_path / "dev.csv", ["bad", "gOOd ", ""])
    done = sweep.run(*files)
    assert done.returncode == DataError.exit_code and "dev.csv" in done.stderr and not sweep.output.exists()


def test_the_data_may_be_named_behind_the_dashes(files) -> None:
    flags = ("--model_name_or_path=m", "--output_dir=o", "--do_train", "--do_eval", *files)
    own = read_own_data(flags)
    assert (own.task.name, own.task.labels, own.task.columns) == ("own", ("bad", "good"), ("body",))
    assert own.sha256.keys() == {"train", "validation"}


def test_own_is_a_task_of_the_sweep_alone() -> None:
    assert [task.name for task in tasks_of("own")] == ["own"]
    with pytest.raises(UsageError, match="Choices: .*, own"):
        tasks_of("ownn")
    assert set(DATA_FLAGS) <= set(FLAGS)
    run = SweepRun(tasks_of("own")[0], 3, {"learning_rate": "0.00002"}, Path("x"), ())
    assert run.name == "own seed 3, learning_rate 2e-05"


def test_several_labels_a_row_have_their_own_metrics(tmp_path: Path) -> None:
    labels = ["a|b", "b", "a|c", "c"] * 6
    flags = ("--model_name_or_path=m", "--output_dir=o", "--do_train", "--do_eval", "--text_column_names=body",
             "--label_column_name=verdict", "--label_delimiter=|", "--problem_type=multi_label_classification",
             "--train_file", write(tmp_path / "t.csv", labels),
             "--validation_file", write(tmp_path / "v.csv", labels))  # fmt: skip
    own = read_own_data(flags)
    assert own.task.is_multi_label and own.task.labels == ("a", "b", "c")
    assert any(f"always the best set of labels: {own.task.headline}" in line for line in own.lines)


@dataclass
class FinishedRun:
    """As much of a run as the mean over seeds needs."""

    chosen: dict[str, str]
    found: dict[str, float] | None
    trial: int | None = None

    def results(self) -> dict[str, float] | None:
        return self.found


def test_the_best_setting_is_the_lowest_where_low_is_good() -> None:
    runs = [
        FinishedRun({"learning_rate": rate}, {"eval_loss": loss, "eval_f1_macro": 1 - loss})
        for rate, losses in (("1e-5", (0.5, 0.7)), ("2e-5", (0.3, 0.4)))
        for loss in losses
    ]
    assert best_mean(runs, "eval_loss", is_low=True) == pytest.approx(0.35)
    assert best_mean(runs, "eval_f1_macro") == pytest.approx(0.65)
    runs[-1].found = None
    assert best_mean(runs, "eval_loss", is_low=True) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("bound", "is_upper"), [("own.loss<=0.4", True), ("own.loss<0.4", True), ("own.f1>0.4", False)]
)
def test_the_sign_of_a_bound_says_what_is_good(bound: str, is_upper: bool) -> None:
    assert read_expectations(bound, None, ["loss", "f1"])[0].is_upper is is_upper


@pytest.mark.parametrize(
    ("name", "headline"), [("f1_macro", "f1_macro"), ("matthews_correlation",) * 2, ("loss", "accuracy")]
)
def test_the_metric_of_a_sweep_is_that_of_its_runs(files, name: str, headline: str) -> None:
    flags = ("--model_name_or_path=m", "--output_dir=o", "--do_train", "--do_eval", *files, f"--metric_name={name}")
    own = read_own_data(flags)
    assert own.task.headline == headline
    assert any(f"always the most frequent class: {headline}" in line for line in own.lines)
    assert any("the headline metric is still" in line for line in own.lines) == (name == "loss")
