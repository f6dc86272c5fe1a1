"""What a family of encoders is, for the one encoder that reads it: sizes, names of weights, and known keys.

Everything is read from the JSON and safetensors files directly, because the import of transformers' model code takes
seconds before the first step. The names were checked against transformers 5.23 `*ForSequenceClassification`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bert_glue.model.shape import ACTIVATIONS, EncoderShape

Names = dict[str, str | tuple[str, str, str]]
# Key of config.json -> the values that a family is described for, and what any other value means.
OnlyValues = dict[str, tuple[tuple[Any, ...], str]]


def key_set(names: str) -> frozenset[str]:
    """The keys in a text, separated by spaces and line breaks."""
    return frozenset(names.split())


@dataclass(frozen=True)
class Family:
    """One family of encoders.

    Args:
        prefix: prefix of the encoder's weights in a `*ForSequenceClassification` file.
        architecture: class name for config.json.
        shape: function of config.json and the number of labels that returns the sizes.
        outside: our name -> name of weights outside the layers, head included.
        layer: name of layer `{n}`, with its final dot.
        inside: our name -> name of a layer's weights; `qkv` is one name, or three of separate products.
        keys: keys of config.json that `shape` reads.
        unread: keys that transformers' class has or published models carry, and that change no logit.
        only: keys that may have the named values alone.
        dropout_keys: config.json's names of hidden and attention dropout.
        activation_keys: config.json's names of activations.
    """

    prefix: str
    architecture: str
    shape: Callable[[dict, int], EncoderShape]
    outside: dict[str, str]
    layer: str
    inside: Names
    keys: frozenset[str]
    unread: frozenset[str] = frozenset()
    only: OnlyValues = field(default_factory=dict)
    dropout_keys: tuple[str, str] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    activation_keys: tuple[str, ...] = ("hidden_act",)

    def why_unknown(self, config: dict[str, Any]) -> str | None:
        """The key of config.json that this description does not know, or knows with other values; None if none."""
        for key, value in config.items():
            values, meaning = self.only.get(key) or _ONLY.get(key) or (None, "")
            if values is not None:
                if value not in values:
                    return f"{meaning} ({key} {value!r})"
            # A key that is off cannot change what is computed; any other may, so it is never guessed.
            elif value and not (key in self.keys or key in self.unread or key in _UNREAD or key.startswith("_")):
                return f"its config.json has the key {key} ({value!r}), which is not described for this family"
        for key in self.activation_keys:
            if config.get(key, "gelu") not in ACTIVATIONS:
                return f"activation {config[key]!r} is not one of {', '.join(ACTIVATIONS)}"
        return None


_ONLY: OnlyValues = {
    "position_embedding_type": (("absolute", None), "its positions are not absolute: position_embedding_type"),
    "is_decoder": ((False, None), "it is a decoder"),
    "is_encoder_decoder": ((False, None), "it has a decoder"),
    "add_cross_attention": ((False, None), "it has cross-attention"),
    "pruned_heads": (({}, None), "some of its heads are pruned"),
    "quantization_config": ((None,), "its weights are quantised"),
}
# Keys of every model of transformers, of generation, and of tools that write config.json. None changes a logit.
_UNREAD = key_set(
    """
    architectures model_type transformers_version torch_dtype dtype problem_type finetuning_task
    id2label label2id num_labels name_or_path tokenizer_class auto_map task_specific_params prefix
    license language adapters initializer_range initializer_factor use_cache gradient_checkpointing
    attn_implementation torchscript use_bfloat16 tf_legacy_loss return_dict use_return_dict
    output_attentions output_hidden_states output_past chunk_size_feed_forward
    cross_attention_hidden_size tie_word_embeddings tie_encoder_decoder tie_weights_ pad_token_id
    bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate remove_invalid_values exponential_decay_length_penalty model_max_length
    save_step
    """
)

# ---- what most families share ----

BERT_KEYS = key_set(
    """
    vocab_size embedding_size hidden_size num_hidden_layers num_attention_heads intermediate_size
    max_position_embeddings type_vocab_size hidden_act layer_norm_eps hidden_dropout_prob
    attention_probs_dropout_prob classifier_dropout
    """
)
# What Google's conversions carry; transformers' classifiers read none of them.
GOOGLE_KEYS = key_set(
    """
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type
    """
)
BERT_LAYER: Names = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward": "intermediate.dense",
    "feed_forward_output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def bert_shape(config: dict, labels: int) -> EncoderShape:
    """Sizes under BERT's keys, with BERT's defaults.

    Raises:
        KeyError: config.json lacks a size.
    """
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


def bert_names(prefix: str, head_dense: str, head_output: str) -> dict[str, str]:
    """Our names -> names of the weights outside the layers, as BERT has them below `prefix`."""
    return {
        "words": f"{prefix}.embeddings.word_embeddings",
        "positions": f"{prefix}.embeddings.position_embeddings",
        "types": f"{prefix}.embeddings.token_type_embeddings",
        "embedding_norm": f"{prefix}.embeddings.LayerNorm",
        "head_dense": head_dense,
        "head_output": head_output,
    }
