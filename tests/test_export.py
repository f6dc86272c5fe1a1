"""ONNX and the atc command: the same logits for any shape (where onnxruntime is installed), and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_models import write_model
from tiny_run import make_model

import run_glue
from bert_glue import export
from bert_glue.errors import MachineError

FAMILIES = ["bert", "roberta", "distilbert", "electra", "albert"]
needs_onnxscript = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))), reason="onnxscript is not installed"
)
needs_onnx = pytest.mark.skipif(find_spec("onnx") is None, reason="onnx is not installed")
needs_onnxruntime = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")


@pytest.fixture(autouse=True)
def exporter(request, monkeypatch):
    """The tracer, which takes a second where torch's exporter takes fifteen; tests of that one are marked `current`."""
    if "current" not in request.fixturenames:
        monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))


@pytest.fixture
def current():
    """torch's exporter."""


@needs_onnxscript
@pytest.mark.parametrize(
    "family",
    ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("roberta", "distilbert", "electra", "albert"))],
)
def test_torchs_exporter_gives_torchs_logits(tmp_path, current, family):
    write_model(tmp_path / "model", family, labels=3)
    line = export.export(str(tmp_path / "model"), tmp_path / "x.onnx", 1)[0]
    assert "(torch's exporter; in onnxruntime, logits equal torch's to" in line
    import onnx

    graph = onnx.load(str(tmp_path / "x.onnx"))
    assert graph.opset_import[0].version == 18
    sizes = {one.name: [d.dim_param for d in one.type.tensor_type.shape.dim] for one in graph.graph.input}
    assert all(len(set(size)) == 2 and all(size) for size in sizes.values())  # batch and length are free


@needs_onnx
def test_the_graph_has_labels_and_the_limits_of_the_tokenizer(tmp_path):
    import onnx

    write_model(tmp_path / "model", labels=3)
    (tmp_path / "model" / "bert_glue.json").write_text(json.dumps({"version": 1, "max_seq_length": 24}))
    export.export(str(tmp_path / "model"), tmp_path / "x.onnx", 1)
    found = {one.key: one.value for one in onnx.load(str(tmp_path / "x.onnx")).metadata_props}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert json.loads(found["bert_glue.labels"]) == [
        *config.get("id2label", {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}).values()
    ]
    assert json.loads(found["bert_glue.inputs"]) == ["input_ids", "attention_mask", "token_type_ids"]
    assert found["bert_glue.max_seq_length"] == "24" and int(found["bert_glue.max_positions"]) >= 24
    assert found["bert_glue.padding_side"] == "right" and found["bert_glue.pad_token_id"] == "0"


@needs_onnxruntime
def test_a_config_without_problem_type_is_asked_about(tmp_path, capsys):
    import onnx

    folder, graph = tmp_path / "model", tmp_path / "x.onnx"
    write_model(folder, labels=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "problem_type"}))
    assert export.main([str(folder), "--onnx", str(graph)]) == 0
    assert "note: config.json has no problem_type, so its 3 classes are read as one label" in capsys.readouterr().out
    assert export.main([str(folder), "--onnx", str(graph), "--problem_type", "multi_label_classification"]) == 0
    assert "the sigmoid of each logit is the probability of its class" in capsys.readouterr().out
    stored = {one.key: one.value for one in onnx.load(str(graph)).metadata_props}
    assert stored["bert_glue.problem_type"] == "multi_label_classification"
    assert export.main([str(folder), "--onnx", str(graph), "--problem_type", "regression"]) == 2
    assert "--problem_type regression" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the sample, in few steps."""
    run = tmp_path_factory.mktemp("export") / "run"
    words = ["--sample", "--task_name", "mrpc", "--do_train", "--do_eval", "--max_steps", "3", "--use_cpu"]
    assert run_glue.main([*words, "--output_dir", str(run), "--report_to", "none", "--disable_tqdm"]) == 0
    return run


@needs_onnxruntime
def test_variants_are_compared_on_the_rows_of_the_run(tmp_path, finished, capsys):
    """A user sees what each costs and gains: logits, answers, score, time."""
    assert export.main([str(finished), "--onnx", str(tmp_path / "x.onnx"), "--fp16", "--int8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.atc.sh", "x.fp16.onnx", "x.int8.onnx", "x.onnx"]
    about, head, *rows = lines[-6:]
    assert about.startswith("on 200 validation rows of the run, CPU,") and "rows/s" in head
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert [*cells] == ["torch", "onnx", "fp16", "int8"]
    score = json.loads((finished / "all_results.json").read_text())["eval_f1"]
    assert float(cells["torch"][4]) == float(cells["onnx"][4]) == pytest.approx(score, abs=1e-4)
    differences = [float(row[1]) for row in cells.values()]
    assert differences[0] == 0 < differences[1] < 1e-4 < differences[2] < differences[3] < 1
    assert all(float(row[5]) > 0 and float(row[6]) > 0 for row in cells.values())


@needs_onnxruntime
def test_variants_keep_metadata_and_types(tmp_path):
    import onnx

    write_model(tmp_path / "model")
    export.export(str(tmp_path / "model"), tmp_path / "x.onnx", 1, ("fp16", "int8"))
    whole = onnx.load(str(tmp_path / "x.onnx"))
    for kind, stored in (("fp16", onnx.TensorProto.FLOAT16), ("int8", onnx.TensorProto.INT8)):
        graph = onnx.load(str(tmp_path / f"x.{kind}.onnx"))
        assert {(p.key, p.value) for p in graph.metadata_props} == {(p.key, p.value) for p in whole.metadata_props}
        assert any(weight.data_type == stored for weight in graph.graph.initializer)
        assert [o.type.tensor_type.elem_type for o in graph.graph.output] == [onnx.TensorProto.FLOAT]


@needs_onnxruntime
@pytest.mark.parametrize("lost", ["run.json", "labels"])
def test_without_the_rows_of_the_run_it_says_so(tmp_path, finished, capsys, lost):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if lost == "run.json":
        (run / "run.json").unlink()
    else:
        record = json.loads((run / "run.json").read_text())
        record["arguments"] |= {"sample": False, "data_path": str(tmp_path / "gone")}
        (run / "run.json").write_text(json.dumps(record))
    assert export.main([str(run), "--onnx"]) == 0
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith("note: score and latency are not measured, because the rows of the run are not here: ")
    assert (run / "model.onnx").is_file()


@needs_onnx
@pytest.mark.parametrize("family", FAMILIES)
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
        how = traced(model, path)
        with torch.no_grad():
            next(model.module.stock.classifier.parameters()).add_(1.0)
        return how

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
