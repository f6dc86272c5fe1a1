"""`torch.npu.utils` of the simulated device: the status flag of chips that saturate."""

from torch_npu.chip import CHIP


def is_support_inf_nan() -> bool:
    return not CHIP.saturates


def get_npu_overflow_flag() -> bool:
    if not CHIP.saturates:
        raise RuntimeError("Unsupported api when soc_version >= Ascend910B1, please use npu_check_overflow")
    return CHIP.has_overflowed


def clear_npu_overflow_flag() -> None:
    CHIP.has_overflowed = False
