"""Quantized models: refused where their weights are integers, and told where only config.json asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import arguments, make_model

from bert_glue.errors import MachineError
from bert_glue.model.loading import load_model
from bert_glue.model.weights import read_tensors, weight_files
from bert_glue.tasks import get_task

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32])
def test_integer_weights_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, QUERY: tensors[QUERY].to(kind)}, model / "model.safetensors", {"format": "pt"})
    name = str(kind).removeprefix("torch.")
    with pytest.raises(
        MachineError, match=f"{QUERY} are {name}: the model is quantized; give the one it was made from"
    ):
        read_tensors(weight_files(model, False))


def test_a_setting_that_is_not_applied_is_told_and_not_saved(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_8bit": True}}))
    model = load_model(arguments(tmp_path), get_task("rte"))
    assert any("quantization_config is not applied" in note for note in model.notes)
    model.save(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
