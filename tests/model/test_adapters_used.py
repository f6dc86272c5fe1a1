"""What becomes of a run that trained adapters or the head alone: labels, ONNX, soup, archive, report and card."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import arguments, make_data, make_model, rows

from bert_glue import export
from bert_glue.__main__ import main
from bert_glue.pipeline.run import run
from bert_glue.predict import __main__ as predict

PARTS = {"lora": {"lora_rank": 4, "lora_target_modules": "all-linear"}, "frozen": {"freeze_encoder": True}}


@pytest.fixture(scope="module", params=PARTS)
def runs(request, tmp_path_factory) -> list[Path]:
    """Two finished runs of two seeds' orders."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp(request.param)
    model, data = str(make_model(folder / "model")), make_data(folder / "data", train=64)
    for seed in (1, 2):
        args = arguments(
            folder, **data, **PARTS[request.param], model_name_or_path=model, output_dir=str(folder / str(seed)),
            data_seed=seed, do_eval=True, do_predict=True, learning_rate=2e-2, explain=1,
        )  # fmt: skip
        assert run(args) == 0
    return [folder / "1", folder / "2"]


def own(folder: Path) -> torch.nn.Module:
    """What peft makes of the base model and `adapter/`; without adapters the base encoder under the run's head."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(folder.parent / "model", num_labels=2)
    if (folder / "adapter").is_dir():
        return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    head = {name: value for name, value in load_file(folder / "model.safetensors").items() if "encoder" not in name}
    base.load_state_dict({name: value for name, value in head.items() if "embeddings" not in name}, strict=False)
    return base.eval()


def logits(module: torch.nn.Module, folder: Path, texts: list[dict[str, str]]) -> torch.Tensor:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [text["sentence1"] for text in texts], [text["sentence2"] for text in texts]
    with torch.no_grad():
        return module(**tokenizer(*pairs, padding=True, return_tensors="pt")).logits


def labelled(models: list[Path], tmp_path: Path) -> np.ndarray:
    """Probabilities `[rows, 2]` of bert_glue.predict."""
    source, target = tmp_path / "in.jsonl", tmp_path / f"{len(models)}-{models[0].name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows(12, 5)))
    words = ["--model", *map(str, models), "--input", str(source), "--output", str(target), "--device", "cpu"]
    assert predict.main(words) == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    return np.array([[row["probability_no"], row["probability_yes"]] for row in found])


def test_labels_and_onnx_are_the_adapter_models_own(runs, tmp_path):
    """To 1e-5: the weights that are saved are merged."""
    expected = logits(own(runs[0]), runs[0], rows(12, 5))
    np.testing.assert_allclose(labelled(runs[:1], tmp_path), expected.softmax(-1).numpy(), atol=1e-5)
    assert (logits(export.load(str(runs[0])).module.stock, runs[0], rows(12, 5)) - expected).abs().max() < 1e-5
    if find_spec("onnx"):
        lines = export.export(str(runs[0]), tmp_path / "x.onnx", 1)
        assert find_spec("onnxruntime") is None or "logits equal torch's" in lines[0]


def test_their_soup_and_their_mean(runs, tmp_path):
    assert main(["soup", *map(str, runs), "--output_dir", str(tmp_path / "soup")]) == 0
    one, other, mean = (load_file(folder / "model.safetensors") for folder in (*runs, tmp_path / "soup"))
    assert all(torch.allclose(mean[name], (one[name] + other[name]) / 2, atol=1e-7) for name in one)
    assert labelled([tmp_path / "soup"], tmp_path).shape == (12, 2)
    both = labelled(runs, tmp_path)
    np.testing.assert_allclose(both, (labelled(runs[:1], tmp_path) + labelled(runs[1:], tmp_path)) / 2, atol=2e-6)


def test_report_and_card_say_what_was_trained(runs):
    results = json.loads((runs[0] / "all_results.json").read_text())
    assert results["trained"].startswith("the head")
    assert f"Trained: {results['trained']}." in (runs[0] / "README.md").read_text()
    assert f"训练的部分</span></b> {results['trained']}</li>" in (runs[0] / "report.html").read_text()
    (part,) = json.loads((runs[0] / "analysis.json").read_text())["splits"].values()
    assert part["explained"] and any(part["explained"][0]["scores"])  # gradients of inputs, below a frozen encoder


def test_the_archive_takes_their_predictions(tmp_path):
    pytest.importorskip("peft")
    model = make_model(tmp_path / "model")
    args = arguments(
        tmp_path,
        sample=True,
        task_name="wnli",
        model_name_or_path=str(model),
        lora_rank=2,
        max_steps=2,
        do_predict=True,
    )
    assert run(args) == 0
    words = [args.output_dir, "--output", str(tmp_path / "dry.zip"), "--partial", "--allow_sample"]
    assert main(["submit", *words]) == 0 and (tmp_path / "dry.zip").is_file()
