"""A config.json that no model can have is refused before memory is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bert_glue.errors import MachineError
from bert_glue.model.bounds import check_config, check_size

BERT_BASE = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "layer_norm_eps": 1e-12, "classifier_dropout": None,
    "id2label": {"0": "no", "1": "yes"},
}  # fmt: skip
HERE = Path("config.json")


def test_what_models_have_is_accepted():
    check_config(BERT_BASE, HERE)
    check_config({"model_type": "xlnet", "d_model": 1024, "n_layer": 24, "n_head": 16, "mem_len": None}, HERE)
    check_config({"id2label": {0: "a", 1: 1}}, HERE)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 10**9), ("hidden_size", "x"), ("hidden_size", -1), ("hidden_size", 768.0),
        ("hidden_size", None), ("num_hidden_layers", 10**9), ("n_layers", True),
        ("num_attention_heads", 0), ("num_attention_heads", 7),
        ("vocab_size", 10**18), ("layer_norm_eps", "x"), ("layer_norm_eps", float("nan")), ("hidden_dropout_prob", 2),
        ("id2label", {"a": "b"}), ("id2label", ["a"]), ("id2label", {"0": ["a"]}), ("id2label", {"0": "a", "2": "b"}),
        ("id2label", {"0": "a", "1": "\ud800"}),
        ("hidden_act", []), ("model_type", {}), ("something_else", 10**30),
    ],
)  # fmt: skip
def test_what_no_model_has_is_named(key, value):
    with pytest.raises(MachineError, match=f"config.json: .*{key.split('_')[-1]}|hidden size of 768"):
        check_config({**BERT_BASE, key: value}, HERE)


def test_sizes_that_the_weights_cannot_fill_are_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(220_000_000)  # fp16; takes no space
    check_size(BERT_BASE, [weights], HERE)
    for change in ({"num_hidden_layers": 5000}, {"hidden_size": 2**18}, {"vocab_size": 2**26}):
        with pytest.raises(MachineError, match="describes a model of about"):
            check_size({**BERT_BASE, **change}, [weights], HERE)
