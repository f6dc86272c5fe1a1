"""What ends a run whose numbers are not finite."""

from __future__ import annotations

import torch

from bert_glue.errors import DivergedError

MOST_OVERFLOWS = 30  # in a row; from the largest loss scale to the smallest are 24
BAD_GRADIENTS = (
    "gradients are not finite (NaN or Inf); the update was not made and nothing was saved since: "
    "lower --learning_rate, check the data, or use --loss_scale dynamic with --fp16"
)


def too_many_overflows(count: int, scale: float) -> str:
    """The line that ends a run whose dynamic scale finds no bottom."""
    return (
        f"gradients overflowed {count} times in a row, at last with loss scale {scale:g}: "
        "lower --learning_rate, or train with --bf16 or in fp32"
    )


def check_weights(masters: list[torch.Tensor]) -> None:
    """Raises DivergedError if a weight is not finite; waits for the device."""
    if not all(torch.isfinite(master).all() for master in masters):
        raise DivergedError("weights are not finite (NaN or Inf); nothing was saved since: lower --learning_rate")
