"""Which installed versions are enough, which are warned about, and what is to be installed beside them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from bert_glue.doctor.checks import REPOSITORY
from bert_glue.errors import MachineError
from bert_glue.launch import requirements
from bert_glue.launch.requirements import RANGES, Gap, command, gap, main, refuse_unusable, specs, stack_warnings


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name to version of what counts as installed."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(requirements, "installed_version", versions.get)
    return versions


@pytest.fixture
def wanted(tmp_path: Path) -> Path:
    file = tmp_path / "requirements.txt"
    file.write_text("# a comment\ntorch==2.13.0\ntransformers==5.23.0\ndatasets==5.2.0\nscipy==1.17.1\n")
    return file


@pytest.mark.parametrize("version", ["2.4.0", "2.6.0", "2.7.1", "2.13.0+cpu", "2.7.1.post2", "3.0.0a1"])
def test_a_torch_that_can_work_is_enough(installed: dict[str, str], version: str) -> None:
    installed["torch"] = version
    assert gap("torch") is None


def test_a_torch_that_cannot_work_is_refused_with_the_reason(installed: dict[str, str]) -> None:
    installed["torch"] = "2.1.0"
    assert str(gap("torch")) == "torch 2.1.0 (needs 2.4: older ones lack torch.library.custom_op)"
    with pytest.raises(MachineError, match=r"torch 2\.1\.0 is too old: this program needs 2\.4"):
        refuse_unusable()


def test_no_other_version_is_refused(installed: dict[str, str]) -> None:
    installed.update(torch="2.6.0", transformers="4.20.1", datasets="1.0", accelerate="9.9", scipy="0.1")
    assert [gap(name) for name in installed] == [None] * 5
    refuse_unusable()
    assert gap("evaluate") == Gap("evaluate", None, "")


@pytest.mark.parametrize(
    ("name", "version", "is_tested"),
    [
        ("transformers", "4.44.0", True), ("transformers", "4.57.6", True), ("transformers", "5.99.0", True),
        ("transformers", "4.43.4", False), ("transformers", "6.0.0.dev0", False),
        ("torch", "2.14.1", True), ("torch", "2.15.0", False), ("torch", "2.5.1", False),
        ("huggingface_hub", "0.26.0", True), ("huggingface_hub", "0.25.2", False), ("accelerate", "1.15.0", True),
    ],
)  # fmt: skip
def test_versions_outside_the_tested_range_are_warned_about(installed, name, version, is_tested) -> None:
    installed[name] = version
    told = [line for line in stack_warnings() if not line.startswith("python")]
    line = f"{name} {version} is outside the tested range {RANGES[name]}; the run continues"
    assert told == ([] if is_tested else [line])


def test_beside_a_torch_only_what_is_missing_is_installed(installed: dict[str, str], wanted: Path) -> None:
    installed.update(torch="2.7.1+cpu", torch_npu="2.7.1.post2", transformers="4.57.1")
    assert specs([wanted]) == ["datasets>=3.0", "scipy", "torch==2.7.1+cpu", "torch_npu==2.7.1.post2"]
    assert command([wanted]).endswith("-m pip install 'datasets>=3.0' scipy torch==2.7.1+cpu torch_npu==2.7.1.post2")
    installed.update(datasets="4.0.0", scipy="1.10")
    assert specs([wanted]) == []


def test_without_a_torch_the_tested_set_is_installed(installed, wanted, monkeypatch) -> None:
    installed["scipy"] = "1.17.1"
    monkeypatch.setattr(sys, "version_info", (3, 11, 4))
    assert shlex.split(command([wanted]))[1:] == ["-m", "pip", "install", "-r", str(wanted)]
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))  # for which the tested set has no versions
    assert shlex.split(command([wanted]))[4:] == ["torch>=2.6", "transformers>=4.44", "datasets>=3.0"]


def test_a_torch_that_is_too_old_is_not_exchanged(installed, wanted, capsys) -> None:
    installed.update(torch="2.1.0", torch_npu="2.1.0.post17")
    assert main(["--specs", str(wanted)]) == 4
    assert "use an environment with a newer version" in capsys.readouterr().out


@pytest.mark.parametrize(("torch", "code"), [(None, 1), ("2.7.1", 3)])
def test_the_exit_code_says_whether_torch_has_to_stay(installed, wanted, capsys, torch, code) -> None:
    if torch:
        installed["torch"] = torch
    assert main([str(wanted)]) == code
    assert "transformers, datasets, scipy" in capsys.readouterr().out


def test_the_package_metadata_states_the_same_ranges() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    stated = dict(re.findall(r'^    "(\w+)>=([\d.]+)",$', text, re.MULTILINE))
    assert stated == {name: ".".join(map(str, known.oldest)) for name, known in RANGES.items()}
    assert f'requires-python = ">={".".join(map(str, requirements.PYTHON.oldest))}"' in text
    block = text.partition("dependencies = [")[2].partition("]")[0]
    named = {re.match(r"[\w-]+", line.strip(' ",'))[0] for line in block.strip().splitlines()}
    pinned = {name for name, _ in requirements.pins(REPOSITORY / "requirements.txt")}
    assert named == pinned | {"huggingface_hub"}


def test_pins_follow_included_files() -> None:
    runtime = dict(requirements.pins(REPOSITORY / "requirements.txt"))
    npu = dict(requirements.pins(REPOSITORY / "requirements/npu.txt"))
    assert npu == {**runtime, "torch_npu": "2.13.0"}
    assert runtime["torch"] == "2.13.0"
