"""A BERT-family encoder and its classification head over packed batches: no padding is computed.

The module computes the same function as transformers' `*ForSequenceClassification` with the same weights; tests compare
both. It differs in three points. Query, key and value are one product. The last layer runs its query, output and
feed-forward only for the first token of each sequence, which is all that the head reads; this saves 10/12 of a layer.
The embedding table can be narrowed to the rows that the data uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from bert_glue.data.packing import PackedLayout
from bert_glue.model.attention import attend
from bert_glue.model.layers import DropoutMasks, Linear, dropout

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}

_MASKS_PER_LAYER = 4


@dataclass(frozen=True)
class EncoderShape:
    """Sizes and constants of one encoder with its head.

    Args:
        embedding: width of the embedding table; a projection follows if it differs from `hidden`.
        types: rows of the token-type table; 0 if the family has none.
        position_offset: position id of a sequence's first token (2 for the RoBERTa family).
        output_dropout: dropout after the feed-forward, in [0, 1).
        shared_layers: True if all layers share one set of weights (ALBERT).
        head_activation: activation between the head's dense layer and its classifier.
        head_dropouts: dropout before the head's dense layer and before its classifier, in [0, 1].
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


class PackedLayer(nn.Module):
    """One transformer layer, post-norm as in Devlin et al. 2019."""

    def __init__(self, shape: EncoderShape):
        super().__init__()
        self.shape = shape
        self.qkv = Linear(shape.hidden, 3 * shape.hidden)
        self.attention_output = Linear(shape.hidden, shape.hidden)
        self.attention_norm = nn.LayerNorm(shape.hidden, eps=shape.norm_eps)
        self.feed_forward = Linear(shape.hidden, shape.intermediate)
        self.feed_forward_output = Linear(shape.intermediate, shape.hidden)
        self.output_norm = nn.LayerNorm(shape.hidden, eps=shape.norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        layout: PackedLayout,
        dropout_masks: DropoutMasks | None,
        mask_id: int,
        cls_positions=None,
    ) -> torch.Tensor:
        """Run the layer: `[tokens, hidden] -> [tokens, hidden]`, or `[sequences, hidden]` with `cls_positions`.

        Args:
            layout: cumulative lengths of the sequences, on the host.
            dropout_masks: None turns dropout off.
            mask_id: number of the layer's first dropout within the model.
            cls_positions: position of each sequence's first token, `[sequences]`, in the last layer; None elsewhere.
        """
        drop = self.shape.attention_dropout
        query, key, value = self._projections(x, cls_positions, dropout_masks, mask_id)
        context = attend(query, key, value, layout, cls_positions is not None, drop, dropout_masks, mask_id).flatten(1)
        return self._after_attention(context, x if cls_positions is None else x[cls_positions], dropout_masks, mask_id)

    def _after_attention(
        self, context: torch.Tensor, residual: torch.Tensor, dropout_masks: DropoutMasks | None, mask_id: int
    ) -> torch.Tensor:
        """Two times `[rows, hidden]` -> `[rows, hidden]`; `--torch_compile` compiles this part of a layer."""
        shape = self.shape
        # Every operation here works row by row and does not know where sequences begin, so that one compiled graph
        # serves every packing.
        attended = self.attention_output(context, dropout_masks, mask_id)
        # On a CPU dropout adds the residual in its own pass, which saves a read and a write of `[rows, hidden]`.
        x = self.attention_norm(dropout(attended, shape.hidden_dropout, dropout_masks, mask_id + 1, residual))
        inner = ACTIVATIONS[shape.activation](self.feed_forward(x, dropout_masks, mask_id + 1))
        outer = self.feed_forward_output(inner, dropout_masks, mask_id + 2)
        return self.output_norm(dropout(outer, shape.output_dropout, dropout_masks, mask_id + 2, x))

    def _projections(self, x, cls_positions, dropout_masks, mask_id) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, heads = self.shape.hidden, self.shape.heads
        # One product of three times the width reads `x` once instead of three times, and is one launch instead of
        # three. Query, key and value are views of its output.
        if cls_positions is None:
            return self.qkv(x, dropout_masks, mask_id + 3).view(len(x), 3, heads, -1).unbind(1)
        # The head reads first tokens alone, so that the last layer needs no other queries. With n tokens a sequence,
        # 1/n of the query, output and feed-forward products remains. Keys and values are needed for all tokens.
        # The query has the first mask id of the next layer, which does not exist.
        query = self.qkv.rows(x[cls_positions], slice(0, hidden), dropout_masks, mask_id + 4)
        key_value = self.qkv.rows(x, slice(hidden, None), dropout_masks, mask_id + 3).view(len(x), 2, heads, -1)
        return query.view(len(cls_positions), heads, -1), *key_value.unbind(1)


