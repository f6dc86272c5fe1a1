"""LoRA (Hu et al. 2021) on one product: `y + scaling * up(down(dropout(x)))`, the product's weight frozen.

Where a product computes several layers of transformers at once (query, key and value), their adapters are
one product down and one up as well, the latter with a block for each adapted layer. Merging the weight
in every step would bring back the full weight gradient, half of the backward pass that LoRA saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bert_glue.noise import Noise, dropout


class LowRank(nn.Module):
    """Adapters of one product.

    Args:
        inputs, outputs: sizes of the product.
        rank: of each adapter.
        scaling: alpha / rank.
        drop: dropout before `down`, in [0, 1); the adapters of one product share its mask.
        parts: which of the product's layers are adapted, ascending.
        count: layers that the product computes.
    """

    def __init__(
        self, inputs: int, outputs: int, rank: int, scaling: float, drop: float, parts: tuple[int, ...], count: int
    ):
        super().__init__()
        self.rank, self.scaling, self.drop, self.parts, self.count = rank, scaling, drop, parts, count
        # peft's start: the adapted layer computes what it did.
        self.down = nn.Parameter(torch.empty(len(parts) * rank, inputs))
        for piece in self.down.data.chunk(len(parts)):
            nn.init.kaiming_uniform_(piece, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(len(parts) * outputs // count, rank))

    def add(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        product: Callable[..., torch.Tensor],
        noise: Noise | None,
        site: int,
        rows: slice = slice(None),
    ) -> torch.Tensor:
        """`y` with the low-rank term of `x`: `[tokens, in] -> [tokens, out]`.

        Args:
            y: `[tokens, out]`, output of the frozen product, or of some of its outputs.
            product: of `[rows, in]` and `[out, in]`.
            noise: dropout masks; None turns dropout off.
            site: address of the dropout.
            rows: which outputs of the whole product `y` holds.
        """
        inner = product(dropout(x, self.drop, noise, site), self.down) * self.scaling
        return y + product(inner, self._blocks()[rows])

    def _blocks(self) -> torch.Tensor:
        """`up` as one matrix `[out, adapters * rank]`: each adapter's rows read its own columns only."""
        blocks = self.up.chunk(len(self.parts))
        if self.count == 1:
            return self.up
        width, rows = len(self.parts) * self.rank, len(blocks[0])
        padded = {
            part: F.pad(block, (at * self.rank, width - (at + 1) * self.rank))
            for at, (part, block) in enumerate(zip(self.parts, blocks, strict=True))
        }
        nothing = self.up.new_zeros(rows, width)
        return torch.cat([padded.get(part, nothing) for part in range(self.count)])
