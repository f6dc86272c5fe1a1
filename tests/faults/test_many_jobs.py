"""Many jobs at once: one cold cache, caches and homes that cannot be written, and one output folder."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from jobs import argv_of
from tiny_run import arguments, changed, make_data, make_model

from bert_glue.storage.files import file_hash


def settings(folder: Path, **changes):
    model = make_model(folder / "model", dropout=0.1)
    data = make_data(folder / "data", train=200, validation=40)
    return arguments(
        folder, model_name_or_path=str(model), max_steps=6, do_eval=True, do_predict=True, **data, **changes
    )


@pytest.mark.parametrize("jobs", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_jobs_at_once_on_one_cold_cache(server, tmp_path, report, jobs):
    args, cache = settings(tmp_path), str(tmp_path / "cache")
    started = [
        server.start(argv_of(changed(args, output_dir=str(tmp_path / f"out-{at}"))), tmp_path, BERT_GLUE_CACHE=cache)
        for at in range(jobs)
    ]
    for job in started:
        assert job.wait() == 0, job.text()[-2000:]
        assert "not cached" not in job.text() and "Traceback" not in job.text()
    hashes = {file_hash(tmp_path / f"out-{at}" / "model.safetensors") for at in range(jobs)}
    predictions = {(tmp_path / f"out-{at}" / "predict_results_own.txt").read_text() for at in range(jobs)}
    assert len(hashes) == len(predictions) == 1
    tables = list((tmp_path / "cache" / "tokens").iterdir())
    assert len(tables) == 3 and not [path for path in tables if path.name.startswith(".")]
    late = server.start(argv_of(args), tmp_path, BERT_GLUE_CACHE=cache)
    assert late.wait() == 0 and late.text().count(", cached") == 3
    report(f"{jobs} jobs at once on one cold cache: the same weights and predictions, 3 tables, none half")


@pytest.mark.parametrize("what", ["cache", "home"])
@pytest.mark.parametrize("is_warm", [False, True])
def test_a_folder_that_cannot_be_written(server, tmp_path, report, what, is_warm):
    """The results equal those of a run that could write, and the log lists what could not be saved."""
    args = settings(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir()
    where = {"cache": "BERT_GLUE_CACHE", "home": "HOME"}[what]
    environment = {"BERT_GLUE_CACHE": "", "XDG_CACHE_HOME": "", "HF_HOME": str(closed / "hf"), where: str(closed)}
    free = changed(args, output_dir=str(tmp_path / "free"))
    assert server.start(argv_of(free), tmp_path, **(environment if is_warm else {})).wait() == 0
    for path in (closed, *closed.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    job = server.start(argv_of(args), tmp_path, is_plain=True, **environment)
    assert job.wait() == 0, job.text()[-2000:]
    assert job.text().count(", cached" if is_warm else ", made (not cached: Permission denied)") == 3, job.text()
    assert file_hash(tmp_path / "out" / "model.safetensors") == file_hash(tmp_path / "free" / "model.safetensors")
    report(f"{what} that cannot be written, {'warm' if is_warm else 'cold'}: exit 0, same weights, said in the log")


def test_two_jobs_in_one_output_folder(server, tmp_path, report):
    """The second is refused; the first, held up meanwhile, ends as if alone."""
    args = settings(tmp_path, save_strategy="steps", save_steps=2)
    alone = changed(args, output_dir=str(tmp_path / "alone"))
    assert server.start(argv_of(alone), tmp_path).wait() == 0
    first = server.start(argv_of(args), tmp_path)
    while not (tmp_path / "out" / ".lock").is_file() or not (tmp_path / "out" / ".lock").read_text():
        time.sleep(0.001)
    first.kill(signal.SIGSTOP)  # so that it does not end before the second one came
    for _ in range(5):
        second = server.start(argv_of(args), tmp_path)
        assert second.wait() == 6
        assert f"another run (process {first.pid} on " in second.text() and "Traceback" not in second.text()
    first.kill(signal.SIGCONT)
    assert first.wait() == 0, first.text()[-2000:]
    assert file_hash(tmp_path / "out" / "model.safetensors") == file_hash(tmp_path / "alone" / "model.safetensors")
    report("a second job in one output folder: refused 5 times with exit 6, the first ended as if alone")
