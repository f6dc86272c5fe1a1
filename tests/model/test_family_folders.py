"""Folders of thirty families saved by transformers: our answers are its pipeline's, before and after saving."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_folders import FOLDERS, LABELS, WORDS, pipeline_answers, write_folder

from bert_glue.config.arguments import Arguments
from bert_glue.data.sources import Split
from bert_glue.data.tables import Table
from bert_glue.predict.labeller import Labeller, build_labeller
from bert_glue.tasks import own_task

TEXTS = [" ".join(WORDS[(at * 5 + n * 3) % len(WORDS)] for n in range(3 + at * 7 % 11)) for at in range(12)]
SECONDS = list(reversed(TEXTS))


# The oldest transformers that can make such a model. Earlier ones do not know ModernBERT, and fail on Funnel.
SINCE = {"modernbert": (4, 48), "funnel": (4, 57)}


def needs_transformers(model_type: str) -> None:
    """Skip the test where transformers is too old for the family."""
    here = tuple(map(int, version("transformers").split(".")[:2]))
    if here < SINCE.get(model_type, here):
        pytest.skip(f"transformers {version('transformers')} cannot make {model_type}")
    if model_type == "camembert" and here == (5, 0):
        pytest.skip("transformers 5.0 cannot read CamemBERT's sentencepiece vocabulary")


def slow_canine(model_type: str) -> Any:
    """Its vocabulary is all of Unicode; transformers needs several seconds to build its dict."""
    return pytest.param(model_type, marks=pytest.mark.slow) if model_type == "canine" else model_type


def _answers(folder: Path, texts: list[tuple[str, ...]], batch: int) -> tuple[np.ndarray, Labeller]:
    columns = ("first", "second")[: len(texts[0])]
    task = own_task("own", columns, LABELS)
    flags = {"device": "cpu", "max_seq_length": 48, "per_device_eval_batch_size": batch}
    labeller = build_labeller(Arguments(model_name_or_path=str(folder), **flags), task)
    values = dict(zip(columns, map(list, zip(*texts, strict=True)), strict=True))
    return labeller.answers(Table("rows", values, range(1, len(texts) + 1))), labeller


@pytest.mark.parametrize("kind", ["single", "pair"])
@pytest.mark.parametrize("model_type", [slow_canine(name) for name in FOLDERS])
def test_answers_are_those_of_the_pipeline(model_type, kind, tmp_path):
    needs_transformers(model_type)
    write_folder(model_type, tmp_path / "model")
    texts = [*zip(TEXTS, SECONDS, strict=True)] if kind == "pair" else [(text,) for text in TEXTS]
    expected = pipeline_answers(tmp_path / "model", texts, truncation=True, max_length=48)
    assert np.ptp(expected, axis=0).max() > 1e-4  # the texts matter
    for batch in (1, 7, 64):
        answers, labeller = _answers(tmp_path / "model", texts, batch)
        assert np.abs(answers - expected).max() < 1e-5, batch
    labeller.model.save(tmp_path / "saved")
    assert np.abs(pipeline_answers(tmp_path / "saved", texts, truncation=True, max_length=48) - expected).max() < 1e-5


BARE = ["albert", "camembert", "canine", "deberta", "deberta-v2", "fnet", "mpnet", "rembert", "xlm-roberta", "xlnet"]


@pytest.mark.parametrize("model_type", [slow_canine(name) for name in BARE])
def test_a_vocabulary_file_alone_is_enough(model_type, tmp_path):
    """No tokenizer.json, no tokenizer_config.json: transformers decides the tokens, before and after saving."""
    from transformers import AutoTokenizer

    needs_transformers(model_type)
    write_folder(model_type, tmp_path / "model", bare=True)
    _, labeller = _answers(tmp_path / "model", [(text,) for text in TEXTS[:2]], 2)
    labeller.model.save(tmp_path / "saved")
    split = Split("x", (TEXTS, SECONDS), None, "")
    table = labeller.model.tokenizer.encode(split, 20)
    for folder in (tmp_path / "model", tmp_path / "saved"):
        theirs = AutoTokenizer.from_pretrained(folder)(TEXTS, SECONDS, truncation=True, max_length=20)
        assert table.ids.tolist() == [token for row in theirs["input_ids"] for token in row]


def test_a_model_that_reaches_into_the_padding_is_scored_on_equal_lengths(tmp_path):
    for model_type, is_told in (("fnet", True), ("mpnet", False)):
        write_folder(model_type, tmp_path / model_type)
        _, labeller = _answers(tmp_path / model_type, [(text,) for text in TEXTS], 8)
        assert any("equal length" in note for note in labeller.model.notes) is is_told
        assert labeller.evaluator.collate.depends_on_padding is is_told
