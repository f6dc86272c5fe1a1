"""Overflow on chips that do not show it: Ascend 910A gives the largest number instead of inf, 0 instead of NaN.

Gradients then look fine; only the chip's status register knows.
Source: torch_npu 2.13, `torch_npu/npu/utils.py` and its GradScaler.
"""

from __future__ import annotations

import torch

from bert_glue.device import torch_npu_of


class OverflowFlag:
    """Whether the chip computed a number over its range since `clear`."""

    def __init__(self, device: torch.device):
        self._device, self._torch_npu = device, torch_npu_of(device)

    def _register(self) -> torch.Tensor:
        return torch.zeros(8, device=self._device)

    def clear(self) -> None:
        """Forget earlier overflows."""
        self._torch_npu.npu_clear_float_status(self._register())

    def read(self) -> torch.Tensor:
        """1 if there was an overflow, else 0; 0-d fp32 on the device, nothing waits for it."""
        return (self._torch_npu.npu_get_float_status(self._register())[0] != 0).float()


def overflow_flag(device: torch.device) -> OverflowFlag | None:
    """The flag of a device that saturates; None where an overflow gives inf, so that gradients tell."""
    torch_npu = torch_npu_of(device)
    if torch_npu is None or torch_npu.npu.utils.is_support_inf_nan():
        return None
    return OverflowFlag(device)
