"""RoBERTa, the families with its names, and the two that put the norm before each part of a layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from bert_glue.model.family.description import BERT_KEYS, BERT_LAYER, Family, Names, bert_names, bert_shape
from bert_glue.model.shape import EncoderShape

_KEYS = (BERT_KEYS - {"embedding_size"}) | {"pad_token_id"}


def _shape(config: dict, labels: int, default_eps: float = 1e-12) -> EncoderShape:
    as_bert = {"layer_norm_eps": default_eps, **config, "embedding_size": None}
    shape = bert_shape(as_bert, labels)
    pad = config.get("pad_token_id", 1)
    both = (shape.head_dropouts[1],) * 2
    return replace(shape, position_offset=pad + 1, pad_token_id=pad, head_dropouts=both)


def _roberta(prefix: str, architecture: str) -> Family:
    return Family(
        prefix=prefix,
        architecture=f"{architecture}ForSequenceClassification",
        shape=_shape,
        outside=bert_names(prefix, "classifier.dense", "classifier.out_proj"),
        layer=f"{prefix}.encoder.layer.{{n}}.",
        inside=BERT_LAYER,
        keys=_KEYS,
    )


ROBERTA = _roberta("roberta", "Roberta")
XLM_ROBERTA = _roberta("roberta", "XLMRoberta")
CAMEMBERT = _roberta("roberta", "Camembert")
DATA2VEC_TEXT = _roberta("data2vec_text", "Data2VecText")


def _prelayernorm_shape(config: dict, labels: int) -> EncoderShape:
    return replace(_shape(config, labels), norm_first=True, has_final_norm=True)


_PRELAYERNORM_LAYER: Names = {
    **BERT_LAYER,
    "attention_norm": "attention.LayerNorm",
    "output_norm": "intermediate.LayerNorm",
}
ROBERTA_PRELAYERNORM = replace(
    _roberta("roberta_prelayernorm", "RobertaPreLayerNorm"),
    shape=_prelayernorm_shape,
    outside={
        **bert_names("roberta_prelayernorm", "classifier.dense", "classifier.out_proj"),
        "final_norm": "roberta_prelayernorm.LayerNorm",
    },
    inside=_PRELAYERNORM_LAYER,
)


def _xl_shape(config: dict, labels: int) -> EncoderShape:
    shape = partial(_shape, default_eps=1e-5)({"type_vocab_size": 1, **config}, labels)
    # transformers' class has no norm after the embeddings and no dropout after the feed-forward.
    return replace(shape, norm_first=True, has_embedding_norm=False, has_final_norm=True, output_dropout=0.0)


_XL_LAYER: Names = {
    **BERT_LAYER,
    "attention_norm": "attention.self_attn_layer_norm",
    "output_norm": "LayerNorm",
}
XLM_ROBERTA_XL = replace(
    _roberta("roberta", "XLMRobertaXL"),
    shape=_xl_shape,
    outside={
        **bert_names("roberta", "classifier.dense", "classifier.out_proj"),
        "final_norm": "roberta.encoder.LayerNorm",
    },
    inside=_XL_LAYER,
)
