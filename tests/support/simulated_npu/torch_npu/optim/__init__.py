"""`torch_npu.optim.NpuFusedAdamW`: the real class out of a wheel if one is named, else a model of what it does."""

import os

_WHEEL = os.environ.get("SIMULATED_NPU_WHEEL")
if _WHEEL:
    __path__.append(f"{_WHEEL}/torch_npu/optim")
    from torch_npu.optim.npu_fused_adamw import NpuFusedAdamW
else:
    from torch_npu.optim.modelled import NpuFusedAdamW

__all__ = ["NpuFusedAdamW"]
