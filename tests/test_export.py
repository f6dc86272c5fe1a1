"""ONNX and the atc command: the same logits for any shape (where onnxruntime is installed), and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_models import write_model
from tiny_run import make_model

from bert_glue import export
from bert_glue.errors import MachineError

needs_onnx = pytest.mark.skipif(find_spec("onnx") is None, reason="onnx is not installed")
needs_onnxruntime = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")


@needs_onnx
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "albert"])
def test_the_graph_is_written_with_its_inputs(tmp_path, family):
    write_model(tmp_path / "model", family, labels=3)
    lines = export.export(str(tmp_path / "model"), tmp_path / "x.onnx", 1)
    content = (tmp_path / "x.onnx").read_bytes()
    assert all(name in content for name in (b"input_ids", b"attention_mask", b"logits", b"seq_len", b"batch"))
    assert (b"token_type_ids" in content) == (family in ("bert", "electra", "albert"))
    assert lines[0].startswith(f"wrote {tmp_path / 'x.onnx'} (")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "x.atc.sh", "x.onnx"]
    if find_spec("onnxruntime"):
        assert "logits equal torch's" in lines[0]
    else:
        assert "not checked, because onnxruntime is not installed" in lines[0]


@needs_onnxruntime
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_onnxruntime_gives_torchs_logits(tmp_path, family):
    """Of a model that was trained with dropout, too."""
    dropout = "dropout" if family == "distilbert" else "hidden_dropout_prob"
    stock = write_model(tmp_path / "model", family, labels=3, **{dropout: 0.5})
    model = export.load(str(tmp_path / "model"))
    export.write_onnx(model, tmp_path / "x.onnx")
    assert export.worst_difference(model, tmp_path / "x.onnx") < 1e-5
    inputs = export.example(model, 5, 33)
    with torch.no_grad():
        torch.testing.assert_close(model.module(**inputs), stock(**inputs).logits, atol=1e-5, rtol=1e-5)


@needs_onnxruntime
def test_a_graph_that_differs_is_not_kept(tmp_path, monkeypatch):
    write_model(tmp_path / "model")
    traced = export.write_onnx

    def trace_then_change(model, path):
        traced(model, path)
        with torch.no_grad():
            next(model.module.stock.classifier.parameters()).add_(1.0)

    monkeypatch.setattr(export, "write_onnx", trace_then_change)
    with pytest.raises(MachineError, match="not kept: its logits differ"):
        export.export(str(tmp_path / "model"), tmp_path / "x.onnx", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_examples_have_padding_and_no_padding_id_in_texts(tmp_path):
    write_model(tmp_path / "model")
    inputs = export.example(export.load(str(tmp_path / "model")), 3, 17)
    assert inputs["attention_mask"].sum(1).tolist() == [17, 14, 11]
    assert ((inputs["input_ids"] == 0) == (inputs["attention_mask"] == 0)).all()


def test_the_atc_script_runs_what_it_says(tmp_path):
    """With a replacement for atc that prints its arguments."""
    script = tmp_path / "x.atc.sh"
    script.write_text(export.atc_script(Path("x.onnx"), ["input_ids", "attention_mask", "token_type_ids"], 4))
    stand_in = tmp_path / "bin" / "atc"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    environment.pop("SOC_VERSION", None)
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "such as Ascend910B3" in done.stderr
    environment["SOC_VERSION"] = "Ascend910B4"
    done = subprocess.run(["bash", script, "--log=info"], capture_output=True, text=True, env=environment, cwd="/")
    assert done.stdout.splitlines() == [
        str(tmp_path), "--framework=5", "--model=x.onnx", "--output=x", "--input_format=ND",
        "--input_shape=input_ids:4,-1;attention_mask:4,-1;token_type_ids:4,-1",
        "--dynamic_dims=32,32,32;64,64,64;96,96,96;128,128,128", "--soc_version=Ascend910B4", "--log=info",
    ]  # fmt: skip
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script]).returncode == 0


@needs_onnx
def test_an_encoder_without_classifier_is_refused(tmp_path, capsys):
    model = make_model(tmp_path / "encoder")
    assert export.main([str(model), "--onnx", str(tmp_path / "x.onnx")]) == 4
    assert "has no classifier; fine-tune it first" in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()


def test_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        export.main(["x"])
    assert ended.value.code == 2 and "give --onnx" in capsys.readouterr().err


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert export.main([str(tmp_path), "--onnx"]) == 4
    assert "pip install onnx onnxruntime" in capsys.readouterr().err


@needs_onnx
def test_a_folder_that_is_not_there(tmp_path, capsys):
    write_model(tmp_path / "model")
    assert export.main([str(tmp_path / "model"), "--onnx", str(tmp_path / "none" / "x.onnx")]) == 6
    assert "cannot be written" in capsys.readouterr().err
