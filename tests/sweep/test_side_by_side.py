"""How many runs of a sweep share a GPU: by its free memory, the model's size and the cores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import write_model

from bert_glue.devices import device
from bert_glue.doctor import device_probe
from bert_glue.sweep import side_by_side
from bert_glue.sweep.plan import Suite
from bert_glue.sweep.side_by_side import ModelSize, model_size, read_jobs, run_bytes, runs_at_once, settle
from bert_glue.tasks import get_task

GB = 10**9
BASE, LARGE = ModelSize(108_000_000, 768, 12), ModelSize(335_000_000, 1024, 24)


def run_of(model: str | None = "somewhere/bert", *extra: str):
    """A run of the reference recipe: batch 32, 128 tokens."""
    return Suite(Path("out"), model, ("--sample",), extra).run(get_task("mrpc"), 1, {})


@pytest.fixture
def sized(monkeypatch):
    """Lets every model have a size."""
    return lambda size: monkeypatch.setattr(side_by_side, "model_size", lambda name: size)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_models_size_is_read_from_its_folder(tmp_path, family):
    stock = write_model(tmp_path, family)
    size = model_size(str(tmp_path))
    assert size.parameters == pytest.approx(sum(p.numel() for p in stock.parameters()), rel=0.15)  # and the header
    assert (size.hidden, size.layers, size.is_guess) == (32, 2, False)


@pytest.mark.parametrize("damage", ["no folder", "no weights", "no config.json", "rubbish", "another family"])
def test_a_model_that_is_not_here_counts_as_bert_large(tmp_path, damage):
    folder = tmp_path / "model"
    if damage != "no folder":
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"hidden_size": 32, "num_hidden_layers": 2}))
        (folder / "model.safetensors").write_bytes(bytes(400))
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    if damage == "no config.json":
        (folder / "config.json").unlink()
    if damage in ("rubbish", "another family"):
        (folder / "config.json").write_text("{" if damage == "rubbish" else '{"d_model": 8, "n_layer": 2}')
    size = model_size(str(folder))
    assert size.is_guess and (size.parameters, size.hidden, size.layers) == (335_000_000, 1024, 24)
    assert model_size(None).parameters < 10**7  # the sample's own model is no guess


def test_memory_grows_with_the_model_the_batch_and_the_length(sized):
    sized(BASE)
    base, _ = run_bytes(run_of())
    fixed = 3 << 29
    assert base == fixed + 20 * 108_000_000 + 80 * 32 * 128 * 768 * 12
    twice, _ = run_bytes(run_of("m", "--per_device_train_batch_size=64"))
    longer, _ = run_bytes(run_of("m", "--max_seq_length=256"))
    assert twice == longer == base + 80 * 32 * 128 * 768 * 12
    sized(LARGE)
    assert 15 * GB < run_bytes(run_of())[0] < 17 * GB


@pytest.mark.parametrize(
    ("size", "free", "cores", "expected"),
    [
        (LARGE, {"cuda:0": 79 * GB}, 16, 4),  # an H100
        (LARGE, {"cuda:0": 39 * GB}, 16, 2),
        (LARGE, {"cuda:0": 12 * GB}, 16, 1),  # it may still fit: the estimate is an upper bound
        (BASE, {"cuda:0": 79 * GB}, 64, 4),  # ten would fit, and gain nothing
        (BASE, {"cuda:0": 79 * GB}, 4, 2),  # two cores a run
        (BASE, {"cuda:0": 79 * GB, "cuda:1": 9 * GB}, 64, 1),  # the fuller device decides
        (BASE, {"cuda:0": 79 * GB, "cuda:1": 79 * GB}, 8, 2),
        (BASE, {"cuda:0": 79 * GB}, 1, 1),
        (BASE, {}, 64, 1),
    ],
)
def test_as_many_run_at_once_as_memory_and_cores_allow(sized, size, free, cores, expected):
    sized(size)
    count, line = runs_at_once(run_of(), free, cores)
    assert count == expected
    assert line.startswith(f"runs at once per device: {expected}, each a process; ") if free else line == ""


def test_a_guess_is_called_one(sized):
    sized(replace(LARGE, is_guess=True))
    _, line = runs_at_once(run_of(), {"cuda:0": 79 * GB}, 16)
    assert "GB (as bert-large would: the model is not here yet) of 79.0 GB that are free on cuda:0" in line


@pytest.mark.parametrize(
    ("jobs", "devices", "expected"),
    [
        (None, "auto", 4),
        (None, "cuda:0", 1),  # devices that are named stay as they were
        ("auto", "cuda:0", 4),
        ("auto", "cuda:1,cuda:0", 1),
        ("auto", "npu:0", 1),
        (3, "auto", 3),
    ],
)
def test_a_number_is_taken_and_auto_asks_the_devices(sized, monkeypatch, jobs, devices, expected):
    sized(BASE)
    monkeypatch.setattr(side_by_side.os, "sched_getaffinity", lambda process: range(32))
    free = {"cuda:0": 79 * GB} if "cuda:1" not in devices else {"cuda:0": 79 * GB, "cuda:1": 8 * GB}
    listed = {"devices": list(free), "free_bytes": free}
    assert settle(jobs, devices, lambda: listed, run_of())[0] == expected


def test_a_device_is_asked_only_where_its_answer_counts():
    def fails():
        raise AssertionError("the driver was asked")

    assert settle(2, "auto", fails, run_of()) == settle(2, "cuda:0", fails, run_of()) == (2, "")
    assert settle(None, "cpu", fails, run_of()) == (1, "")


def test_jobs_is_a_number_or_auto():
    assert [read_jobs(text) for text in ("auto", "3")] == ["auto", 3]
    with pytest.raises(ValueError, match="many"):
        read_jobs("many")


@pytest.mark.parametrize(("kind", "expected"), [("cuda", {"cuda:0": 7, "cuda:1": 7}), ("cpu", {})])
def test_the_probe_lists_free_memory_of_gpus_alone(monkeypatch, kind, expected):
    found = [device.Device(kind, index) for index in (0, 1)]
    monkeypatch.setattr(device, "devices", lambda name: found if name == kind else [])
    monkeypatch.setattr(device.Device, "memory", lambda self: (7, 9))
    assert device_probe._best_devices() == {"devices": [str(d.torch_device) for d in found], "free_bytes": expected}
