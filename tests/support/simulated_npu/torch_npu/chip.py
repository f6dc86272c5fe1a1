"""Which chip is simulated, chosen by SIMULATED_NPU_CHIP, and its status registers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass
class Chip:
    """What differs between the chips.

    Args:
        name: as `torch.npu.get_device_name` gives it.
        has_bf16: whether it computes in bfloat16.
        has_packed_attention: whether npu_fusion_attention takes the TND layout.
        saturates: overflow gives the largest number, and NaN zero, instead of inf and NaN; only the
            float-status flag tells.
    """

    name: str
    has_bf16: bool = True
    has_packed_attention: bool = True
    saturates: bool = False
    has_overflowed: bool = False


CHIPS = {
    "910A": Chip("Ascend910A", has_bf16=False, has_packed_attention=False, saturates=True),
    "910B": Chip("Ascend910B1"),
    "A3": Chip("Ascend910_9392"),
}
CHIP = CHIPS[os.environ.get("SIMULATED_NPU_CHIP", "910B")]
DEVICES = int(os.environ.get("SIMULATED_NPU_DEVICES", "2"))

# These move or make numbers; what they move is no overflow of theirs.
_MOVING = (
    "empty", "new_empty", "full", "zeros", "fill", "masked_fill", "copy", "clone", "where", "index", "cat", "stack",
    "gather", "select", "embedding", "scalar_tensor", "lift", "nan_to_num",
)  # fmt: skip


def is_moving(name: str) -> bool:
    """True for an operator (without its namespace) that computes nothing."""
    return name.strip("_").startswith(_MOVING)


def saturate(result: torch.Tensor) -> None:
    """Saturates a computed host tensor as the chip does, and sets the flag if a value overflowed."""
    if result.is_floating_point() and not torch.isfinite(result).all():
        CHIP.has_overflowed = True
        result.nan_to_num_(nan=0.0)  # infinities go to the dtype's largest numbers
