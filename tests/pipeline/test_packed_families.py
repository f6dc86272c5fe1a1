"""The packed families through whole runs: resume, ranks, techniques, soup, ensemble, prediction, compile and export."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from family_folders import LABELS, WORDS, pipeline_answers, write_folder
from safetensors.torch import load_file
from tiny_run import arguments, fit, losses, results_of, run_on_two_ranks

from bert_glue import export
from bert_glue.__main__ import main
from bert_glue.config.arguments import Arguments
from bert_glue.pipeline.run import run
from bert_glue.predict import __main__ as predict

FAMILIES = ("modernbert", "mpnet", "deberta-v2", "ernie", "rembert", "roberta-prelayernorm", "xlm-roberta-xl")
TECHNIQUES = {
    "layers": {"layerwise_lr_decay": 0.7, "ema_decay": 0.9, "fgm_epsilon": 0.5, "reinit_layers": 1},
    "rdrop": {"rdrop_alpha": 1.0},
    "lora": {"lora_rank": 4},
    "head": {"freeze_encoder": True},
    "checkpointing": {"gradient_checkpointing": True},
}


def write_rows(path: Path, count: int, shift: int) -> Path:
    """Texts of 3 to 13 words; the label is how many there are."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for at in range(shift, shift + count):
            length = 3 + at * 7 % 11
            text = " ".join(WORDS[(at * 5 + n * 3) % len(WORDS)] for n in range(length))
            writer.writerow([text, LABELS[min(2, length // 5)]])
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> Path:
    """A classifier of the family, with the dropout of its configuration class, as transformers saves it."""
    folder = tmp_path_factory.mktemp("families") / request.param
    folder.mkdir()
    write_folder(request.param, folder)
    return folder


def settings(model: Path, folder: Path, **changes) -> Arguments:
    """Six steps on three batches an epoch."""
    files = {"train_file": str(write_rows(folder / "train.csv", 24, 0))}
    files |= {"validation_file": str(write_rows(folder / "validation.csv", 12, 100))}
    return arguments(
        folder, **files, model_name_or_path=str(model), max_steps=6, per_device_train_batch_size=8, do_eval=True,
        max_seq_length=120,
        **changes,
    )  # fmt: skip


def weights(args: Arguments) -> dict[str, torch.Tensor]:
    return load_file(Path(args.output_dir) / "model.safetensors")


def assert_resumes(whole: Arguments) -> None:
    """A run resumed from its third step ends with the same bits."""
    assert run(whole) == 0
    checkpoint = str(Path(whole.output_dir) / "checkpoint-3")
    resumed = replace(whole, output_dir=f"{whole.output_dir}-resumed", resume_from_checkpoint=checkpoint)
    assert run(resumed) == 0
    first, second = weights(whole), weights(resumed)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert results_of(whole)["train_loss"] == results_of(resumed)["train_loss"]


@pytest.mark.parametrize("precision", [{}, {"bf16": True, "fp16_opt_level": "O2"}], ids=["O0", "O2"])
def test_resume_is_bit_for_bit(model: Path, tmp_path: Path, precision: dict) -> None:
    assert_resumes(settings(model, tmp_path, save_strategy="steps", save_steps=3, **precision))


@pytest.mark.slow
@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_trains_and_resumes(model: Path, tmp_path: Path, name: str) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    assert_resumes(settings(model, tmp_path, save_strategy="steps", save_steps=3, **TECHNIQUES[name]))


def undropped(model: Path, folder: Path) -> Path:
    """A copy of the model without dropout, so that two ways to train it can be compared."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {name: 0.0 for name in config if "dropout" in name and isinstance(config[name], float)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_accumulation_and_padding_give_the_same_losses(model: Path, tmp_path: Path) -> None:
    args = settings(undropped(model, tmp_path / "model"), tmp_path)
    expected = losses(fit(args))
    parts = replace(args, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert losses(fit(parts)) == pytest.approx(expected, rel=1e-4)
    assert losses(fit(replace(args, padding="longest"))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_two_ranks_give_the_same_as_one(model: Path, tmp_path: Path) -> None:
    args = settings(undropped(model, tmp_path / "model"), tmp_path)
    expected = losses(fit(args))
    two = replace(args, per_device_train_batch_size=4, output_dir=str(tmp_path / "two"))
    run_on_two_ranks(two)
    assert results_of(two)["train_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(model: Path, tmp_path: Path) -> None:
    args = settings(undropped(model, tmp_path / "model"), tmp_path)
    expected = losses(fit(args))
    compiled = replace(args, torch_compile=True, torch_compile_backend="inductor")
    assert losses(fit(compiled)) == pytest.approx(expected, rel=1e-4)


def answers(models: list[Path], source: Path, target: Path) -> np.ndarray:
    """Probabilities by `python -m bert_glue.predict`, [rows, classes]."""
    words = ["--input", str(source), "--output", str(target), "--device", "cpu"]
    assert predict.main(["--model", *map(str, models), *words]) == 0
    with target.open(newline="", encoding="utf-8") as file:
        return np.array([[float(row[f"probability_{label}"]) for label in LABELS] for row in csv.DictReader(file)])


def texts_of(source: Path) -> list[tuple[str]]:
    with source.open(newline="", encoding="utf-8") as file:
        return [(row["text"],) for row in csv.DictReader(file)]


def test_soup_ensemble_and_prediction(model: Path, tmp_path: Path) -> None:
    finished = []
    for seed in (1, 2):
        args = settings(model, tmp_path, output_dir=str(tmp_path / str(seed)), data_seed=seed)
        assert run(args) == 0
        finished.append(Path(args.output_dir))
    source = write_rows(tmp_path / "new.csv", 20, 300)
    texts = texts_of(source)
    one, two = (answers([folder], source, tmp_path / f"{folder.name}.csv") for folder in finished)
    np.testing.assert_allclose(one, pipeline_answers(finished[0], texts), atol=1e-5)
    both = answers(finished, source, tmp_path / "both.csv")
    np.testing.assert_allclose(both, (one + two) / 2, atol=2e-6)
    soup = tmp_path / "soup"
    assert main(["soup", *map(str, finished), "--output_dir", str(soup)]) == 0
    first, second, mean = (load_file(folder / "model.safetensors") for folder in (*finished, soup))
    assert all(torch.allclose(mean[name], (first[name] + second[name]) / 2, atol=1e-7) for name in mean)
    found = answers([soup], source, tmp_path / "soup.csv")
    np.testing.assert_allclose(found, pipeline_answers(soup, texts), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("onnxruntime") or not find_spec("onnxscript"), reason="needs onnxruntime")
def test_onnxruntime_gives_torchs_logits(model: Path, tmp_path: Path) -> None:
    loaded = export.load(str(model))
    export.write_onnx(loaded, tmp_path / "x.onnx")
    assert export.worst_difference(loaded, tmp_path / "x.onnx") < 1e-4
