"""Checks a config.json before a model is built from it: types, ranges, and sizes that the weights can fill.

A model folder may come from anyone. Its sizes decide how much memory the model takes and how long a loop over layers
runs, so they are checked while they are only numbers in a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from bert_glue.errors import MachineError

_LARGEST = 2**40  # beyond it no whole number of a config.json means anything
_MOST_LAYERS = 10_000
# Models share weights between layers, or store them in fewer bytes than they compute with.
_MOST_GROWTH, _ALWAYS_FITS = 16, 64 << 20


class _Range(NamedTuple):
    """The numbers that a key accepts, from `low` to `high` inclusive."""

    low: float
    high: float
    is_whole: bool = True

    def __str__(self) -> str:
        return f"a {'whole ' if self.is_whole else ''}number in [{self.low:g}, {self.high:g}]"

    def has(self, value: Any) -> bool:
        """True for a number of the right type within the range."""
        kind = int if self.is_whole else int | float
        return isinstance(value, kind) and not isinstance(value, bool) and self.low <= value <= self.high


_WIDTH, _COUNT, _SHARE = _Range(1, 2**20), _Range(1, _MOST_LAYERS), _Range(0, 1, is_whole=False)
_BASE = _Range(1, 1e12, is_whole=False)
_HIDDEN = ("hidden_size", "dim", "d_model", "n_embd")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers")
_HEADS = ("num_attention_heads", "n_heads", "n_head", "encoder_attention_heads")
_RANGES: dict[str, _Range] = {
    **dict.fromkeys((*_HIDDEN, "embedding_size", "input_embedding_size", "intermediate_size"), _WIDTH),
    **dict.fromkeys(("hidden_dim", "d_inner", "d_ff"), _WIDTH),
    **dict.fromkeys((*_LAYERS, *_HEADS, "decoder_layers", "num_hidden_groups", "inner_group_num"), _COUNT),
    "vocab_size": _Range(1, 2**26),
    "max_position_embeddings": _Range(1, 2**26),
    "type_vocab_size": _Range(0, 2**16),
    "task_type_vocab_size": _Range(1, 2**16),
    "relative_attention_num_buckets": _Range(1, 2**16),
    "position_buckets": _Range(-1, 2**20),
    "max_relative_positions": _Range(-1, 2**20),
    "local_attention": _Range(2, 2**26),
    "global_attn_every_n_layers": _COUNT,
    "global_rope_theta": _BASE,
    "local_rope_theta": _BASE,
    "initializer_range": _Range(0, 100, is_whole=False),
    "layer_norm_eps": _Range(0, 1, is_whole=False),
    "norm_eps": _Range(0, 1, is_whole=False),
    **dict.fromkeys(
        (
            "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob",
            "dropout", "attention_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout",
            "cls_dropout",
        ),
        _SHARE,
    ),
}  # fmt: skip
_TEXTS = (
    "model_type", "hidden_act", "activation", "hidden_activation", "pooler_hidden_act",
    "position_embedding_type", "classifier_pooling", "norm_rel_ebd", "finetuning_task", "problem_type",
)  # fmt: skip
# Other keys that a description reads, and what their values are.
_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "rope_parameters": (dict, "an object with the keys of rotary positions"),
    "layer_types": (list, "a list with the kind of each layer"),
    "pos_att_type": ((str, list), "c2p, p2c, or a list of both"),
    # MobileBERT says whether its pooler has an activation, ModernBERT which one.
    "classifier_activation": ((str, bool), "a text, or true or false"),
    **dict.fromkeys(
        (
            "relative_attention", "share_att_key", "position_biased_input", "use_task_id", "attention_bias",
            "mlp_bias", "norm_bias", "classifier_bias",
        ),
        (bool, "true or false"),
    ),
}  # fmt: skip
# Keys that may be null; the model's class then uses its own value.
_OPTIONAL = (
    "model_type",
    "classifier_dropout",
    "finetuning_task",
    "problem_type",
    "embedding_size",
    "position_embedding_type",
    "cls_dropout",
    "rope_parameters",
    "layer_types",
    "pos_att_type",
    "local_rope_theta",
)


def check_config(config: dict[str, Any], path: Path) -> None:
    """Check the sizes and classes of a model in `path`, its config.json.

    Raises:
        MachineError: a value has the wrong type or is out of range; the message names key, value and range.
    """
    for key, value in config.items():
        if value is None and key in _OPTIONAL:
            continue
        if key in _RANGES and not _RANGES[key].has(value):
            raise MachineError(f"{path}: {key} is {_shown(value)}, not {_RANGES[key]}")
        if key in _TEXTS and not isinstance(value, str):
            raise MachineError(f"{path}: {key} is {_shown(value)}, not a text")
        if key in _TYPES and not isinstance(value, _TYPES[key][0]):
            raise MachineError(f"{path}: {key} is {_shown(value)}, not {_TYPES[key][1]}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise MachineError(f"{path}: {key} is {_shown(value)}, not a number in [-2**40, 2**40]")
    hidden, heads = _first(config, _HIDDEN), _first(config, _HEADS)
    if hidden and heads and hidden % heads:
        raise MachineError(f"{path}: a hidden size of {hidden} cannot be divided among {heads} attention heads")
    _check_classes(config, path)


def _check_classes(config: dict[str, Any], path: Path) -> None:
    named = config.get("id2label")
    if named is None:
        return
    numbers = {str(number) for number in range(len(named))} if isinstance(named, dict) else set()
    if not isinstance(named, dict) or {str(key) for key in named} != numbers:
        raise MachineError(f'{path}: id2label is {_shown(named)}, not the names of classes "0", "1", ... without a gap')
    wrong = [name for name in named.values() if not _is_name(name)]
    if wrong:
        raise MachineError(f"{path}: id2label has the name {_shown(wrong[0])}, which is no text")


def _is_name(value: Any) -> bool:
    """True for a text or a number. JSON can write half a surrogate pair, which is no text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_size(config: dict[str, Any], files: Iterable[Path], path: Path) -> None:
    """Refuse sizes that the weights cannot fill, before memory is allocated for them.

    Args:
        files: the files that hold the weights.

    Raises:
        MachineError: the model would be many times larger than its files.
    """
    hidden, layers = _first(config, _HIDDEN), _first(config, _LAYERS)
    if not hidden:
        return
    width = config.get("embedding_size") or hidden
    rows = config.get("vocab_size", 1) + config.get("max_position_embeddings", 1) + config.get("type_vocab_size", 0)
    inner = _first(config, ("intermediate_size", "hidden_dim", "d_inner", "d_ff")) or hidden
    distinct = 1 if config.get("model_type") == "albert" else layers or 1
    needed = 4 * (rows * min(width, hidden) + distinct * (4 * hidden * hidden + 2 * hidden * inner))
    stored = sum(file.stat().st_size for file in files)
    if needed > _MOST_GROWTH * stored + _ALWAYS_FITS:
        raise MachineError(
            f"{path} describes a model of about {_gigabytes(needed)}, its weights have {_gigabytes(stored)}: "
            f"hidden size {hidden}, inner size {inner}, {layers} layers or {config.get('vocab_size')} words are wrong"
        )


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    return next((config[key] for key in keys if config.get(key)), None)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if math.isfinite(count) else "no end"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
