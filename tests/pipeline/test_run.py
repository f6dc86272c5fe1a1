"""run_glue.py as a user runs it: exit codes, what is imported, locks, signals, two ranks, and reuse of the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from free_port import free_port
from safetensors.torch import load_file
from tiny_run import (
    REPOSITORY,
    WIDTH,
    arguments,
    changed,
    fit,
    flags_of,
    losses,
    make_model,
    results_of,
    start,
)

from bert_glue.errors import CheckpointError
from bert_glue.pipeline import run as pipeline_run
from bert_glue.storage import checkpoint
from bert_glue.storage.lock import FolderLock


@pytest.fixture(autouse=True)
def signals():
    """A run in process takes SIGTERM and SIGINT; pytest wants them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def imported_by(*argv: str) -> tuple[int, set[str], str]:
    """Exit code, loaded modules and stderr of run_glue.py."""
    code = (
        "import sys, run_glue\n"
        f"code = run_glue.main({list(argv)!r})\n"
        "print('MODULES', *sorted({m.partition('.')[0] for m in sys.modules}))\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    return done.returncode, set(done.stdout.rpartition("MODULES ")[2].split()), done.stderr


HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "sklearn", "matplotlib"}


def test_help_imports_nothing_heavy():
    code, modules, _ = imported_by("--help")
    assert code == 0 and "bert_glue" in modules and not modules & HEAVY


def test_a_usage_error_imports_nothing_heavy_and_is_one_line():
    code, modules, errors = imported_by("--sample", "--task_name", "mrpcc", "--do_train", "--output_dir", "x")
    assert code == 2 and "bert_glue" in modules and not modules & HEAVY
    assert len(errors.splitlines()) == 1 and "mrpc" in errors and errors.startswith("error: ")


def main(args, capsys) -> tuple[int, str]:
    """run_glue.py in this process."""
    import run_glue

    code = run_glue.main(flags_of(args))
    return code, capsys.readouterr().err


def test_broken_data_is_exit_code_3_with_file_and_line(tmp_path, capsys):
    args = arguments(tmp_path)
    path = Path(args.train_file)
    path.write_text(path.read_text() + "a,b,yes,too many\n")
    code, errors = main(args, capsys)
    assert code == 3
    assert f"{path}:31" in errors and errors.startswith("error: ")


@pytest.mark.parametrize("flag", ["model_name_or_path", "config_name", "tokenizer_name"])
def test_an_absent_model_is_exit_code_4(tmp_path, capsys, flag):
    absent = str(tmp_path / "absent")
    code, errors = main(arguments(tmp_path, **{flag: absent}), capsys)
    assert code == 4 and f"--{flag} {absent}: there is no such folder" in errors


