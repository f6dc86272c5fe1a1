"""BERT and the families that changed its embeddings, its names or its sharing of weights."""

from __future__ import annotations

from dataclasses import replace

from bert_glue.model.family.description import (
    BERT_KEYS,
    BERT_LAYER,
    GOOGLE_KEYS,
    Family,
    Names,
    bert_names,
    bert_shape,
    key_set,
)
from bert_glue.model.shape import EncoderShape

BERT = Family(
    prefix="bert",
    architecture="BertForSequenceClassification",
    shape=bert_shape,
    outside=bert_names("bert", "bert.pooler.dense", "classifier"),
    layer="bert.encoder.layer.{n}.",
    inside=BERT_LAYER,
    keys=BERT_KEYS,
    unread=GOOGLE_KEYS,
)


def _ernie_shape(config: dict, labels: int) -> EncoderShape:
    # The classifier's inputs have no task type: every token has task 0.
    tasks = config.get("task_type_vocab_size", 3) if config.get("use_task_id", False) else 0
    return replace(bert_shape(config, labels), task_types=tasks)


ERNIE = Family(
    prefix="ernie",
    architecture="ErnieForSequenceClassification",
    shape=_ernie_shape,
    outside={
        **bert_names("ernie", "ernie.pooler.dense", "classifier"),
        "task_types": "ernie.embeddings.task_type_embeddings",
    },
    layer="ernie.encoder.layer.{n}.",
    inside=BERT_LAYER,
    keys=BERT_KEYS | {"use_task_id", "task_type_vocab_size"},
)


def _electra_shape(config: dict, labels: int) -> EncoderShape:
    shape = bert_shape({**config, "embedding_size": config.get("embedding_size", 128)}, labels)
    return replace(shape, head_activation="gelu", head_dropouts=(shape.head_dropouts[1],) * 2)


ELECTRA = Family(
    prefix="electra",
    architecture="ElectraForSequenceClassification",
    shape=_electra_shape,
    outside={
        **bert_names("electra", "classifier.dense", "classifier.out_proj"),
        "projection": "electra.embeddings_project",
    },
    layer="electra.encoder.layer.{n}.",
    inside=BERT_LAYER,
    keys=BERT_KEYS,
    unread=key_set(
        """
    summary_type summary_use_proj summary_activation summary_last_dropout generator_size
    """
    ),
)


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
    return replace(bert_shape(as_bert, labels), head_activation="relu")


_DISTILBERT_LAYER: Names = {
    "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "feed_forward": "ffn.lin1",
    "feed_forward_output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
DISTILBERT = Family(
    prefix="distilbert",
    architecture="DistilBertForSequenceClassification",
    shape=_distilbert_shape,
    outside=bert_names("distilbert", "pre_classifier", "classifier"),
    layer="distilbert.transformer.layer.{n}.",
    inside=_DISTILBERT_LAYER,
    keys=key_set(
        """
    vocab_size dim n_layers n_heads hidden_dim max_position_embeddings activation dropout
    attention_dropout seq_classif_dropout
    """
    ),
    unread=frozenset({"qa_dropout"}),
    only={"sinusoidal_pos_embds": ((False, None), "it has sinusoidal positions")},
    dropout_keys=("dropout", "attention_dropout"),
    activation_keys=("activation",),
)


def _albert_shape(config: dict, labels: int) -> EncoderShape:
    # ALBERT's own defaults: it was pretrained without dropout.
    defaults = {"embedding_size": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    shape = bert_shape({**defaults, **config}, labels)
    # transformers' ALBERT has no dropout after its feed-forward.
    return replace(
        shape,
        shared_layers=True,
        output_dropout=0.0,
        activation=config.get("hidden_act", "gelu_new"),
        head_dropouts=(0.0, config.get("classifier_dropout_prob", 0.1)),
    )


_ALBERT_LAYER: Names = {
    "qkv": ("attention.query", "attention.key", "attention.value"),
    "attention_output": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "feed_forward": "ffn",
    "feed_forward_output": "ffn_output",
    "output_norm": "full_layer_layer_norm",
}
_GROUPS = "it has several groups of shared layers"
ALBERT = Family(
    prefix="albert",
    architecture="AlbertForSequenceClassification",
    shape=_albert_shape,
    outside={
        **bert_names("albert", "albert.pooler", "classifier"),
        "projection": "albert.encoder.embedding_hidden_mapping_in",
    },
    layer="albert.encoder.albert_layer_groups.0.albert_layers.0.",
    inside=_ALBERT_LAYER,
    keys=BERT_KEYS | {"classifier_dropout_prob"},
    unread=key_set("net_structure_type num_memory_blocks gap_size down_scale_factor"),
    only={"num_hidden_groups": ((1,), _GROUPS), "inner_group_num": ((1,), _GROUPS)},
)


def _rembert_shape(config: dict, labels: int) -> EncoderShape:
    defaults = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    as_bert = {**defaults, **config, "embedding_size": config.get("input_embedding_size", 256)}
    shape = bert_shape(as_bert, labels)
    return replace(shape, always_projects=True, head_dropouts=(0.0, config.get("classifier_dropout_prob", 0.1)))


REMBERT = Family(
    prefix="rembert",
    architecture="RemBertForSequenceClassification",
    shape=_rembert_shape,
    outside={
        **bert_names("rembert", "rembert.pooler.dense", "classifier"),
        "projection": "rembert.encoder.embedding_hidden_mapping_in",
    },
    layer="rembert.encoder.layer.{n}.",
    inside=BERT_LAYER,
    keys=(BERT_KEYS - {"embedding_size", "classifier_dropout"}) | {"input_embedding_size", "classifier_dropout_prob"},
    unread=frozenset({"output_embedding_size"}),
)
