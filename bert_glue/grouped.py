"""Attention in plain products, sequences of similar length together, with the gradients by hand.

By hand because torch's CPU kernel with dropout falls back to a chain of a dozen autograd nodes a call, and a
batch of 32 sequences makes 5 to 8 calls a layer. A group's rows are gathered in one copy and put back in one.
"""

from __future__ import annotations

import math

import torch

from bert_glue.layout import HeadPlaces, LengthGroup
from bert_glue.noise import as_numbers


class GroupedAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(dim)) v, group by group; arguments as of `attention.attend`."""

    @staticmethod
    def forward(ctx, query, key, value, layout, first_only, drop, noise, site):
        heads, dim = query.shape[1:]
        scale, drop = 1.0 / math.sqrt(dim), drop if noise is not None else 0.0
        asking, asked, saved = layout.places(heads, first_only), layout.places(heads, False), []
        out = query.new_empty(asking.bounds[-1][1], dim)
        for number, group in enumerate(layout.groups):
            q, k, v = _block(query, asking, number), _block(key, asked, number), _block(value, asked, number)
            probabilities = _softmax_block(q, k, group, scale)
            keep, dropped = None, probabilities
            if drop > 0.0:
                keep = noise.keep((len(group.sequences), heads, *probabilities.shape[1:]), drop, site * 4096 + number)
                keep = keep.flatten(0, 1)
                dropped = as_numbers(keep, q.dtype).mul_(probabilities).mul_(1 / (1 - drop))
            torch.bmm(dropped, v, out=_part(out, asking, number, q))
            saved += [q, k, v, probabilities, keep]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.first_only, ctx.scale, ctx.drop = layout, first_only, scale, drop
        return out.index_select(0, asking.of_row).view(query.shape)

    @staticmethod
    def backward(ctx, grad):
        layout, first_only, scale = ctx.layout, ctx.first_only, ctx.scale
        heads, dim = grad.shape[1:]
        asking, asked = layout.places(heads, first_only), layout.places(heads, False)
        # Once: under gradient checkpointing each look unpacks again, and the second is refused.
        saved = ctx.saved_tensors
        dq, dk, dv = (grad.new_empty(places.bounds[-1][1], dim) for places in (asking, asked, asked))
        for number, group in enumerate(layout.groups):
            q, k, v, probabilities, keep = saved[5 * number : 5 * number + 5]
            g = _block(grad, asking, number)
            if group.padding is not None and not first_only:
                g.view(len(group.sequences), heads, -1, dim).transpose(1, 2)[group.padding] = 0.0
            dp = torch.bmm(g, v.transpose(1, 2))
            dropped = probabilities
            if keep is not None:
                kept = as_numbers(keep, q.dtype).mul_(1 / (1 - ctx.drop))
                dropped, dp = probabilities * kept, dp.mul_(kept)
            torch.bmm(dropped.transpose(1, 2), g, out=_part(dv, asked, number, k))
            ds = torch._softmax_backward_data(dp, probabilities, -1, q.dtype)
            _scaled_product(_part(dq, asking, number, q), ds, k, scale)
            _scaled_product(_part(dk, asked, number, k), ds.transpose(1, 2), q, scale)
        pairs = ((dq, asking), (dk, asked), (dv, asked))
        return *(d.index_select(0, places.of_row).view(-1, heads, dim) for d, places in pairs), *([None] * 5)


def _block(x: torch.Tensor, places: HeadPlaces, number: int) -> torch.Tensor:
    """`[n, heads, dim]` -> `[sequences * heads, length, dim]`, of one group.

    Rows of one head are copied whole, also out of the joint product of query, key and value: a fifth of the time that
    an index over tokens and heads takes.
    """
    heads, dim = x.shape[1:]
    if x.stride(1) != dim or x.stride(2) != 1 or x.stride(0) % dim:
        x = x.contiguous()
    pitch = x.stride(0) // dim
    rows = x.as_strided(((len(x) - 1) * pitch + heads, dim), (dim, 1))
    sequences, length = places.rows[number].shape
    return rows.index_select(0, places.index(number, pitch)).view(sequences * heads, length, dim)


def _part(rows: torch.Tensor, places: HeadPlaces, number: int, like: torch.Tensor) -> torch.Tensor:
    """Rows of one group, as its block `[sequences * heads, length, dim]`."""
    return rows[slice(*places.bounds[number])].view(like.shape)


def _scaled_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(out, a, b, beta=0.0, alpha=scale, out=out)


def _softmax_block(q: torch.Tensor, k: torch.Tensor, group: LengthGroup, scale: float) -> torch.Tensor:
    scores = _scaled_product(q.new_empty(len(q), q.shape[1], k.shape[1]), q, k.transpose(1, 2), scale)
    if group.padding is not None:
        by_sequence = scores.view(len(group.sequences), -1, *scores.shape[1:])
        by_sequence.masked_fill_(group.padding[:, None, None, :], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1)
