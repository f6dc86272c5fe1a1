"""`torch_npu.utils`: what the real fused optimizer imports, out of the wheel it comes from."""

import os

_WHEEL = os.environ.get("SIMULATED_NPU_WHEEL")
if _WHEEL:
    __path__.append(f"{_WHEEL}/torch_npu/utils")
    from torch_npu.utils.combine_tensors import get_part_combined_tensor, npu_combine_tensors

    __all__ = ["get_part_combined_tensor", "npu_combine_tensors"]
