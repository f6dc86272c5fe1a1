"""An encoder with its classification head over packed batches: no padding is computed.

One module serves every family; its `EncoderShape` says which parts a family has (docs/families.md). It computes the
same function as transformers' `*ForSequenceClassification` with the same weights; tests compare both. It differs in
three points. Query, key and value are one product. Where the head reads first tokens alone, the last layer runs its
query, output and feed-forward only for the first token of each sequence; this saves 10/12 of a layer. The embedding
table can be narrowed to the rows that the data uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bert_glue.data.packing import PackedLayout
from bert_glue.devices.device import has_slow_scatter
from bert_glue.model.attention import attend
from bert_glue.model.embedding import Embedding
from bert_glue.model.kernels.positions import Rotary, mean_of_sequences, rotate
from bert_glue.model.kernels.relative import RelativeTable, attend_relative, read_table
from bert_glue.model.layers import DropoutMasks, Linear, dropout
from bert_glue.model.shape import ACTIVATIONS, EncoderShape

_MASKS_PER_LAYER = 4
# The products of relative positions, beside those of tokens: a layer's adapters drop other elements of them.
_POSITION_MASK_IDS = 1 << 17


@dataclass
class Positions:
    """What all layers read of the positions in one batch, computed once.

    Args:
        rotary: by base, the rotation of each token.
        relative: the rows of the table of relative positions that the batch needs; None without such a table.
    """

    rotary: dict[float, Rotary]
    relative: RelativeTable | None


class PackedLayer(nn.Module):
    """One transformer layer: norms after its parts (Devlin et al. 2019) or before them (Xiong et al. 2020).

    Args:
        number: number of the layer, from 0.
    """

    def __init__(self, shape: EncoderShape, number: int = 0):
        super().__init__()
        self.shape = shape
        self.number = number
        width, inner = shape.hidden, shape.intermediate
        self.qkv = _linear(shape, "qkv", width, 3 * width)
        self.attention_output = _linear(shape, "attention_output", width, width)
        self.attention_norm = _norm(shape, width) if shape.has_part("attention_norm", number) else None
        self.feed_forward = _linear(shape, "feed_forward", width, inner * (2 if shape.gated else 1))
        self.feed_forward_output = _linear(shape, "feed_forward_output", inner, width)
        self.output_norm = _norm(shape, width)
        for part in ("position_key", "position_query"):
            if shape.has_part(part):
                setattr(self, part, Linear(width, width))

    def forward(
        self,
        x: torch.Tensor,
        layout: PackedLayout,
        dropout_masks: DropoutMasks | None,
        mask_id: int,
        cls_positions=None,
        positions: Positions | None = None,
    ) -> torch.Tensor:
        """Run the layer: `[tokens, hidden] -> [tokens, hidden]`, or `[sequences, hidden]` with `cls_positions`.

        Args:
            layout: cumulative lengths of the sequences, on the host.
            dropout_masks: None turns dropout off.
            mask_id: number of the layer's first dropout within the model.
            cls_positions: position of each sequence's first token, `[sequences]`, in the last layer; None elsewhere.
            positions: what the batch's positions add; None for a family that adds them to the embeddings alone.
        """
        shape = self.shape
        inner = self.attention_norm(x) if shape.norm_first and self.attention_norm is not None else x
        query, key, value = self._projections(inner, cls_positions, dropout_masks, mask_id)
        if shape.rotary:
            query, key = rotate(query, key, positions.rotary[shape.rotary[self.number]], cls_positions)
        first_only, drop = cls_positions is not None, shape.attention_dropout
        if shape.has_relative_scores:
            table = self._relative(positions.relative, dropout_masks, mask_id)
            context = attend_relative(query, key, value, layout, first_only, drop, dropout_masks, mask_id, table)
        else:
            seen = layout.within(shape.window(self.number))
            context = attend(query, key, value, seen, first_only, drop, dropout_masks, mask_id)
        residual = x if cls_positions is None else _first_tokens(x, cls_positions)
        return self._after_attention(context.flatten(1), residual, dropout_masks, mask_id)

    def _after_attention(
        self, context: torch.Tensor, residual: torch.Tensor, dropout_masks: DropoutMasks | None, mask_id: int
    ) -> torch.Tensor:
        """Two times `[rows, hidden]` -> `[rows, hidden]`; `--torch_compile` compiles this part of a layer."""
        shape = self.shape
        # Every operation here works row by row and does not know where sequences begin, so that one compiled graph
        # serves every packing.
        attended = self.attention_output(context, dropout_masks, mask_id)
        # On a CPU dropout adds the residual in its own pass, which saves a read and a write of `[rows, hidden]`.
        x = dropout(attended, shape.hidden_dropout, dropout_masks, mask_id + 1, residual)
        if not shape.norm_first:
            x = self.attention_norm(x)
        inner = self.feed_forward(self.output_norm(x) if shape.norm_first else x, dropout_masks, mask_id + 1)
        if shape.gated:
            inner, gate = inner.chunk(2, -1)
            inner = ACTIVATIONS[shape.activation](inner) * gate
        else:
            inner = ACTIVATIONS[shape.activation](inner)
        inner = dropout(inner, shape.inner_dropout, dropout_masks, mask_id + 3)
        outer = self.feed_forward_output(inner, dropout_masks, mask_id + 2)
        x = dropout(outer, shape.output_dropout, dropout_masks, mask_id + 2, x)
        return x if shape.norm_first else self.output_norm(x)

    def _projections(self, x, cls_positions, dropout_masks, mask_id) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, heads = self.shape.hidden, self.shape.heads
        # One product of three times the width reads `x` once instead of three times, and is one launch instead of
        # three. Query, key and value are views of its output.
        if cls_positions is None:
            return self.qkv(x, dropout_masks, mask_id + 3).view(len(x), 3, heads, -1).unbind(1)
        # The head reads first tokens alone, so that the last layer needs no other queries. With n tokens a sequence,
        # 1/n of the query, output and feed-forward products remains. Keys and values are needed for all tokens.
        # The query has the first mask id of the next layer, which does not exist.
        query = self.qkv.rows(_first_tokens(x, cls_positions), slice(0, hidden), dropout_masks, mask_id + 4)
        key_value = self.qkv.rows(x, slice(hidden, None), dropout_masks, mask_id + 3).view(len(x), 2, heads, -1)
        return query.view(len(cls_positions), heads, -1), *key_value.unbind(1)

    def _relative(self, table: RelativeTable, dropout_masks, mask_id: int) -> RelativeTable:
        """The table with this layer's keys and queries of relative positions, where the family has them."""
        kind, hidden = self.shape.disentangled, self.shape.hidden
        if kind is None:
            return table
        # The free mask id of a layer: nothing else drops at it in these families.
        rows = dropout(table.rows, self.shape.hidden_dropout, dropout_masks, mask_id + 3)
        products = {"c2p": (1, "position_key"), "p2c": (0, "position_query")}
        found: dict[str, torch.Tensor] = {}
        for number, (term, (part, own)) in enumerate(products.items()):
            if term not in kind.terms:
                continue
            low_rank_id = _POSITION_MASK_IDS + mask_id + number
            if kind.has_own_products:
                product = getattr(self, own)(rows, dropout_masks, low_rank_id)
            else:
                which = slice(part * hidden, (part + 1) * hidden)
                product = self.qkv.rows(rows, which, dropout_masks, low_rank_id)
            found[term] = product.view(len(rows), self.shape.heads, -1)
        return table.with_products(found)


