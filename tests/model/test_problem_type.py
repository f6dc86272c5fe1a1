"""A classifier whose config.json has no problem_type: read as in transformers, with a note; a flag overrules it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_run import arguments, label_sets, make_label_sets, make_model, results_of

from bert_glue.errors import DataError, MachineError, UsageError
from bert_glue.model.folder import kind_notes, read_config, task_of_model
from bert_glue.pipeline.run import run
from bert_glue.predict.__main__ import main as predict

CLASSES = ("bird", "cat", "dog")
SEVERAL = "multi_label_classification"


@pytest.fixture(scope="module")
def unsaid(tmp_path_factory) -> Path:
    """A model of several labels a row as many lie on the hub: without problem_type, and of another program."""
    folder = tmp_path_factory.mktemp("unsaid")
    args = arguments(folder, **make_label_sets(folder / "data"), max_steps=30, do_eval=False)
    assert run(args) == 0
    model = Path(args.output_dir)
    config = json.loads((model / "config.json").read_text())
    for name in ("problem_type", "finetuning_task"):
        del config[name]
    (model / "config.json").write_text(json.dumps(config))
    (model / "bert_glue.json").unlink()
    return model


def logits_of_transformers(model: Path, texts: list[str]) -> np.ndarray:
    from transformers import pipeline

    ask = pipeline("text-classification", str(model), device="cpu", top_k=None, function_to_apply="none")
    return np.array([[next(a["score"] for a in row if a["label"] == name) for name in CLASSES] for row in ask(texts)])


def label(model: Path, folder: Path, texts: list[str], *more: str) -> list[dict[str, str]]:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    target = folder / "out.csv"
    words = ["--model", str(model), "--input", str(folder / "in.jsonl"), "--output", str(target), "--overwrite"]
    assert predict([*words, "--device", "cpu", *more]) == 0
    with target.open(newline="") as file:
        return list(csv.DictReader(file))


def test_prediction_tells_the_reading_and_the_flag_changes_it(unsaid: Path, tmp_path: Path, capsys) -> None:
    texts = [row["text"] for row in label_sets(9, 5)]
    logits = logits_of_transformers(unsaid, texts)
    rows = label(unsaid, tmp_path, texts)
    said = capsys.readouterr().out
    assert "config.json has no problem_type, so its 3 classes are read as one label per row" in said
    assert f"--problem_type {SEVERAL} allows several" in said
    assert [row["prediction"] for row in rows] == [CLASSES[at] for at in logits.argmax(1)]
    rows = label(unsaid, tmp_path, texts, "--problem_type", SEVERAL)
    assert f"config.json has no problem_type; --problem_type {SEVERAL} is used" in capsys.readouterr().out
    shares = np.array([[float(row[f"probability_{name}"]) for name in CLASSES] for row in rows])
    assert np.abs(shares - 1 / (1 + np.exp(-logits))).max() < 1e-5
    given = [";".join(np.array(CLASSES)[row > 0.5]) for row in shares]
    assert [row["prediction"] for row in rows] == given


def test_an_evaluation_of_lists_names_the_flag_and_takes_it(unsaid: Path, tmp_path: Path) -> None:
    rows = label_sets(30, 8)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"model_name_or_path": str(unsaid), "do_train": False, "do_eval": True, "train_file": None}
    plain = arguments(tmp_path, **args, validation_file=str(file))
    with pytest.raises(DataError, match=f"--problem_type {SEVERAL}"):
        run(plain)
    args = arguments(tmp_path, **args, validation_file=str(file), problem_type=SEVERAL)
    assert run(args) == 0
    logits = logits_of_transformers(unsaid, [row["text"] for row in rows])
    labels = np.array([[name in row["label"] for name in CLASSES] for row in rows])
    assert results_of(args)["eval_subset_accuracy"] == pytest.approx(((logits > 0) == labels).all(1).mean())


def config_of(folder: Path, **facts) -> Path:
    make_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForSequenceClassification"], **facts})
    )
    return folder


def test_what_config_json_says_is_not_overruled(tmp_path: Path) -> None:
    names = {str(at): name for at, name in enumerate(CLASSES)}
    said = config_of(tmp_path / "said", id2label=names, problem_type="single_label_classification")
    with pytest.raises(UsageError, match=f"--problem_type {SEVERAL}: .* says single_label_classification"):
        task_of_model(said, SEVERAL)
    unsaid = config_of(tmp_path / "unsaid", id2label=names)
    assert task_of_model(unsaid, SEVERAL)[0].is_multi_label and not task_of_model(unsaid)[0].is_multi_label
    assert task_of_model(unsaid, "single_label_classification")[0].labels == CLASSES
    with pytest.raises(UsageError, match="--problem_type regression: the model in .* has 3 output"):
        task_of_model(unsaid, "regression")
    one = config_of(tmp_path / "one", id2label={"0": "toxic"})
    assert task_of_model(one)[0].is_regression and task_of_model(one, SEVERAL)[0].labels == ("toxic",)
    with pytest.raises(UsageError, match="has 1 output"):
        task_of_model(one, "single_label_classification")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label gives several classes the name 'a'"),
        ({"id2label": {"0": 1, "1": "1"}}, "id2label gives several classes the name '1'"),
        ({"id2label": {"0": "a", "1": "b"}, "problem_type": "regression"}, "problem_type regression with 2 outputs"),
    ],
)
def test_answers_without_a_single_reading_are_refused(tmp_path: Path, facts: dict, says: str) -> None:
    with pytest.raises(MachineError, match=says):
        task_of_model(config_of(tmp_path / "model", **facts))


def test_an_unknown_problem_type_is_none_and_said(tmp_path: Path) -> None:
    model = config_of(tmp_path / "model", id2label=dict(enumerate(CLASSES)), problem_type="multi_class")
    task, _ = task_of_model(model)
    assert not task.is_multi_label and task_of_model(model, SEVERAL)[0].is_multi_label
    (note,) = kind_notes(read_config(model), arguments(tmp_path, model_name_or_path=str(model), do_train=False), task)
    assert note.startswith("config.json has the unknown problem_type 'multi_class', so its 3 classes are read as one")
