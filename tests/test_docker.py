"""The Dockerfiles as far as that goes without docker: what they copy and run is there. They were not built here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="from Python 3.11")
ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
KNOWN = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "ENTRYPOINT", "CMD"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, rest), continued lines joined, comments left out."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined if line.strip())]


def of(file: Path, name: str) -> list[str]:
    return [rest for found, rest in instructions(file) if found == name]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path through: everything is left out but what a line with ! names."""
    kept = [line[1:].strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    return any(Path(path.strip("/")).match(pattern) for pattern in kept)


def test_there_is_one_for_each_base():
    assert [file.stem for file in DOCKERFILES] == ["cpu", "cuda", "npu"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_what_it_copies_is_there_and_is_all_that_a_run_needs(file):
    assert {name for name, _ in instructions(file)} <= KNOWN
    copied = [source for rest in of(file, "COPY") for source in shlex.split(rest)[:-1]]
    assert not [path for path in copied if not (ROOT / path).exists() or not is_sent(path)]
    assert {"bert_glue/", "configs/", "test/", "run_glue.py", "pyproject.toml", "requirements.txt"} <= set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied)
    required = re.findall(r"-r (\S+)", " ".join(of(file, "RUN")))
    assert required and set(required) <= set(copied)
    for name in required:  # and what these name in turn
        named = re.findall(r"^-r (\S+)", (ROOT / name).read_text(), re.MULTILINE)  # relative to the file that names it
        assert {os.path.normpath(Path(name).parent / other) for other in named} <= set(copied)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_its_base_is_pinned_and_nothing_is_fetched_from_a_written_address(file):
    text = file.read_text(encoding="utf-8")
    assert "://" not in text and "latest" not in text and of(file, "FROM") == ["${BASE}"]
    (base,) = [rest for rest in of(file, "ARG") if rest.startswith("BASE")]
    assert re.fullmatch(r"BASE(=[\w/.-]+:\d[\w.-]*)?", base)
    arguments = {rest.partition("=")[0] for rest in of(file, "ARG")}
    assert set(re.findall(r"\$\{(\w+)", " ".join(of(file, "RUN")))) <= arguments


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_its_shell_lines_are_sound(file, tmp_path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    for rest in of(file, "RUN"):
        assert subprocess.run(["sh", "-n", "-c", rest]).returncode == 0
        if shellcheck.exists():
            script = tmp_path / "run.sh"
            script.write_text(f"#!/bin/sh\nTORCH_INDEX=${{TORCH_INDEX:-}}\n{rest}\n")
            done = subprocess.run([shellcheck, script], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_what_it_starts_exists(file):
    (entry,), (command,) = ([json.loads(rest) for rest in of(file, name)] for name in ("ENTRYPOINT", "CMD"))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    if entry[0] == "bash":
        text = (ROOT / entry[1]).read_text()
        assert 'exec bert-glue "$@"' in text and subprocess.run(["bash", "-n", ROOT / entry[1]]).returncode == 0
    else:
        assert entry[0] in scripts
    done = subprocess.run(
        [sys.executable, "-m", "bert_glue", *command, "--help"], cwd=ROOT, capture_output=True, timeout=60
    )
    assert done.returncode == 0


def test_the_copied_files_alone_train(tmp_path):
    """What stands in the image, in a folder of its own: the command of cpu.Dockerfile's head."""
    for rest in of(DOCKERFILES[0], "COPY"):
        *sources, target = shlex.split(rest)
        for source in sources:
            place = tmp_path / "image" / target / ("" if target == f"{source}" else Path(source).name)
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            place.parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / source, place)
    head = next(line for line in DOCKERFILES[0].read_text().splitlines() if line.startswith("# docker run"))
    words = head.partition("bert-glue:cpu ")[2].replace("/output/mrpc", str(tmp_path / "out")).split()
    done = subprocess.run(
        [sys.executable, "-m", "bert_glue", *words, "--max_steps", "3", "--use_cpu"], cwd=tmp_path / "image",
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/report.html").exists()


def test_the_npu_entry_reads_cann_s_environment_first(tmp_path):
    """With a stand-in for CANN and for the command."""
    image, bin_ = tmp_path / "image", tmp_path / "bin"
    for name in ("deploy/docker/npu_entry.sh", "test/env_npu.sh"):
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, image / name)
    (tmp_path / "home/Ascend/cann").mkdir(parents=True)
    (tmp_path / "home/Ascend/cann/set_env.sh").write_text("export CANN_WAS_READ=yes\n")
    bin_.mkdir()
    (bin_ / "bert-glue").write_text('#!/bin/sh\necho "$CANN_WAS_READ $TASK_QUEUE_ENABLE $*"\n')
    (bin_ / "bert-glue").chmod(0o755)
    done = subprocess.run(
        ["bash", image / "deploy/docker/npu_entry.sh", "doctor", "--json"], capture_output=True, text=True,
        env={"PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.stdout.split() == ["yes", "2", "doctor", "--json"], done.stderr
