"""Sizes and constants of an encoder with its head: all that the one encoder reads of a family and a config.json."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Disentangled:
    """DeBERTa's attention by content and relative position (He et al. 2021, arXiv 2006.03654 and 2111.09543).

    Args:
        span: relative positions that a table row stands for, on each side.
        buckets: whether distances beyond `span / 2` share rows by their logarithm.
        longest: distance at which the last row begins, tokens.
        has_own_products: whether positions have products of their own; else those of keys and queries.
        terms: of "c2p" (content to position) and "p2c" (position to content), those that are added.
        has_norm: whether the table of relative positions has a norm.
    """

    span: int
    buckets: bool
    longest: int
    has_own_products: bool
    terms: tuple[str, ...]
    has_norm: bool


@dataclass(frozen=True)
class EncoderShape:
    """Sizes and constants of one encoder with its head.

    Args:
        embedding: width of the embedding table; a projection follows where it differs from `hidden`.
        intermediate: width of the feed-forward; a gated one has twice as many outputs.
        positions: longest sequence plus `position_offset`, tokens; rows of the position table if there is one.
        types: rows of the token-type table; 0 if the family has none.
        activation: activation of the feed-forward.
        hidden_dropout: dropout after the embeddings and after attention, in [0, 1).
        output_dropout: dropout after the feed-forward, in [0, 1).
        head_activation: activation between the head's dense layer and its classifier.
        head_dropouts: dropout before the head's dense layer and before its classifier, in [0, 1].
        position_offset: position id of a sequence's first token (2 for the RoBERTa family).
        shared_layers: True if all layers share one set of weights (ALBERT).
        always_projects: whether there is a projection although the widths are equal.
        task_types: rows of the table of tasks, of which every token has the first (ERNIE); 0 for none.
        norm_first: whether the norms come before attention and feed-forward, and not after them.
        has_embedding_norm, has_final_norm: a norm after the embeddings, and after the last layer.
        has_first_norm: whether the first layer has a norm before attention (with `norm_first`).
        gated: whether the feed-forward multiplies half of its outputs by the activation of the other half.
        inner_dropout: dropout inside the feed-forward, in [0, 1).
        embedding_dropout: dropout after the embeddings; None means `hidden_dropout`.
        without_bias: parts without a bias, of "attention", "feed_forward", "norm", "head_dense".
        has_position_table: whether positions are added to the embeddings.
        rotary: base of each layer's rotary positions; () for none.
        windows: tokens that each layer's attention sees to both sides, None for all; () if no layer has a window.
        relative_buckets: rows of a table of biases by relative position, a column a head (MPNet); 0 for none.
        disentangled: DeBERTa's attention; None for the usual one.
        has_head_norm: whether a norm follows the head's activation.
        pooling: "first" for the first token of each sequence, "mean" for the mean of its tokens.
    """

    vocab: int
    embedding: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int
    types: int
    labels: int
    activation: str
    norm_eps: float
    hidden_dropout: float
    attention_dropout: float
    output_dropout: float
    head_activation: str
    head_dropouts: tuple[float, float]
    position_offset: int = 0
    shared_layers: bool = False
    pad_token_id: int | None = 0
    always_projects: bool = False
    task_types: int = 0
    norm_first: bool = False
    has_embedding_norm: bool = True
    has_final_norm: bool = False
    has_first_norm: bool = True
    gated: bool = False
    inner_dropout: float = 0.0
    embedding_dropout: float | None = None
    without_bias: frozenset[str] = frozenset()
    has_position_table: bool = True
    rotary: tuple[float, ...] = ()
    windows: tuple[int | None, ...] = ()
    relative_buckets: int = 0
    disentangled: Disentangled | None = None
    has_head_norm: bool = False
    pooling: str = "first"

    @property
    def has_projection(self) -> bool:
        """Whether a product leads from the width of the embeddings to that of the layers."""
        # ALBERT always has one, ELECTRA only where the widths differ.
        return self.shared_layers or self.always_projects or self.embedding != self.hidden

    @property
    def has_relative_scores(self) -> bool:
        """Whether attention adds to its scores by relative position."""
        return self.disentangled is not None or self.relative_buckets > 0

    def window(self, layer: int) -> int | None:
        """Tokens that a layer's attention sees to both sides; None for all."""
        return self.windows[layer] if self.windows else None

    def has_part(self, part: str, layer: int | None = None) -> bool:
        """Whether this encoder, or one of its layers, has the weights that are called `part`."""
        own = self.disentangled if self.disentangled and self.disentangled.has_own_products else None
        optional = {
            "positions": self.has_position_table,
            "types": self.types > 0,
            "task_types": self.task_types > 0,
            "embedding_norm": self.has_embedding_norm,
            "projection": self.has_projection,
            "final_norm": self.has_final_norm,
            "head_norm": self.has_head_norm,
            "relative_positions": self.has_relative_scores,
            "relative_norm": self.disentangled is not None and self.disentangled.has_norm,
            "attention_norm": self.has_first_norm or layer != 0,
            "position_key": own is not None and "c2p" in own.terms,
            "position_query": own is not None and "p2c" in own.terms,
        }
        return optional.get(part, True)

    def has_bias(self, part: str) -> bool:
        """Whether the product or norm that is called `part` has a bias."""
        if part.endswith("norm"):
            return "norm" not in self.without_bias
        kinds = {"qkv": "attention", "attention_output": "attention", "feed_forward_output": "feed_forward"}
        return kinds.get(part, part) not in self.without_bias
