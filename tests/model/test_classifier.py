"""A model with code of its own: run only where the user trusts it, and saved with the weights that need it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import arguments, make_model

from bert_glue.model.classifier import code_files
from bert_glue.model.description import FILE
from bert_glue.model.loading import load_model
from bert_glue.tasks import get_task

CODE = """
from transformers import BertForSequenceClassification

class Doubled(BertForSequenceClassification):
    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, **more):
        found = super().forward(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        found.logits = found.logits * 2
        return found
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model with code, and a link to a file that is none of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_doubled.Doubled"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "modeling_doubled.py").write_text(CODE)
    (tmp_path / "secret").write_text("a key")
    (model / "linked.py").symlink_to(tmp_path / "secret")
    return model


def load(folder: Path, **flags):
    torch.manual_seed(0)
    args = arguments(folder.parent, model_name_or_path=str(folder), do_train=False, **flags)
    model = load_model(args, get_task("mrpc"))
    model.module.eval()
    return model


def test_a_trusted_model_is_saved_with_its_code(folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = load(folder, trust_remote_code=True)
    assert type(model.module.stock).__name__ == "Doubled" and not model.is_packed
    model.save(tmp_path / "saved")
    assert [file.name for file in sorted((tmp_path / "saved").glob("*.py"))] == ["modeling_doubled.py"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        assert type(again).__name__ == "Doubled"
        torch.testing.assert_close(again(**inputs).logits, model.module(**inputs))


def test_code_that_is_not_trusted_is_neither_run_nor_kept(folder, tmp_path):
    model = load(folder)
    assert model.is_packed and any("--trust_remote_code" in note for note in model.notes)
    model.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))


def test_code_in_the_cache_of_the_hub_is_a_link_to_a_blob(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "hash").write_text("x = 1\n")
    (snapshot / "code.py").symlink_to("../../blobs/hash")
    assert code_files(snapshot) == [snapshot / "code.py"]


def test_a_description_of_other_weights_is_told(tmp_path):
    model = make_model(tmp_path / "model")
    (model / FILE).write_text(json.dumps({"max_seq_length": 32, "weights_sha256": "0" * 64}))
    assert any("other weights" in note for note in load(model).notes)