def _first_tokens(x: torch.Tensor, cls_positions: torch.Tensor) -> torch.Tensor:
    # On CUDA the backward of x[..] sorts the positions in a dozen launches. That of index_select adds each row once,
    # because positions are distinct, so that its atomic sums have one order.
    return x.index_select(0, cls_positions) if has_slow_scatter(x.device.type) else x[cls_positions]


def _linear(shape: EncoderShape, part: str, inputs: int, outputs: int) -> Linear:
    return Linear(inputs, outputs, shape.has_bias(part))


def _norm(shape: EncoderShape, width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=shape.norm_eps, bias=shape.has_bias("norm"))


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
        width = shape.embedding
        self.words = Embedding(shape.vocab, width)
        self.positions = Embedding(shape.positions, width) if shape.has_position_table else None
        self.types = Embedding(shape.types, width) if shape.types else None
        self.task_types = Embedding(shape.task_types, width) if shape.task_types else None
        self.embedding_norm = _norm(shape, width) if shape.has_embedding_norm else None
        self.projection = Linear(width, shape.hidden) if shape.has_projection else None
        self.relative_positions = _relative_positions(shape)
        self.relative_norm = _norm(shape, shape.hidden) if shape.has_part("relative_norm") else None
        count = 1 if shape.shared_layers else shape.layers
        self.layers = nn.ModuleList(PackedLayer(shape, number) for number in range(count))
        self.final_norm = _norm(shape, shape.hidden) if shape.has_final_norm else None
        self.head_dense = _linear(shape, "head_dense", shape.hidden, shape.hidden)
        self.head_norm = _norm(shape, shape.hidden) if shape.has_head_norm else None
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
        positions = self._positions(x, position_ids[0], layout)
        # One copy to the device a batch, without a wait; every layer reads the same tensor.
        all_cls_positions = layout.cu_seqlens(x.device)[:-1].long() if shape.pooling == "first" else None
        for number in range(shape.layers):
            cls_positions = all_cls_positions if number == shape.layers - 1 else None
            layer = self.layers[0 if shape.shared_layers else number]
            mask_id = _MASKS_PER_LAYER * (number + 1)
            given = (layer, x, layout, dropout_masks, mask_id, cls_positions, positions)
            # Gradient checkpointing keeps one `[tokens, hidden]` a layer instead of every intermediate result. The
            # second forward pass is a third more work. It draws the same dropout masks, which follow from their ids.
            if self.gradient_checkpointing and self.training:
                x = checkpoint(*given, use_reentrant=False)
            else:
                x = layer(*given[1:])
        if self.final_norm is not None:
            x = self.final_norm(x)
        if shape.pooling == "mean":
            x = mean_of_sequences(x, layout)
        # Filler that rounds up the token count is one more sequence at the end, without logits.
        return self._head(x[: len(layout.lengths)], dropout_masks)

    def _embed(self, input_ids, token_type_ids, position_ids, dropout_masks) -> torch.Tensor:
        shape = self.shape
        x = self.words(input_ids)
        if self.positions is not None:
            x = x + self.positions(position_ids + shape.position_offset)
        if self.types is not None:
            x = x + self.types(token_type_ids)
        if self.task_types is not None:
            x = x + self.task_types.weight[0]
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        drop = shape.hidden_dropout if shape.embedding_dropout is None else shape.embedding_dropout
        x = dropout(x, drop, dropout_masks, 0)
        return x if self.projection is None else self.projection(x)

    def _positions(self, x: torch.Tensor, position_ids: torch.Tensor, layout: PackedLayout) -> Positions | None:
        shape = self.shape
        if not shape.rotary and not shape.has_relative_scores:
            return None
        # In the dtype of the layers: with autocast the embeddings are fp32, and the rotation is computed in fp32.
        rotary = {base: Rotary(position_ids, shape.hidden // shape.heads, base, x.dtype) for base in set(shape.rotary)}
        if self.relative_positions is None:
            return Positions(rotary, None)
        table = self.relative_positions.weight
        # Every layer reads the rows of the same table: it is normed once a batch.
        rows = table if self.relative_norm is None else self.relative_norm(table)
        return Positions(rotary, read_table(rows, shape, layout))

    def _head(self, first: torch.Tensor, dropout_masks: DropoutMasks | None) -> torch.Tensor:
        before_dense, before_output = self.shape.head_dropouts
        x = self.head_dense(dropout(first, before_dense, dropout_masks, 1))
        x = ACTIVATIONS[self.shape.head_activation](x)
        if self.head_norm is not None:
            x = self.head_norm(x)
        return self.head_output(dropout(x, before_output, dropout_masks, 2))


def _relative_positions(shape: EncoderShape) -> nn.Embedding | None:
    if shape.disentangled is not None:
        return nn.Embedding(2 * shape.disentangled.span, shape.hidden)
    return nn.Embedding(shape.relative_buckets, shape.heads) if shape.relative_buckets else None
