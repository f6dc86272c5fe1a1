"""`torch.npu` of the simulated device."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from torch_npu.chip import CHIP, DEVICES
from torch_npu.npu import utils

__all__ = ["utils"]
_current = 0
_generator_state: torch.Tensor | None = None


class _InUse:
    """Bytes of the device in use, and the most so far."""

    now = most = 0

    def add(self, nbytes: int) -> None:
        self.now += nbytes
        if self.now > self.most:
            self.most = self.now


IN_USE = _InUse()


@contextmanager
def own_generator():
    """Draw from the device's generator instead of the host's."""
    global _generator_state
    of_host = torch.get_rng_state()
    if _generator_state is not None:
        torch.set_rng_state(_generator_state)
    try:
        yield
    finally:
        _generator_state = torch.get_rng_state()
        torch.set_rng_state(of_host)


def is_available() -> bool:
    return DEVICES > 0


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return DEVICES


def current_device() -> int:
    return _current


def set_device(device) -> None:
    global _current
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if index >= DEVICES:
        raise RuntimeError(f"simulated npu: device {index} of {DEVICES}")
    _current = index


class device:  # noqa: N801 (the name is torch_npu's)
    """Context in which another device is the current one."""

    def __init__(self, device):
        self.index = device if isinstance(device, int) or device is None else torch.device(device).index

    def __enter__(self):
        self.before = _current
        if self.index is not None and self.index >= 0:
            set_device(self.index)

    def __exit__(self, *error):
        set_device(self.before)
        return False


def synchronize(device=None) -> None:
    pass


def get_device_name(device_name=None) -> str:
    return CHIP.name


def is_bf16_supported(including_emulation: bool = False) -> bool:
    return CHIP.has_bf16


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16] if CHIP.has_bf16 else [torch.float16]


def manual_seed(seed: int) -> None:
    global _generator_state
    of_host = torch.get_rng_state()
    torch.random.default_generator.manual_seed(seed)
    _generator_state = torch.get_rng_state()
    torch.set_rng_state(of_host)


manual_seed_all = manual_seed


def get_rng_state(device="npu") -> torch.Tensor:
    if _generator_state is None:
        manual_seed(0)
    return _generator_state.clone()


def set_rng_state(new_state: torch.Tensor, device="npu") -> None:
    global _generator_state
    _generator_state = new_state.clone()


def memory_allocated(device=None) -> int:
    return IN_USE.now


def max_memory_allocated(device=None) -> int:
    return IN_USE.most


def mem_get_info(device=None) -> tuple[int, int]:
    total = 64 << 30
    return total - IN_USE.now, total


def empty_cache() -> None:
    pass


def set_compile_mode(jit_compile: bool = False) -> None:
    pass
