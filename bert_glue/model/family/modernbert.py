"""ModernBERT (Warner et al. 2024, arXiv 2412.13663) and the models with its class, such as Ettin and mmBERT."""

from __future__ import annotations

from typing import Any

from bert_glue.model.family.description import Family, key_set
from bert_glue.model.shape import EncoderShape

_KINDS = ("full_attention", "sliding_attention")
_BASES = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}


def _layer_kinds(config: dict[str, Any]) -> list[str]:
    every = config.get("global_attn_every_n_layers", 3)
    default = [_KINDS[bool(n % every)] for n in range(config["num_hidden_layers"])]
    return config.get("layer_types") or default


def _base(config: dict[str, Any], kind: str) -> float:
    """Base of the rotary positions of one kind of layer, from either way of writing it."""
    key, default = _BASES[kind]
    written = (config.get("rope_parameters") or {}).get(kind) or {}
    return float(written.get("rope_theta", config.get(key, default)))


def _shape(config: dict[str, Any], labels: int) -> EncoderShape:
    kinds = _layer_kinds(config)
    bases = {kind: _base(config, kind) for kind in _KINDS}
    biases = {"attention": "attention_bias", "feed_forward": "mlp_bias", "norm": "norm_bias"}
    biases["head_dense"] = "classifier_bias"
    attention_dropout = config.get("attention_dropout", 0.0)
    return EncoderShape(
        vocab=config.get("vocab_size", 50368),
        embedding=config["hidden_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        intermediate=config["intermediate_size"],
        positions=config["max_position_embeddings"],
        types=0,
        labels=labels,
        activation=config.get("hidden_activation", "gelu"),
        norm_eps=config.get("norm_eps", 1e-5),
        # transformers' class has one rate for probabilities and for what attention returns.
        hidden_dropout=attention_dropout,
        attention_dropout=attention_dropout,
        embedding_dropout=config.get("embedding_dropout", 0.0),
        inner_dropout=config.get("mlp_dropout", 0.0),
        output_dropout=0.0,
        head_activation=config.get("classifier_activation", "gelu"),
        head_dropouts=(0.0, config.get("classifier_dropout", 0.0)),
        pad_token_id=config.get("pad_token_id", 50283),
        norm_first=True,
        has_first_norm=False,
        has_final_norm=True,
        has_head_norm=True,
        gated=True,
        without_bias=frozenset(part for part, key in biases.items() if not config.get(key, False)),
        has_position_table=False,
        rotary=tuple(bases[kind] for kind in kinds),
        windows=tuple(None if kind == _KINDS[0] else config.get("local_attention", 128) // 2 for kind in kinds),
        pooling=_POOLING[config.get("classifier_pooling", "cls")],
    )


_POOLING = {"cls": "first", "mean": "mean"}


class _ModernBert(Family):
    def why_unknown(self, config: dict[str, Any]) -> str | None:
        """As in `Family`; the keys of rotary positions and of layers have values of their own to check."""
        for kind, written in (config.get("rope_parameters") or {}).items():
            if kind not in _KINDS or not _is_plain_rotation(written):
                return f"its rotary positions are not ModernBERT's (rope_parameters: {kind} {written})"
        kinds = config.get("layer_types") or []
        if any(kind not in _KINDS for kind in kinds) or len(kinds) not in (0, config.get("num_hidden_layers")):
            return f"its layer_types {kinds} are not {' or '.join(_KINDS)} for each of its layers"
        if any(key in config and not config[key] for key, _ in _BASES.values()):
            return "its rotary positions have no base"
        if (config.get("hidden_size", 0) // config.get("num_attention_heads", 1)) % 2:
            return "its heads have an odd number of elements, which cannot be turned in pairs"
        return super().why_unknown(config)


def _is_plain_rotation(written: Any) -> bool:
    if not isinstance(written, dict) or set(written) - {"rope_theta", "rope_type"}:
        return written is None
    base = written.get("rope_theta", 1.0)
    return written.get("rope_type", "default") == "default" and isinstance(base, int | float) and base > 0


MODERNBERT = _ModernBert(
    prefix="model",
    architecture="ModernBertForSequenceClassification",
    shape=_shape,
    outside={
        "words": "model.embeddings.tok_embeddings",
        "embedding_norm": "model.embeddings.norm",
        "final_norm": "model.final_norm",
        "head_dense": "head.dense",
        "head_norm": "head.norm",
        "head_output": "classifier",
    },
    layer="model.layers.{n}.",
    inside={
        "qkv": "attn.Wqkv",
        "attention_output": "attn.Wo",
        "attention_norm": "attn_norm",
        "feed_forward": "mlp.Wi",
        "feed_forward_output": "mlp.Wo",
        "output_norm": "mlp_norm",
    },
    keys=key_set(
        """
    vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size
    max_position_embeddings hidden_activation norm_eps attention_dropout embedding_dropout mlp_dropout
    classifier_activation classifier_dropout pad_token_id attention_bias mlp_bias norm_bias
    classifier_bias local_attention global_attn_every_n_layers layer_types rope_parameters
    global_rope_theta local_rope_theta classifier_pooling
    """
    ),
    unread=key_set(
        """
    decoder_bias deterministic_flash_attn initializer_cutoff_factor reference_compile
    repad_logits_with_grad sparse_prediction sparse_pred_ignore_index layer_norm_eps
    """
    ),
    only={
        "classifier_pooling": (tuple(_POOLING), "its pooling is not cls or mean: classifier_pooling"),
        # Ettin and mmBERT carry the second; transformers' class reads neither.
        "position_embedding_type": (("absolute", "sans_pos", None), "its positions are not rotary"),
    },
    dropout_keys=("mlp_dropout", "attention_dropout"),
    activation_keys=("hidden_activation", "classifier_activation"),
)
