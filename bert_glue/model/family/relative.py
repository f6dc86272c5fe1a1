"""The families whose attention depends on relative positions: MPNet and DeBERTa of versions 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bert_glue.model.family.description import BERT_KEYS, BERT_LAYER, Family, bert_names, bert_shape, key_set
from bert_glue.model.kernels.positions import MPNET_BUCKETS
from bert_glue.model.shape import Disentangled, EncoderShape


def _mpnet_shape(config: dict[str, Any], labels: int) -> EncoderShape:
    shape = bert_shape({**config, "embedding_size": None, "type_vocab_size": 0}, labels)
    return replace(
        shape,
        # Positions count from 2, whatever the id of padding is.
        position_offset=2,
        pad_token_id=config.get("pad_token_id", 1),
        head_dropouts=(shape.hidden_dropout,) * 2,
        relative_buckets=config.get("relative_attention_num_buckets", MPNET_BUCKETS),
    )


class _MpNet(Family):
    def why_unknown(self, config: dict[str, Any]) -> str | None:
        """As in `Family`; the table must have a row for each bucket."""
        if config.get("relative_attention_num_buckets", MPNET_BUCKETS) < MPNET_BUCKETS:
            return f"its relative_attention_num_buckets are fewer than the {MPNET_BUCKETS} of its class"
        return super().why_unknown(config)


MPNET = _MpNet(
    prefix="mpnet",
    architecture="MPNetForSequenceClassification",
    shape=_mpnet_shape,
    outside={
        **bert_names("mpnet", "classifier.dense", "classifier.out_proj"),
        "relative_positions": "mpnet.encoder.relative_attention_bias",
    },
    layer="mpnet.encoder.layer.{n}.",
    inside={
        **BERT_LAYER,
        "qkv": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "attention_output": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
    },
    keys=(BERT_KEYS - {"embedding_size", "type_vocab_size", "classifier_dropout"})
    | {"relative_attention_num_buckets", "pad_token_id"},
    unread=frozenset({"type_vocab_size", "classifier_dropout"}),
)


def _deberta_shape(config: dict[str, Any], labels: int) -> EncoderShape:
    defaults = {"type_vocab_size": 0, "layer_norm_eps": 1e-7}
    shape = bert_shape({**defaults, **config, "embedding_size": None}, labels)
    cls_dropout = config.get("cls_dropout")
    return replace(
        shape,
        has_position_table=config.get("position_biased_input", True),
        head_activation=config.get("pooler_hidden_act", "gelu"),
        head_dropouts=(config.get("pooler_dropout", 0.0), shape.hidden_dropout if cls_dropout is None else cls_dropout),
        disentangled=_disentangled(config),
    )


def _terms(config: dict[str, Any]) -> list[str]:
    terms = config.get("pos_att_type") or []
    return [term.strip() for term in terms.lower().split("|")] if isinstance(terms, str) else list(terms)


def _disentangled(config: dict[str, Any]) -> Disentangled:
    longest = config.get("max_relative_positions", -1)
    longest = longest if longest >= 1 else config["max_position_embeddings"]
    buckets = config.get("position_buckets", -1)
    return Disentangled(
        span=buckets if buckets > 0 else longest,
        buckets=buckets > 0,
        longest=longest,
        has_own_products=not config.get("share_att_key", False),
        terms=tuple(term for term in ("c2p", "p2c") if term in _terms(config)),
        has_norm="layer_norm" in [part.strip() for part in config.get("norm_rel_ebd", "none").lower().split("|")],
    )


class _DebertaV2(Family):
    def why_unknown(self, config: dict[str, Any]) -> str | None:
        """As in `Family`; parts that only some models have must be those of the published ones."""
        if (
            not config.get("relative_attention", False)
            or not set(_terms(config)) <= {"c2p", "p2c"}
            or not _terms(config)
        ):
            return f"its attention has no relative positions, or of a kind that is not described: {_terms(config)}"
        if not set(config.get("norm_rel_ebd", "none").replace("|", " ").split()) <= {"none", "layer_norm"}:
            return f"norm_rel_ebd {config['norm_rel_ebd']!r} is not none or layer_norm"
        kind = _disentangled(config) if "max_position_embeddings" in config else None
        if kind is not None and kind.buckets and (kind.span < 4 or kind.longest <= kind.span // 2 + 1):
            return f"its {kind.span} position_buckets have no logarithm up to {kind.longest} tokens"
        for key in ("embedding_size", "pooler_hidden_size"):
            if config.get(key, config.get("hidden_size")) != config.get("hidden_size"):
                return f"{key} {config[key]} is not the hidden size"
        return super().why_unknown(config)


_CONVOLUTION = "it has a convolution after the first layer"
DEBERTA_V2 = _DebertaV2(
    prefix="deberta",
    architecture="DebertaV2ForSequenceClassification",
    shape=_deberta_shape,
    outside={
        **bert_names("deberta", "pooler.dense", "classifier"),
        "relative_positions": "deberta.encoder.rel_embeddings",
        "relative_norm": "deberta.encoder.LayerNorm",
    },
    layer="deberta.encoder.layer.{n}.",
    inside={
        **BERT_LAYER,
        "qkv": ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        "position_key": "attention.self.pos_key_proj",
        "position_query": "attention.self.pos_query_proj",
    },
    keys=BERT_KEYS - {"classifier_dropout"}
    | key_set(
        """
    position_biased_input pooler_hidden_act pooler_dropout cls_dropout relative_attention pos_att_type
    max_relative_positions position_buckets share_att_key norm_rel_ebd pooler_hidden_size
    """
    ),
    unread=frozenset({"legacy", "conv_act", "conv_groups", "padding_idx"}),
    only={"conv_kernel_size": ((0, None), _CONVOLUTION)},
    activation_keys=("hidden_act", "pooler_hidden_act"),
)