def test_numbers_that_leave_the_finite_are_exit_code_5(tmp_path, capsys):
    bad = {"bert.pooler.dense.bias": np.full(WIDTH, np.nan, np.float32)}
    model = str(make_model(tmp_path / "bad", changes=bad))
    args = arguments(tmp_path, model_name_or_path=model)
    code, errors = main(args, capsys)
    assert code == 5 and "not finite" in errors
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path, capsys):
    args = arguments(tmp_path, learning_rate=3e38, max_steps=1, weight_decay=1.0)
    code, errors = main(args, capsys)
    assert code == 5 and "weights" in errors
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path, capsys):
    args = arguments(tmp_path, max_steps=1)
    with FolderLock(Path(args.output_dir)):
        code, errors = main(args, capsys)
        assert code == 6
        assert f"process {os.getpid()}" in errors and args.output_dir in errors
        assert [p.name for p in Path(args.output_dir).iterdir()] == [".lock"]
    assert main(args, capsys)[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_exit_code_6(tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    code, errors = main(arguments(tmp_path, output_dir=str(tmp_path / "closed" / "out")), capsys)
    assert code == 6 and "cannot be written" in errors


def test_training_goes_on_in_the_folder_of_the_model(tmp_path, capsys):
    args = arguments(tmp_path, max_steps=1)
    assert main(args, capsys)[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    code, errors = main(changed(args, model_name_or_path=args.output_dir), capsys)
    assert code == 0, errors
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".writing")]


def test_a_file_in_place_of_the_folder_is_exit_code_6(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    code, errors = main(arguments(tmp_path, output_dir=str(tmp_path / "file")), capsys)
    assert code == 6 and "cannot be written" in errors
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "all_results.json"])
def test_a_disk_that_is_full_at_the_end_is_exit_code_6(tmp_path, capsys, monkeypatch, name):
    """The last files of a run: a plain line, and the model of an earlier run stays whole."""
    args = arguments(tmp_path, max_steps=1)
    assert main(args, capsys)[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    original = os.replace

    def full(source, target, **more):
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        return original(source, target, **more)

    monkeypatch.setattr(os, "replace", full)
    code, errors = main(changed(args, seed=1), capsys)
    assert code == 6 and "No space left" in errors and "Traceback" not in errors
    if name == "model.safetensors":
        assert (tmp_path / "out" / name).read_bytes() == before


def test_sigterm_saves_a_checkpoint_and_the_second_run_goes_on(tmp_path):
    """A second run in the folder is refused meanwhile; after the signal `auto` resumes and finishes."""
    args = arguments(tmp_path, num_train_epochs=100000.0)
    process = start(args)
    try:
        for line in process.stdout:
            if line.startswith("step=20 "):
                break
        with pytest.raises(CheckpointError, match=f"process {process.pid}"):
            FolderLock(tmp_path / "out").__enter__()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    (folder,) = checkpoint.list_checkpoints(tmp_path / "out")
    step = checkpoint.step_of(folder)
    assert step >= 20 and checkpoint.verify(folder) == ""
    assert not (tmp_path / "out" / "model.safetensors").exists()
    resumed = fit(changed(args, resume_from_checkpoint="auto", num_train_epochs=-1, max_steps=step + 2))
    assert [entry["step"] for entry in resumed.progress.history][-3:] == [step, step + 1, step + 2]


def test_the_saved_folder_works_in_transformers_and_gives_the_same_metric(tmp_path):
    args = arguments(tmp_path, do_eval=True, do_predict=True, num_train_epochs=3.0)
    assert pipeline_run.run(args) == 0
    trained = results_of(args)
    again = changed(
        args, do_train=False, model_name_or_path=args.output_dir, output_dir=str(tmp_path / "again")
    )  # fmt: skip
    assert pipeline_run.run(again) == 0
    evaluated = results_of(again)
    for key in ("eval_accuracy", "eval_f1", "eval_samples"):
        assert evaluated.get(key) == trained.get(key), key
    assert evaluated["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-6)
    assert "train_loss" not in evaluated and not (tmp_path / "again" / "model.safetensors").exists()
    predictions = [
        (folder / "predict_results_own.txt").read_text() for folder in (tmp_path / "out", tmp_path / "again")
    ]
    assert predictions[0] == predictions[1]

    from transformers import pipeline

    classify = pipeline("text-classification", model=args.output_dir, device="cpu")
    rows = [line.rsplit(",", 1)[0].split(",") for line in Path(args.test_file).read_text().splitlines()[1:]]
    found = [classify({"text": first, "text_pair": second})["label"] for first, second in rows]
    assert found == [line.split("\t")[1] for line in predictions[0].splitlines()[1:]]


def test_a_padded_run_saves_a_folder_that_works_too(tmp_path):
    args = arguments(tmp_path, do_eval=True, max_steps=3, padding="longest", bf16=True, fp16_opt_level="O2")
    assert pipeline_run.run(args) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}  # the masters
    again = changed(args, do_train=False, model_name_or_path=args.output_dir, output_dir=str(tmp_path / "again"))
    assert pipeline_run.run(again) == 0
    assert results_of(again)["eval_loss"] == pytest.approx(results_of(args)["eval_loss"], abs=1e-5)


def test_a_run_twice_gives_the_same_weights(tmp_path):
    model = str(make_model(tmp_path / "noisy", dropout=0.2))
    saved = []
    for name in ("one", "two", "three"):
        seed = 7 if name == "three" else 42
        args = arguments(
            tmp_path, model_name_or_path=model, max_steps=3, output_dir=str(tmp_path / name), seed=seed, data_seed=1
        )  # fmt: skip
        assert pipeline_run.run(args) == 0
        saved.append((tmp_path / name / "model.safetensors").read_bytes())
    assert saved[0] == saved[1] != saved[2]


@pytest.mark.slow
def test_two_ranks_are_one_with_the_same_global_batch(tmp_path):
    """29 rows: with batches of 4 x 2 the last has 5, which the ranks share as 3 and 2."""
    args = arguments(
        tmp_path, per_device_train_batch_size=4, max_steps=6, do_eval=True, skip_steps=2, adam_epsilon=1e-4,
        save_strategy="steps", save_steps=5,
    )  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    done = subprocess.run(
        [sys.executable, *launch, f"--master_port={free_port()}", str(REPOSITORY / "run_glue.py"), *flags_of(args)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone = fit(changed(args, per_device_train_batch_size=8, output_dir=str(tmp_path / "alone")))
    history = results_of(args, "trainer_state.json")["log_history"]
    assert [entry["loss"] for entry in history] == pytest.approx(losses(alone), rel=1e-5)
    assert [entry["grad_norm"] for entry in history] == pytest.approx(
        [entry["grad_norm"] for entry in alone.progress.history], rel=1e-4
    )
    results = results_of(args)
    assert results["world_size"] == 2 and results["eval_samples"] == 13
    assert results["train_samples_consumed"] == 8 + 8 + 8 + 5 + 8 + 8
    rate = results["train_samples_per_second"] * results["train_timed_seconds"]
    assert rate == pytest.approx(8 + 5 + 8 + 8)
    assert done.stdout.count("***** results *****") == 1
    manifest = json.loads((tmp_path / "out" / "checkpoint-5" / "manifest.json").read_text())
    assert {"random-0.safetensors", "random-1.safetensors"} <= set(manifest["files"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    from bert_glue.training.resume import whole_weights

    for name, value in whole_weights(alone).items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=0)


def test_sample_without_a_model_makes_one(tmp_path):
    args = arguments(
        tmp_path, sample=True, task_name="cola", do_eval=True, max_train_samples=64, max_eval_samples=20, max_steps=3
    )  # fmt: skip
    began = time.perf_counter()
    assert pipeline_run.run(args) == 0
    assert results_of(args)["model_name_or_path"].endswith("sample_bert")
    assert "eval_matthews_correlation" in results_of(args)
    assert time.perf_counter() - began < 60


def test_an_output_folder_deleted_in_mid_run_is_told(tmp_path, capsys, monkeypatch):
    import shutil

    from bert_glue.training import resume

    args, publish = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2), checkpoint.publish

    def publish_and_delete(folder, *given):
        publish(folder, *given)
        if folder.name == "checkpoint-2":
            shutil.rmtree(folder.parent)

    monkeypatch.setattr(resume.checkpoint, "publish", publish_and_delete)
    assert pipeline_run.run(args) == 0
    assert "was deleted or moved while the run was writing there" in capsys.readouterr().out
    assert (Path(args.output_dir) / "checkpoint-4").is_dir()
