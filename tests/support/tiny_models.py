"""Tiny random models of transformers for comparison, and model folders made of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from bert_glue.data.packing import PackedLayout
from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.families import FAMILIES
from bert_glue.model.weights import load_packed

# What git leaves in place of a large file that was not fetched.
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 435755784\n"

# These models are too small to share; waiting threads would only spin.
torch.set_num_threads(1)

_WORDS = (
    "the a cat dog sat ran on mat hat big red un able ##s ##ing ##ly play walk . , ! ? ' \u00e9 caf ##\u00e9 \u4e2d"
)
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS.split(), *"abcdefghijklmnopqrstuvwxyz0123456789"]
VOCAB += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
VOCAB = list(dict.fromkeys(VOCAB))

_SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_ROBERTA = {**_SIZES, "max_position_embeddings": 514, "type_vocab_size": 1}
_DISTILBERT = {
    "vocab_size": 120,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 512,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
# model_type -> settings; every family of families.py
SETTINGS: dict[str, dict] = {
    "bert": _SIZES,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": {**_SIZES, "embedding_size": 24},
    "distilbert": _DISTILBERT,
    "albert": {**_SIZES, "embedding_size": 24, "num_hidden_layers": 3, "classifier_dropout_prob": 0.0},
    # Four layers: global, local, local, global. The window ends inside every longer test row.
    "modernbert": {
        **{key: value for key, value in _SIZES.items() if not key.endswith("prob")},
        "num_hidden_layers": 4,
        "local_attention": 16,
        **dict.fromkeys(("bos_token_id", "cls_token_id"), 2),
        **dict.fromkeys(("eos_token_id", "sep_token_id"), 3),
        "pad_token_id": 0,
    },
    "mpnet": {**_SIZES, "max_position_embeddings": 514},
    "deberta-v2": {
        **_SIZES,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_biased_input": False,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 16,
        "max_relative_positions": 128,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
    },
    "ernie": {**_SIZES, "use_task_id": True},
    "rembert": {**_SIZES, "input_embedding_size": 24, "output_embedding_size": 24, "classifier_dropout_prob": 0.0},
    "data2vec-text": _ROBERTA,
    "roberta-prelayernorm": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
}


def takes_types(model_type: str) -> bool:
    """True if the second text of a pair has token type 1."""
    has_none = model_type in ("distilbert", "mpnet", "modernbert")
    return not has_none and SETTINGS[model_type].get("type_vocab_size", 2) > 1


def stock_model(model_type: str, labels: int = 3, seed: int = 0, **changes) -> nn.Module:
    """transformers' classifier with weights large enough that every part moves the logits."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    settings = {**SETTINGS.get(model_type, _SIZES), "initializer_range": 0.1, **changes}
    config = AutoConfig.for_model(model_type, num_labels=labels, **settings)
    torch.manual_seed(seed)
    stock = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return stock.eval()


def packed_like(stock: nn.Module, **options) -> PackedClassifier:
    """Our module with the weights of `stock`, in evaluation mode."""
    config = stock.config.to_dict()
    family = FAMILIES[config["model_type"]]
    module = PackedClassifier(family.shape(config, stock.config.num_labels), **options)
    assert load_packed(module, family, stock.state_dict(), resize_head=False) == []
    return module.eval()


def random_batch(lengths: tuple[int, ...], vocab: int = 120, pairs: bool = True, tail: int = 0, seed: int = 0):
    """The same rows twice: packed inputs, and the padded inputs of transformers (without filler)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, vocab, (n,), generator=generator) for n in lengths]
    types = [(torch.arange(n) >= n // 2).long() if pairs and n > 1 else torch.zeros(n).long() for n in lengths]
    layout = PackedLayout(tuple(lengths), tail)
    filler = torch.zeros(tail).long()
    packed = {
        "input_ids": torch.cat([*rows, filler])[None],
        "token_type_ids": torch.cat([*types, filler])[None],
        "position_ids": torch.from_numpy(layout.positions)[None],
        "layout": layout,
    }
    pad = torch.nn.utils.rnn.pad_sequence
    padded = {
        "input_ids": pad(rows, batch_first=True, padding_value=1),
        "attention_mask": pad([torch.ones(n).long() for n in lengths], batch_first=True),
        "token_type_ids": pad(types, batch_first=True),
    }
    return packed, padded


def write_vocab(folder: Path, **settings) -> None:
    """vocab.txt, and tokenizer_config.json where settings are given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_model(folder: Path, model_type: str = "bert", labels: int = 2, **changes) -> nn.Module:
    """A complete model folder with a WordPiece vocabulary; returns the model that was saved."""
    from transformers import BertTokenizerFast

    stock = stock_model(model_type, labels, **{"vocab_size": len(VOCAB), **changes})
    stock.save_pretrained(folder)
    inputs = ["input_ids", "attention_mask"]
    if getattr(stock.config, "type_vocab_size", 0) > 1:
        inputs.append("token_type_ids")
    write_vocab(folder, do_lower_case=True, tokenizer_class="BertTokenizer", model_input_names=inputs)
    if model_type in ("modernbert", "xlm-roberta-xl"):  # whose tokenizers are read from this file alone
        BertTokenizerFast(str(folder / "vocab.txt")).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return stock
