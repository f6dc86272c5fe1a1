"""The READMEs and the pages beside them: both languages alike, and every command in them run here, as it stands there.

They run in a copy of the repository beside a tiny BERT under the names of the real ones, a hub on this machine, and
the small data that the commands name. What needs hardware is marked in the READMEs, and runs on a stand-in for it.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import loopback_hub
import pytest
from glue_folder import make_glue
from launch_stubs import clean_environment
from simulated_runs import SIMULATED

import run_glue
from bert_glue.data.hub_datasets import GLUE_NAME, GLUE_REVISION
from bert_glue.data.sample import make_tiny_bert
from bert_glue.tasks import get_task

ROOT = Path(__file__).parents[1]
# The pages whose commands are run, each in both languages.
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("running", "launchers", "outputs"))]
CHINESE = [page.with_suffix(".zh-CN.md") for page in PAGES]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def _commands(pages: list[Path]) -> dict[str, str]:
    """Each command of the pages' bash blocks, continued lines joined -> its needs by the comment above."""
    found, needs = {}, ""
    blocks = [block for page in pages for block in _blocks(page, "bash")]
    for line in "\n\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            needs = " ".join(re.findall(r"needs (?:an?|two|eight) \w+", line))
        elif not line.strip():
            needs = ""
        else:
            found[" ".join(line.split())] = needs
    return found


@pytest.mark.parametrize(("english", "chinese"), [*zip(PAGES, CHINESE, strict=True)], ids=lambda page: page.name)
def test_both_languages_show_the_same_commands_outputs_and_tables(english, chinese):
    for language in ("bash", "text"):
        assert _blocks(english, language) == _blocks(chinese, language)
    texts = [page.read_text(encoding="utf-8") for page in (english, chinese)]
    counts = [[text.count(mark) for mark in ("\n## ", "\n### ", "\n|", "\n- ")] for text in texts]
    assert counts[0] == counts[1]
    figures = [re.findall(r"^\|.*\d\.\d.*\|$", text, re.MULTILINE) for text in texts]
    numbers = [[re.findall(r"\d+\.\d+", line) for line in lines] for lines in figures]
    assert numbers[0] == numbers[1]


