"""The families with windows or scores by relative position train on the simulated NPU as on the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simulated_runs import run_all
from tiny_models import write_model
from tiny_run import arguments, flags_of

FAMILIES = {
    "modernbert": "packed: npu_fusion_attention, TND",
    "mpnet": "blocks with a bias by relative position",
    "deberta-v2": "blocks with a bias by relative position",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict]:
    lines = {}
    for name in FAMILIES:
        changes = {"local_attention": 4} if name == "modernbert" else {}
        write_model(folder / f"model {name}", name, **changes)
        given = {"model_name_or_path": str(folder / f"model {name}"), "num_train_epochs": 1.0, "learning_rate": 1e-4}
        for place, own in {"host": {}, "fp32": {"use_cpu": False}, "fp16": {"use_cpu": False, "fp16": True}}.items():
            out = f"{name}, {place}"
            lines[out] = flags_of(arguments(folder, output_dir=str(folder / out), **given, **own))
    return run_all(folder, lines)


def _losses(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_those_of_the_host(runs: dict[str, dict], folder: Path, name: str) -> None:
    host = _losses(folder, f"{name}, host")
    for place, limit in (("fp32", 1e-4), ("fp16", 2e-2)):
        run = runs[f"{name}, {place}"]
        assert run["code"] == 0, run["log"]
        assert FAMILIES[name] in run["attention"]
        assert _losses(folder, f"{name}, {place}") == pytest.approx(host, rel=limit)
