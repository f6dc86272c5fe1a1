"""`bert-glue check`: what is compared with what, the verdicts and their exit codes, writing a baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bert_glue.__main__ import main
from bert_glue.check import FOLDER, Verdict, check, group_runs, read_entries
from bert_glue.results.perf import perf_of
from bert_glue.tasks import TASKS, TRAINABLE

RESULTS = {
    "task_name": "mrpc", "headline_metric": "f1", "model_name_or_path": "google-bert/bert-large-cased",
    "sample_data": False, "device": "npu:0", "device_name": "Ascend910B", "world_size": 1,
    "precision": "O2 fp16, loss scale 1024", "trained": None, "batches": "packed", "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1, "global_batch_size": 32, "learning_rate": 2e-5, "max_seq_length": 128,
    "seed": 1, "epoch": 5.0, "train_samples": 3668, "eval_samples": 408, "eval_f1": 0.9,
    "eval_f1_standard_error": 0.015, "train_samples_per_second": 300.0, "train_timed_steps": 10,
    "train_timed_seconds": 1.0,
    "seconds": {"import": 1.0, "compile": None, "data": 1.0, "tokenize": 1.0, "train": 9.0, "model": 1.0},
}  # fmt: skip


def run_folder(folder: Path, **changed) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "all_results.json").write_text(json.dumps({**RESULTS, **changed}))
    return folder


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    """Of three seeds: 0.88, 0.90, 0.92 at 300 samples/s."""
    for seed, value in enumerate((0.88, 0.90, 0.92)):
        run_folder(tmp_path / f"suite/{seed}", seed=seed, eval_f1=value)
    file = tmp_path / "made/baseline.json"
    assert main(["check", str(tmp_path / "suite"), "--write", str(file)]) == 0
    return file


def test_a_written_baseline_has_mean_error_and_speed(baseline: Path) -> None:
    (entry,) = read_entries(baseline)
    (found,) = entry["metrics"].items()
    # Deviation 0.02 over three runs, of one more run: times sqrt(1 + 1/3).
    assert found == ("f1", {"mean": pytest.approx(0.9), "error": pytest.approx(0.02 * (4 / 3) ** 0.5), "runs": 3})
    assert entry["samples_per_second"] == 300.0 and entry["source"] == "measured on Ascend910B"
    assert entry["setup"]["model"] == "bert-large-cased" and "seed" not in entry["setup"]


@pytest.mark.parametrize(
    ("changed", "code", "says"),
    [
        ({}, 0, "mrpc  f1         0.9000"),
        ({"eval_f1": 0.8539}, 0, "ok"),
        ({"eval_f1": 0.8537}, 8, "MISSED"),
        ({"eval_f1": 0.8537, "train_samples_per_second": 1.0}, 8, "SLOW"),
        ({"train_samples_per_second": 285.0}, 0, "285.0"),
        ({"train_samples_per_second": 284.9}, 9, "SLOW"),
        (
            {"device_name": "another", "train_samples_per_second": 1.0},
            0,
            "not compared: device_name 'Ascend910B', here",
        ),
        ({"precision": "O0 fp32", "device": "cpu", "eval_f1": 0.5}, 8, "not compared: precision"),
        ({"learning_rate": 5e-5, "eval_f1": 0.5}, 0, "not compared: learning_rate 2e-05, here 5e-05"),
        ({"epoch": 1.0, "device_name": "x"}, 2, "not compared: epoch 5.0, here 1.0"),
        ({"eval_f1": None}, 0, "not compared: a run does not have this score"),
        ({"task_name": "rte"}, 2, "not compared: the baseline does not have this task"),
        ({"train_samples_per_second": None, "train_samples_per_second_reason": "2 steps"}, 0, "not compared: 2 steps"),
    ],
)
def test_verdicts(tmp_path: Path, baseline: Path, capsys, changed: dict, code: int, says: str) -> None:
    run_folder(tmp_path / "run", **changed)
    capsys.readouterr()
    assert main(["check", str(tmp_path / "run"), "--baseline", str(baseline)]) == code
    out, err = capsys.readouterr()
    assert says in out
    assert bool(err) is (code != 0) and "Traceback" not in err


def test_runs_of_one_setup_are_compared_by_their_mean(tmp_path: Path, baseline: Path, capsys) -> None:
    for seed, value in enumerate((0.80, 0.95)):  # the first alone would be missed
        run_folder(tmp_path / f"two/{seed}", seed=seed, eval_f1=value)
    assert main(["check", str(tmp_path / "two"), "--baseline", str(baseline)]) == 0
    assert "0.8750 (mean of 2)" in capsys.readouterr().out


def test_entries_of_the_same_setup_are_replaced_others_kept(tmp_path: Path, baseline: Path, capsys) -> None:
    run_folder(tmp_path / "other", task_name="rte", headline_metric="accuracy", eval_accuracy=0.7)
    run_folder(tmp_path / "again", eval_f1=0.5)
    folders = [str(tmp_path / "other"), str(tmp_path / "again")]
    assert main(["check", *folders, "--write", str(baseline), "--scores_only", "--source", "a busy machine"]) == 0
    assert "2 new, 1 replaced, 0 kept" in capsys.readouterr().out
    entries = {entry["setup"]["task_name"]: entry for entry in read_entries(baseline)}
    assert entries["mrpc"]["metrics"]["f1"] == {"mean": 0.5, "error": 0.015, "runs": 1}
    assert entries["rte"]["samples_per_second"] is None and entries["rte"]["source"] == "a busy machine"


def test_runs_without_a_mistake_leave_room_for_one(tmp_path: Path) -> None:
    for seed in (1, 2):
        run_folder(tmp_path / f"perfect/{seed}", seed=seed, eval_f1=1.0, eval_f1_standard_error=0.0, eval_samples=200)
    assert main(["check", str(tmp_path / "perfect"), "--write", str(tmp_path / "b.json")]) == 0
    for value, code in ((0.99, 0), (0.98, 8)):
        folder = run_folder(tmp_path / f"one {value}", eval_f1=value, eval_samples=200)
        assert main(["check", str(folder), "--baseline", str(tmp_path / "b.json")]) == code


def test_the_cpu_baseline_is_of_every_sample_task() -> None:
    entries = {e["setup"]["task_name"]: e for e in read_entries(FOLDER / "cpu.json")}
    assert set(entries) == set(TRAINABLE)
    for name, entry in entries.items():
        keys = [TASKS[name].headline + suffix for _, suffix, _ in TASKS[name].evaluation]
        assert list(entry["metrics"]) == keys and entry["samples_per_second"] is None
        assert entry["setup"]["sample_data"] and entry["source"].startswith("measured")
        assert all(band["runs"] == 3 and band["error"] > 0 for band in entry["metrics"].values())


def test_a_run_that_learned_nothing_makes_no_baseline(tmp_path: Path, capsys) -> None:
    run_folder(tmp_path / "run", eval_collapsed="all 408 predictions are equivalent", seed=4)
    assert main(["check", str(tmp_path / "run"), "--write", str(tmp_path / "b.json")]) == 2
    assert "a run of mrpc learned nothing (seed 4)" in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()


def test_a_perf_json_is_a_baseline_too(tmp_path: Path, capsys) -> None:
    (tmp_path / "perf.json").write_text(json.dumps(perf_of(RESULTS)))
    flags = ["--baseline", str(tmp_path / "perf.json")]
    assert main(["check", str(run_folder(tmp_path / "run")), *flags]) == 0
    assert main(["check", str(run_folder(tmp_path / "slow", train_samples_per_second=200.0)), *flags]) == 9
    assert "mrpc: samples/s is 200.0, the baseline 300.0, at least 285.0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "entries": 3}', '{"format": 1, "entries": [{"setup": 1}]}',
    '{"format": 1, "entries": [{"setup": {}, "metrics": {"f1": {"mean": "x", "error": 0}}}]}',
    '{"format": 1, "entries": [{"setup": {}, "metrics": {"f1": 0.5}}]}'])  # fmt: skip
def test_what_is_no_baseline_is_one_line(tmp_path: Path, capsys, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    assert main(["check", str(run_folder(tmp_path / "run")), "--baseline", str(tmp_path / "b.json")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "b.json" in err


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["check", str(tmp_path / "empty")]) == 4
    (tmp_path / "empty/all_results.json").write_text('{"task_name": "mrpc"}')
    assert main(["check", str(tmp_path / "empty")]) == 4
    assert main(["check", str(run_folder(tmp_path / "gpu", device="cuda:0"))]) == 2
    assert "npu, but the runs are from cuda" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "gpu"), "--write", "/proc/none/b.json"]) == 6


def test_the_npu_baseline_holds_the_published_runs() -> None:
    entries = {(e["setup"]["task_name"], e["setup"]["world_size"]): e for e in read_entries(FOLDER / "npu.json")}
    assert len(entries) == 2 * len(TRAINABLE)
    for name in TRAINABLE:
        for ranks, column in ((1, 1), (8, 3)):
            entry, published = entries[name, ranks], TASKS[name].published[column]
            scores = [round(100 * band["mean"], 2) for band in entry["metrics"].values()]
            assert scores == list(published.scores) and entry["samples_per_second"] == published.samples_per_second
            assert entry["setup"]["epoch"] == published.epochs and entry["source"].startswith("published")
            assert all(0 < band["error"] < 0.06 and band["runs"] == 1 for band in entry["metrics"].values())


def test_a_published_run_is_held_against_its_entry(tmp_path: Path) -> None:
    (group,) = group_runs([run_folder(tmp_path / "run", eval_f1=0.86)])
    rows = check(group, read_entries(FOLDER / "npu.json"))
    assert [(row.figure, row.verdict) for row in rows] == [("f1", Verdict.MISSED), ("samples/s", Verdict.OK)]


@pytest.mark.parametrize("name", ["headline_metric", "device_name", "task_name", "device"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_results_without_a_name_are_one_line(tmp_path: Path, capsys, name: str, is_gone: bool) -> None:
    folder = run_folder(tmp_path / "run")
    results = json.loads((folder / "all_results.json").read_text()) | {name: None}
    if is_gone:
        del results[name]
    (folder / "all_results.json").write_text(json.dumps(results))
    code = main(["check", "--write", str(tmp_path / "b.json"), str(folder)])
    said = capsys.readouterr().err
    assert "Traceback" not in said and (code == 4 and said.count("\n") == 1 if name != "task_name" else code in (0, 4))