class Clone:
    """A copy of the repository, what the commands find in it, and the processes that run there."""

    def __init__(self, root: Path, hub: str):
        self.root = root
        shutil.copytree(ROOT / "test", root / "test", ignore=shutil.ignore_patterns("output"))
        for name in ("bert_glue", "configs"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in (*ROOT.glob("requirements*.txt"), ROOT / "run_glue.py"):
            shutil.copy(file, root)
        self.environment = clean_environment(
            HF_ENDPOINT=hub, HF_HOME=str(root / "hf"), HF_HUB_DISABLE_XET="1", NO_PROXY="*", OMP_NUM_THREADS="1",
            BERT_GLUE_CACHE=str(root / "cache"), CUDA_VISIBLE_DEVICES="",
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )  # fmt: skip
        for task in map(get_task, ("cola", "mrpc", "mnli", "ax")):
            make_glue(root / "glue", task, lambda split, task=task: task.rows[split] if "test" in split else 64)

    def start(self, command: str, *more: str, **settings: str) -> subprocess.Popen:
        """`command` with `more` of its own flags, before those behind --."""
        words = [self._place(word) for word in shlex.split(command)]
        at = words.index("--") if "--" in words else len(words)
        return subprocess.Popen(
            [*words[:at], *more, *words[at:]], cwd=self.root, env={**self.environment, **settings}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, *more: str, **settings: str) -> str:
        """Its output, when it has ended well."""
        return ended(self.start(command, *more, **settings))

    def _place(self, word: str) -> str:
        return word.replace("/data/glue", str(self.root / "glue"))

    def trained(self, *folders: str) -> None:
        """Runs that later commands name: the training command of docs/running.md, in few steps on the GLUE folder."""
        for folder in (self.root / name for name in folders if not (self.root / name).is_dir()):
            words = [*shlex.split(TRAINING)[2:], "--task_name", folder.name, "--output_dir", str(folder), "--use_cpu"]
            words += ["--data_path", str(self.root / "glue"), "--model_name_or_path", str(self.root / "tiny")]
            assert run_glue.main([*words, "--max_steps=2"]) == 0


def ended(process: subprocess.Popen, seconds: float = 400.0) -> str:
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out[-2000:] + err[-2000:]
    return out


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Iterator[Clone]:
    folder = tmp_path_factory.mktemp("readme")
    make_tiny_bert(folder / "clone/tiny")
    names, configs = ("cola", "mrpc", "rte", "wnli", "mnli", "ax"), {}
    for task in map(get_task, names):
        labels = list(range(task.num_labels))
        splits = {split: [-1] * task.rows[split] if "test" in split else (labels * 64)[:66] for split in task.splits}
        configs[task.name] = (task.columns, task.labels, splits)
    loopback_hub.make_repository(folder / "hub", configs)
    models = {f"google-bert/bert-{size}-cased": folder / "clone/tiny" for size in ("base", "large")}
    with loopback_hub.serve(folder / "hub", GLUE_NAME, GLUE_REVISION, models) as server:
        yield Clone(folder / "clone", server.url)


LAUNCHERS, OUTPUTS = PAGES[2:]
NOTE = " (sample data, not GLUE)"


def launched(clone: Clone, out: str, folder: str) -> dict:
    """Results of a launcher that ended as docs/launchers.md shows and left what it names."""
    shown = [line.partition(" : ")[0] for line in _blocks(LAUNCHERS, "text")[0].splitlines()]
    last = [line for line in out.splitlines() if not line.startswith("Performance :")][-4:]
    assert [line.partition(" : ")[0] for line in last] == shown, out[-2000:]
    place = clone.root / folder
    results = json.loads((place / "all_results.json").read_text())
    assert all(line.endswith(NOTE) == results["sample_data"] for line in last)
    assert list(place.glob("Bert_*.log")) and (place / "report.html").is_file()
    return results


def installation(clone: Clone, command: str) -> None:
    """Installs from the packages of this Python, which pip finds on PYTHONPATH, without an index."""
    settings = {"PIP_NO_INDEX": "1", "PYTHONPATH": sysconfig.get_path("purelib")}
    out = clone.run(shlex.join(["bash", "-c", command]), **settings)
    assert (clone.root / ".venv/bin/python").is_file() and "already satisfied: torch" in out
    shutil.rmtree(clone.root / ".venv")


def sample(clone: Clone, command: str) -> None:
    """The line of the score is that of the README but for its figures."""
    out = clone.run(command)
    (shown,) = _blocks(PAGES[0], "text")
    assert re.sub(r"\d+", "#", shown) in re.sub(r"\d+", "#", out)
    results = launched(clone, out, "test/output/mrpc/tiny_1p_acc_sample")
    assert results["sample_data"] and results["eval_f1"] > 0.85


def from_the_hub(clone: Clone, command: str) -> None:
    results = launched(clone, clone.run(command), "test/output/mrpc/bert-large-cased_1p_acc")
    assert results["eval_samples"] == 66 and results["model_name_or_path"] == "google-bert/bert-large-cased"


def from_the_glue_folder(clone: Clone, command: str) -> None:
    shutil.copytree(clone.root / "tiny", clone.root / "bert-large-cased")
    results = launched(clone, clone.run(command), "test/output/mrpc/bert-large-cased_1p_acc")
    shutil.rmtree(clone.root / "bert-large-cased")  # other launchers would take it before the hub's
    assert results["eval_samples"] == 64 and results["model_name_or_path"] == "./bert-large-cased"


def on_an_npu(clone: Clone, command: str) -> None:
    """The simulated one."""
    settings = {"PYTHONPATH": str(SIMULATED), "SIMULATED_NPU_DEVICES": "4"}
    results = launched(clone, clone.run(command, **settings), "test/output/rte/bert-large-cased_1p_acc")
    assert (results["device"], results["precision"], results["seed"]) == ("npu:3", "O1 fp16, loss scale 1024", 7)


def training(clone: Clone, command: str) -> None:
    """All the files that docs/outputs.md names."""
    clone.run(command)
    named = OUTPUTS.read_text(encoding="utf-8").partition("## What a run leaves")[2].partition("the model itself")[0]
    files = [name.replace("<task>", "mrpc") for name in re.findall(r"`([\w<>]+\.\w+)`", named)]
    assert len(files) == 10 and not [name for name in files if not (clone.root / "output/mrpc" / name).is_file()]
    from transformers import pipeline

    answer = pipeline("text-classification", str(clone.root / "output/mrpc"))({"text": "a", "text_pair": "b"})
    assert answer["label"] in ("equivalent", "not_equivalent")


def own_rows(clone: Clone, command: str) -> None:
    """A csv of one's own."""
    rows = [f"the {food} was {word},{label}" for word, label in WORDS for food in ("soup", "tea", "rice")] * 10
    (clone.root / "reviews.csv").write_text("\n".join(["text,label", *rows, ""]))
    clone.run(command)
    results = json.loads((clone.root / "output/reviews/all_results.json").read_text())
    assert results["eval_samples"] == 12 and (clone.root / "output/reviews/report.html").is_file()


def own_labels(clone: Clone, command: str) -> None:
    """After the command above it on the page."""
    if not (clone.root / "output/reviews").is_dir():
        own_rows(clone, next(command for command in _commands(PAGES) if "reviews.csv" in command))
    (clone.root / "unlabelled.csv").write_text("text\nthe bread was good\nthe beer was bad\n")
    clone.run(command)
    with (clone.root / "labelled.csv").open(newline="") as file:
        assert {row["prediction"] for row in csv.DictReader(file)} <= {"pos", "neg"}


def on_two_ranks(clone: Clone, command: str) -> None:
    """As the comment says: two processes on the CPU."""
    results = launched(
        clone, clone.run(command, "--nproc=2", "--device=cpu"), "test/output/mrpc/bert-large-cased_2p_acc"
    )
    assert (results["world_size"], results["epoch"]) == (2, 5.0)


def performance(clone: Clone, command: str) -> None:
    """An earlier run first: its perf.json, with half the speed, so that the load of the machine does not matter."""
    two = ("--nproc=2", "--device=cpu")
    clone.run(command.partition(" --baseline")[0], *two)
    perf = json.loads((clone.root / "test/output/wnli/bert-large-cased_2p_perf/perf.json").read_text())
    perf["samples_per_second"] /= 2
    (clone.root / "perf.json").write_text(json.dumps(perf))
    out = clone.run(command, *two)
    assert (
        "x the baseline's" in out and launched(clone, out, "test/output/wnli/bert-large-cased_2p_perf")["epoch"] == 80.0
    )


def on_two_hosts(clone: Clone, command: str) -> None:
    """Both on this machine, two processes in all."""
    here = command.replace("HOST", "127.0.0.1")
    hosts = [here, here.replace("--node_rank=0", "--node_rank=1")]
    children = [clone.start(host, "--nproc=1", "--device=cpu", "--master_port=29713") for host in hosts]
    out, _ = [ended(child) for child in children]
    assert launched(clone, out, "SHARED")["world_size"] == 2


def sweep(clone: Clone, command: str) -> None:
    out = clone.run(command)
    groups = json.loads((clone.root / "test/output/all_tasks/summary.json").read_text())["groups"]
    assert {group["task"]: group["runs"] for group in groups} == {
        "cola": 5,
        "mrpc": 5,
        "rte": 5,
    } and "summary.csv" in out


def submission(clone: Clone, command: str) -> None:
    clone.trained("output/cola", "output/mrpc", "output/mnli")
    out = clone.run(command)
    with zipfile.ZipFile(clone.root / "submission.zip") as archive:
        lines = {name: archive.read(name).decode().count("\n") - 1 for name in archive.namelist()}
    assert len(lines) == 11 and lines["MNLI-mm.tsv"] == 9847 and lines["AX.tsv"] == 1104 and "every row is" in out


def prediction(clone: Clone, command: str) -> None:
    clone.trained("output/mrpc")
    (clone.root / "new.csv").write_text('sentence1,sentence2\n"a, b",c\nd,e\n')
    (clone.root / "labelled.csv").unlink(missing_ok=True)  # of another command of the pages
    clone.run(command)
    with (clone.root / "labelled.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["sentence1"] for row in rows] == ["a, b", "d"] and {row["prediction"] for row in rows} <= LABELS
    assert all(sum(float(row[f"probability_{label}"]) for label in LABELS) == pytest.approx(1) for row in rows)


def report(clone: Clone, command: str) -> None:
    clone.trained("output/cola", "output/mrpc")
    assert clone.run(command) == "wrote report.html\n"
    assert "Runs: 2, tasks: 2" in (clone.root / "report.html").read_text()


def onnx(clone: Clone, command: str) -> None:
    pytest.importorskip("onnx")
    clone.trained("output/mrpc")
    out = clone.run(command)
    assert (clone.root / "output/mrpc/model.onnx").is_file() and "atc" in out and "validation rows of the run" in out


def onnx_variants(clone: Clone, command: str) -> None:
    onnx(clone, command)
    assert all((clone.root / f"output/mrpc/model.{kind}.onnx").is_file() for kind in ("fp16", "int8"))


def gate(clone: Clone, command: str) -> None:
    """Of this very repository, with one file of tests in place of all."""
    done = subprocess.run(
        [*shlex.split(command), "tests/data/test_packing.py"],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout[-2000:] + done.stderr[-2000:]


LABELS = {"equivalent", "not_equivalent"}
WORDS = (("good", "pos"), ("fine", "pos"), ("bad", "neg"), ("stale", "neg"))
TRAINING = next(command for command in _commands(PAGES) if "--recipe stable" in command)
# beginning of a command -> how it is run here; slow: more than the gate has time for
FAST: dict[str, Callable[[Clone, str], None]] = {
    "bash test/train_full_1p.sh --TASK=mrpc --data_path": from_the_glue_folder,
    "python3 -m venv": installation,
    "python run_glue.py --model_name_or_path google-bert/bert-base-cased --task_name": training,
    "python run_glue.py --model_name_or_path google-bert/bert-base-cased --train_file": own_rows,
    "python -m bert_glue.predict --model output/reviews": own_labels,
    "python -m bert_glue.submission": submission,
    "python -m bert_glue.predict --model output/mrpc": prediction,
    "python -m bert_glue.report": report,
    "python -m bert_glue.export output/mrpc --onnx": onnx,
}
SLOW: dict[str, Callable[[Clone, str], None]] = {
    "python -m bert_glue.export output/mrpc --onnx --fp16": onnx_variants,
    "bash test/train_full_1p.sh --TASK=mrpc --sample": sample,
    "bash test/run_tests.sh": gate,
    "bash test/train_full_1p.sh --TASK=mrpc": from_the_hub,
    "bash test/train_full_1p.sh --TASK=rte --device=npu:3": on_an_npu,
    "bash test/train_full_8p.sh": on_two_ranks,
    "bash test/train_performance_8p_wnli.sh": performance,
    "bash test/train_multinode.sh": on_two_hosts,
    "bash test/train_all_tasks.sh": sweep,
}
STAND_INS = {on_an_npu: "needs an NPU", on_two_hosts: "needs two hosts"} | dict.fromkeys(
    (on_two_ranks, performance), "needs eight devices"
)


def way_of(command: str) -> str:
    """The longest beginning that is known."""
    return max((begin for begin in {**FAST, **SLOW} if command.startswith(begin)), key=len, default="")


def test_every_command_is_run_once_and_what_needs_hardware_is_marked():
    """A command that is new on a page has no way to be run here, and fails."""
    for pages in (PAGES, CHINESE):
        commands = _commands(pages)
        assert sorted(map(way_of, commands)) == sorted({**FAST, **SLOW})
        for command, needs in commands.items():
            assert STAND_INS.get({**FAST, **SLOW}[way_of(command)], "") == needs, command


ALL = [pytest.param(c, marks=pytest.mark.slow if way_of(c) in SLOW else ()) for c in _commands(PAGES)]


@pytest.mark.parametrize("command", ALL)
def test_it_runs(clone, command):
    {**FAST, **SLOW}[way_of(command)](clone, command)
