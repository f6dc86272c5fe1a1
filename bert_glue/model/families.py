"""The encoder families that run packed, and the names of their weights in transformers.

A family is one row: how its config.json gives the sizes, and how its weight names translate. Everything is read from
the JSON and safetensors files directly, because the import of transformers' model code takes seconds before the first
step. The names were checked against transformers 5.23 `*ForSequenceClassification`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bert_glue.model.encoder import ACTIVATIONS, EncoderShape


@dataclass(frozen=True)
class Family:
    """One family of encoders.

    Args:
        prefix: prefix of the encoder's weights in a `*ForSequenceClassification` file.
        architecture: class name for config.json.
        shape: function of config.json and the number of labels that returns the sizes.
        outside: our name -> name of weights outside the layers, head included.
        layer: name of layer `{n}`, with its final dot.
        inside: our name -> name of a layer's weights; `qkv` lists three names.
        dropout_keys: config.json's names of hidden and attention dropout.
    """

    prefix: str
    architecture: str
    shape: Callable[[dict, int], EncoderShape]
    outside: dict[str, str]
    layer: str
    inside: dict[str, str | tuple[str, str, str]]
    dropout_keys: tuple[str, str] = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def _bert_shape(config: dict, labels: int) -> EncoderShape:
    hidden_dropout = config.get("hidden_dropout_prob", 0.1)
    head_dropout = config.get("classifier_dropout")
    return EncoderShape(
        vocab=config["vocab_size"],
        embedding=config.get("embedding_size") or config["hidden_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        intermediate=config["intermediate_size"],
        positions=config["max_position_embeddings"],
        types=config.get("type_vocab_size", 2),
        labels=labels,
        activation=config.get("hidden_act", "gelu"),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        hidden_dropout=hidden_dropout,
        attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
        output_dropout=hidden_dropout,
        head_activation="tanh",
        head_dropouts=(0.0, hidden_dropout if head_dropout is None else head_dropout),
        pad_token_id=config.get("pad_token_id", 0),
    )


def _changed(shape: EncoderShape, **changes) -> EncoderShape:
    from dataclasses import replace

    return replace(shape, **changes)


def _roberta_shape(config: dict, labels: int) -> EncoderShape:
    shape = _bert_shape({**config, "embedding_size": None}, labels)
    pad = config.get("pad_token_id", 1)
    both = (shape.head_dropouts[1],) * 2
    return _changed(shape, position_offset=pad + 1, pad_token_id=pad, head_dropouts=both)


def _electra_shape(config: dict, labels: int) -> EncoderShape:
    shape = _bert_shape({**config, "embedding_size": config.get("embedding_size", 128)}, labels)
    return _changed(shape, head_activation="gelu", head_dropouts=(shape.head_dropouts[1],) * 2)


def _distilbert_shape(config: dict, labels: int) -> EncoderShape:
    drop = config.get("dropout", 0.1)
    as_bert = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "intermediate_size": config["hidden_dim"],
        "max_position_embeddings": config["max_position_embeddings"],
        "type_vocab_size": 0,
        "hidden_act": config.get("activation", "gelu"),
        "hidden_dropout_prob": drop,
        "attention_probs_dropout_prob": config.get("attention_dropout", 0.1),
        "classifier_dropout": config.get("seq_classif_dropout", 0.2),
    }
    return _changed(_bert_shape(as_bert, labels), head_activation="relu")


def _albert_shape(config: dict, labels: int) -> EncoderShape:
    # ALBERT's own defaults: it was pretrained without dropout.
    defaults = {"embedding_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = _bert_shape({**defaults, **config}, labels)
    # transformers' ALBERT has no dropout after its feed-forward.
    return _changed(
        shape,
        shared_layers=True,
        output_dropout=0.0,
        activation=config.get("hidden_act", "gelu_new"),
        head_dropouts=(0.0, config.get("classifier_dropout_prob", 0.1)),
    )


def _bert_names(prefix: str, head_dense: str, head_output: str) -> dict[str, str]:
    return {
        "words": f"{prefix}.embeddings.word_embeddings",
        "positions": f"{prefix}.embeddings.position_embeddings",
        "types": f"{prefix}.embeddings.token_type_embeddings",
        "embedding_norm": f"{prefix}.embeddings.LayerNorm",
        "head_dense": head_dense,
        "head_output": head_output,
    }


_BERT_LAYER: dict[str, str | tuple[str, str, str]] = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward": "intermediate.dense",
    "feed_forward_output": "output.dense",
    "output_norm": "output.LayerNorm",
}

_DISTILBERT_LAYER: dict[str, str | tuple[str, str, str]] = {
    "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "feed_forward": "ffn.lin1",
    "feed_forward_output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}

_ALBERT_LAYER: dict[str, str | tuple[str, str, str]] = {
    "qkv": ("attention.query", "attention.key", "attention.value"),
    "attention_output": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "feed_forward": "ffn",
    "feed_forward_output": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}


def _roberta(architecture: str) -> Family:
    return Family(
        prefix="roberta",
        architecture=f"{architecture}ForSequenceClassification",
        shape=_roberta_shape,
        outside=_bert_names("roberta", "classifier.dense", "classifier.out_proj"),
        layer="roberta.encoder.layer.{n}.",
        inside=_BERT_LAYER,
    )


FAMILIES: dict[str, Family] = {
    "bert": Family(
        prefix="bert",
        architecture="BertForSequenceClassification",
        shape=_bert_shape,
        outside=_bert_names("bert", "bert.pooler.dense", "classifier"),
        layer="bert.encoder.layer.{n}.",
        inside=_BERT_LAYER,
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "electra": Family(
        prefix="electra",
        architecture="ElectraForSequenceClassification",
        shape=_electra_shape,
        outside={
            **_bert_names("electra", "classifier.dense", "classifier.out_proj"),
            "projection": "electra.embeddings_project",
        },
        layer="electra.encoder.layer.{n}.",
        inside=_BERT_LAYER,
    ),
    "distilbert": Family(
        prefix="distilbert",
        architecture="DistilBertForSequenceClassification",
        shape=_distilbert_shape,
        outside=_bert_names("distilbert", "pre_classifier", "classifier"),
        layer="distilbert.transformer.layer.{n}.",
        inside=_DISTILBERT_LAYER,
        dropout_keys=("dropout", "attention_dropout"),
    ),
    "albert": Family(
        prefix="albert",
        architecture="AlbertForSequenceClassification",
        shape=_albert_shape,
        outside={
            **_bert_names("albert", "albert.pooler", "classifier"),
            "projection": "albert.encoder.embedding_hidden_mapping_in",
        },
        layer="albert.encoder.albert_layer_groups.0.albert_layers.0.",
        inside=_ALBERT_LAYER,
    ),
}


def why_not_packed(config: dict) -> str | None:
    """The reason why an encoder with this config.json must run padded; None if it can run packed."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return f"model_type {config.get('model_type')!r} is not one of {', '.join(FAMILIES)}"
    if config.get("position_embedding_type", "absolute") != "absolute":
        return f"position_embedding_type {config['position_embedding_type']!r} is not absolute"
    if config.get("num_hidden_groups", 1) != 1 or config.get("inner_group_num", 1) != 1:
        return "it has several groups of shared layers"
    if config.get("is_decoder") or config.get("sinusoidal_pos_embds"):
        return "it is a decoder or has sinusoidal positions"
    activation = config.get("hidden_act", config.get("activation", "gelu"))
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return None


def weight_names(family: Family, shape: EncoderShape) -> dict[str, str | tuple[str, str, str]]:
    """Our parameter name -> the name, or the three names of a fused product, in transformers."""
    pairs = dict(family.outside)
    if not shape.types:
        pairs.pop("types")
    if shape.embedding == shape.hidden and "projection" in pairs and not shape.shared_layers:
        pairs.pop("projection")
    named: dict[str, str | tuple[str, str, str]] = {}
    for ours, theirs in pairs.items():
        kinds = ("weight",) if ours in ("words", "positions", "types") else ("weight", "bias")
        named.update({f"{ours}.{kind}": f"{theirs}.{kind}" for kind in kinds})
    for n in range(1 if shape.shared_layers else shape.layers):
        prefix = family.layer.format(n=n)
        for ours, theirs in family.inside.items():
            for kind in ("weight", "bias"):
                parts = theirs if isinstance(theirs, tuple) else (theirs,)
                full = tuple(f"{prefix}{part}.{kind}" for part in parts)
                named[f"layers.{n}.{ours}.{kind}"] = full if len(full) > 1 else full[0]
    return named