class PackedClassifier(nn.Module):
    """Embeddings, layers and head; families.py translates the parameter names to those of transformers.

    Args:
        shape: sizes of the encoder and its head.
        gradient_checkpointing: whether backward computes each layer again instead of keeping its activations.
    """

    def __init__(self, shape: EncoderShape, gradient_checkpointing: bool = False):
        super().__init__()
        self.shape = shape
        self.gradient_checkpointing = gradient_checkpointing
        self.words = nn.Embedding(shape.vocab, shape.embedding)
        self.positions = nn.Embedding(shape.positions, shape.embedding)
        self.types = nn.Embedding(shape.types, shape.embedding) if shape.types else None
        self.embedding_norm = nn.LayerNorm(shape.embedding, eps=shape.norm_eps)
        # ALBERT always has a projection, ELECTRA only where the widths differ.
        needs_projection = shape.shared_layers or shape.embedding != shape.hidden
        self.projection = Linear(shape.embedding, shape.hidden) if needs_projection else None
        count = 1 if shape.shared_layers else shape.layers
        self.layers = nn.ModuleList(PackedLayer(shape) for _ in range(count))
        self.head_dense = Linear(shape.hidden, shape.hidden)
        self.head_output = Linear(shape.hidden, shape.labels)

    def forward(
        self,
        input_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        position_ids: torch.Tensor,
        layout: PackedLayout,
        dropout_masks: DropoutMasks | None = None,
    ) -> torch.Tensor:
        """The logits of each sample, in the order of the samples.

        Args:
            input_ids, token_type_ids, position_ids: `[1, tokens]` integers on the model's device.
            layout: cumulative lengths of the sequences, on the host.
            dropout_masks: None turns dropout off.

        Returns:
            `[batch, labels]`.
        """
        shape = self.shape
        x = self._embed(input_ids[0], token_type_ids[0], position_ids[0], dropout_masks)
        # One copy to the device a batch, without a wait; every layer reads the same tensor.
        all_cls_positions = layout.cu_seqlens(x.device)[:-1].long()
        for number in range(shape.layers):
            cls_positions = all_cls_positions if number == shape.layers - 1 else None
            layer = self.layers[0 if shape.shared_layers else number]
            mask_id = _MASKS_PER_LAYER * (number + 1)
            # Gradient checkpointing keeps one `[tokens, hidden]` a layer instead of every intermediate result. The
            # second forward pass is a third more work. It draws the same dropout masks, which follow from their ids.
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, layout, dropout_masks, mask_id, cls_positions, use_reentrant=False)
            else:
                x = layer(x, layout, dropout_masks, mask_id, cls_positions)
        # Filler that rounds up the token count is one more sequence at the end, without logits.
        return self._head(x[: len(layout.lengths)], dropout_masks)

    def _embed(self, input_ids, token_type_ids, position_ids, dropout_masks) -> torch.Tensor:
        x = self.words(input_ids) + self.positions(position_ids + self.shape.position_offset)
        if self.types is not None:
            x = x + self.types(token_type_ids)
        x = dropout(self.embedding_norm(x), self.shape.hidden_dropout, dropout_masks, 0)
        return x if self.projection is None else self.projection(x)

    def _head(self, first: torch.Tensor, dropout_masks: DropoutMasks | None) -> torch.Tensor:
        before_dense, before_output = self.shape.head_dropouts
        x = self.head_dense(dropout(first, before_dense, dropout_masks, 1))
        x = ACTIVATIONS[self.shape.head_activation](x)
        return self.head_output(dropout(x, before_output, dropout_masks, 2))
