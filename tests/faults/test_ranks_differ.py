"""Two real ranks with different settings, data, weights, code or libraries are refused before the first step."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import argv_of
from tiny_run import REPOSITORY, arguments, make_model

from bert_glue.launch.ranks import verdict

# What the second rank gets -> the name that the refusal has for it, and the exit code.
FLAGS = {
    "seed": (["--seed", "9"], "--seed", 2),
    "rate": (["--learning_rate", "1e-2"], "--learning_rate", 2),
    "batch": (["--per_device_train_batch_size", "3"], "--per_device_train_batch_size", 2),
    "bf16": (["--bf16"], "--bf16", 2),
    "dropout": (["--hidden_dropout_prob", "0.2"], "--hidden_dropout_prob", 2),
}
DATA = {
    "labels": lambda rows: [{**rows[0], "label": rows[1]["label"]}, *rows[1:]],
    "texts": lambda rows: [{**rows[0], "sentence1": "a dog sleeps"}, *rows[1:]],
    "order": lambda rows: [*rows[2:4], *rows[:2], *rows[4:]],
    "one row more": lambda rows: [*rows, rows[0]],
}
OTHERS = ("weights", "code", "library")


def words_of(kind: str, folder: Path) -> tuple[list[str], str, int]:
    """The flags that make the second rank differ, the name of the difference, and the exit code."""
    if kind in FLAGS:
        return FLAGS[kind]
    if kind in DATA:
        with (folder / "data" / "train.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        with (folder / "other.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(DATA[kind](rows))
        return ["--train_file", str(folder / "other.csv")], "data of train", 7
    if kind == "weights":
        import numpy as np

        changes = {"bert.pooler.dense.bias": np.full(16, 1e-6, np.float32)}
        return ["--model_name_or_path", str(make_model(folder / "other", changes=changes))], "starting weights", 7
    return [], {"code": "code of bert_glue", "library": "tokenizers"}[kind], 7


def argv(folder: Path) -> list[str]:
    return argv_of(arguments(folder, max_steps=2, ddp_timeout=60, per_device_train_batch_size=4))


@pytest.mark.parametrize("kind", [*FLAGS, *DATA, "weights"])
def test_two_ranks_that_differ_are_refused(server, tmp_path, kind):
    flags = argv(tmp_path)
    words, name, code = words_of(kind, tmp_path)
    jobs = server.start_each([flags, [*flags, *words]], tmp_path)
    assert [job.wait() for job in jobs] == [code, code], jobs[0].text() + jobs[1].text()
    for job in jobs:
        assert f"ranks differ in {name}: " in job.text() and "on rank 1" in job.text()
        assert "Traceback" not in job.text()
    assert not (tmp_path / "out" / "all_results.json").exists()


def test_two_ranks_that_are_alike_train(server, tmp_path):
    flags = argv(tmp_path)
    jobs = server.start_each([flags, [*flags, "--model_name_or_path", str(make_model(tmp_path / "copy"))]], tmp_path)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text() + jobs[1].text()


def second_rank(kind: str, folder: Path, words: list[str]) -> str:
    """A shell script that runs its arguments with python, and otherwise on the second rank."""
    root, change = REPOSITORY, ""
    if kind == "code":
        root = folder / "checkout"
        for name in ("bert_glue", "configs"):
            shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "run_glue.py", root)
        (root / "bert_glue" / "training" / "loop.py").open("a").write("# another version\n")
    if kind == "library":
        change = f"PYTHONPATH={folder / 'site'}"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(
            "import importlib.metadata as m\n"
            "real = m.version\n"
            "m.version = lambda name: '0.0.1' if name == 'tokenizers' else real(name)\n"
        )
    first = f'exec "{sys.executable}" "{REPOSITORY}/run_glue.py" "$@"'
    other = f'exec env {change} "{sys.executable}" "{root}/run_glue.py" "$@" {" ".join(words)}'
    return f"#!/bin/bash\nif [[ $RANK == 1 ]]; then {other}; fi\n{first}\n"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FLAGS, *DATA, *OTHERS])
def test_the_launcher_names_what_differs(tmp_path, kind):
    """Started as test/launch_ranks.sh does, by torch's elastic launcher."""
    flags = argv(tmp_path)
    words, name, code = words_of(kind, tmp_path)
    for folder in ("notes", "logs"):
        (tmp_path / folder).mkdir()
    script = tmp_path / "rank.sh"
    script.write_text(second_rank(kind, tmp_path, words))
    elastic = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=0",
               "--monitor-interval=0.1", "--standalone", "--local-addr=127.0.0.1", "--no-python"]  # fmt: skip
    rank = [sys.executable, "-P", f"{REPOSITORY}/bert_glue/launch/ranks.py", "rank", "notes", "logs"]
    log = tmp_path / "launcher.log"
    with log.open("wb") as out:
        done = subprocess.run(
            [*elastic, *rank, "bash", str(script), *flags],
            cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    found, lines = verdict(tmp_path / "notes", tmp_path / "logs", log, done.returncode, 0)
    logs = [log, *sorted((tmp_path / "logs").iterdir())]  # the first rank writes to its launcher
    said = "\n".join([*lines, *(file.read_text() for file in logs if file.is_file())])
    assert found == code, said
    assert f"ranks differ in {name}: " in said and "on rank 1" in said
    assert not (tmp_path / "out" / "all_results.json").exists()
