"""Ascend NPU: torch_npu, its fused AdamW, and overflow on chips that do not show it.

In its first step, torch_npu's class moves parameters and gradients into a combined buffer, and all later steps use that
buffer. Gradients are therefore overwritten here and never dropped: after `zero_grad(set_to_none=True)` the class would
repeat the last gradients that it saw. The optimizer owns the memory of the parameters and must live as long as they do
(`TrainState` holds both).
Source: torch_npu 2.13, `torch_npu/optim/npu_fused_optim_base.py`.

An Ascend 910A returns the largest number instead of inf, and 0 instead of NaN. Gradients then look valid, and only the
status register of the chip shows the overflow.
Source: torch_npu 2.13, `torch_npu/npu/utils.py` and its GradScaler.
"""

from __future__ import annotations

from types import ModuleType

import torch

from bert_glue.devices.npu_versions import explained


def import_torch_npu() -> ModuleType | None:
    """Imports torch_npu. None if it is not installed.

    Raises:
        MachineError: torch_npu is installed and cannot be imported; the message explains why.
    """
    try:
        import torch_npu
    except Exception as error:  # a wrong torch/torch_npu/CANN triple fails in many ways
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
            return None
        raise explained(error) from error
    return torch_npu


def torch_npu_of(device: torch.device) -> ModuleType | None:
    """torch_npu for tensors on its device, None for any other tensors."""
    return import_torch_npu() if device.type == "npu" else None


class NoFusedOptimizer(Exception):
    """The NPU's fused optimizer is not available for this machine or these parameters; the text says why."""


def moves_allocations(optim: str, device: torch.device) -> bool:
    """True if the optimizer of `--optim` may move gradients to another place in the device's memory."""
    return optim in ("adamw_apex_fused_npu", "adamw_torch_npu_fused") and torch_npu_of(device) is not None


def npu_fused_adamw(params: list[dict], **options) -> torch.optim.Optimizer:
    """torch_npu's fused AdamW.

    Args:
        params: groups of parameters with gradients, each in an allocation of its own.
        options: lr, betas, eps.

    Raises:
        NoFusedOptimizer: torch_npu is not installed, or has no such optimizer for these parameters.
    """
    first = params[0]["params"][0]
    torch_npu = torch_npu_of(first.device)
    if torch_npu is None:
        raise NoFusedOptimizer(f"torch_npu's fused AdamW updates parameters on its own device, not on {first.device}")
    dtypes = {p.dtype for group in params for p in group["params"]}
    if not dtypes <= {torch.float32, torch.float16}:
        raise NoFusedOptimizer("torch_npu's fused AdamW takes fp32 and fp16 only")
    try:
        from torch_npu.optim import NpuFusedAdamW
    except ImportError as error:
        raise NoFusedOptimizer(f"this torch_npu has no NpuFusedAdamW ({error})") from error
    return NpuFusedAdamW(params, **options)


class OverflowFlag:
    """The overflow flag of the chip: whether a result has exceeded its range since `clear`."""

    def __init__(self, device: torch.device):
        self._device, self.import_torch_npu = device, torch_npu_of(device)

    def _register(self) -> torch.Tensor:
        return torch.zeros(8, device=self._device)

    def clear(self) -> None:
        """Forget earlier overflows."""
        self.import_torch_npu.npu_clear_float_status(self._register())

    def read(self) -> torch.Tensor:
        """1 after an overflow, else 0; 0-d fp32 on the device, without a wait of the host."""
        return (self.import_torch_npu.npu_get_float_status(self._register())[0] != 0).float()


def overflow_flag(device: torch.device) -> OverflowFlag | None:
    """The overflow flag of a device that saturates. None if an overflow gives inf, which gradients show."""
    torch_npu = torch_npu_of(device)
    if torch_npu is None or torch_npu.npu.utils.is_support_inf_nan():
        return None
    return OverflowFlag(device)
