"""The encoder families that run packed: one description a row, read by one encoder (docs/families.md)."""

from __future__ import annotations

from typing import Any

from bert_glue.model.family import bert, modernbert, relative, roberta
from bert_glue.model.family.description import Family
from bert_glue.model.shape import EncoderShape

FAMILIES: dict[str, Family] = {
    "bert": bert.BERT,
    "roberta": roberta.ROBERTA,
    "xlm-roberta": roberta.XLM_ROBERTA,
    "camembert": roberta.CAMEMBERT,
    "electra": bert.ELECTRA,
    "distilbert": bert.DISTILBERT,
    "albert": bert.ALBERT,
    "modernbert": modernbert.MODERNBERT,
    "mpnet": relative.MPNET,
    "deberta-v2": relative.DEBERTA_V2,
    "ernie": bert.ERNIE,
    "rembert": bert.REMBERT,
    "data2vec-text": roberta.DATA2VEC_TEXT,
    "roberta-prelayernorm": roberta.ROBERTA_PRELAYERNORM,
    "xlm-roberta-xl": roberta.XLM_ROBERTA_XL,
}
# Beginnings of our names of the weights above the encoder; BERT's pooler is one of them.
HEAD = ("head_dense.", "head_norm.", "head_output.")
_TABLES = ("words", "positions", "types", "task_types", "relative_positions")


def why_not_packed(config: dict[str, Any]) -> str | None:
    """The reason why an encoder with this config.json must run padded; None if it can run packed."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return f"model_type {config.get('model_type')!r} is not one of {', '.join(FAMILIES)}"
    return family.why_unknown(config)


def weight_names(family: Family, shape: EncoderShape) -> dict[str, str | tuple[str, str, str]]:
    """Our parameter name -> the name, or the three names of a fused product, in transformers."""
    named: dict[str, str | tuple[str, str, str]] = {}
    for ours, theirs in family.outside.items():
        if shape.has_part(ours):
            named.update({f"{ours}.{kind}": f"{theirs}.{kind}" for kind in _kinds(ours, shape)})
    for n in range(1 if shape.shared_layers else shape.layers):
        prefix = family.layer.format(n=n)
        for ours, theirs in family.inside.items():
            if not shape.has_part(ours, layer=n):
                continue
            for kind in _kinds(ours, shape):
                parts = theirs if isinstance(theirs, tuple) else (theirs,)
                full = tuple(f"{prefix}{part}.{kind}" for part in parts)
                named[f"layers.{n}.{ours}.{kind}"] = full if len(full) > 1 else full[0]
    return named


def _kinds(part: str, shape: EncoderShape) -> tuple[str, ...]:
    return ("weight",) if part in _TABLES or not shape.has_bias(part) else ("weight", "bias")
