"""A simulated NPU: the names of torch_npu 2.13 that bert_glue calls, on CPU memory.

It proves calls and flow, never kernels or speed. With this folder's parent on PYTHONPATH the device
"npu" exists. Settings, in the environment:

    SIMULATED_NPU_CHIP      910A, 910B (default) or A3
    SIMULATED_NPU_DEVICES   how many (2)
    SIMULATED_NPU_CALLS     file for the operators' counts at exit; ".<rank>" is appended
    SIMULATED_NPU_WHEEL     a real torch_npu wheel, whose fused optimizer's Python is then used
"""

import atexit

from torch_npu import hccl, npu, profiler, tensor  # noqa: F401
from torch_npu.operators import (  # noqa: F401
    get_npu_format,
    get_storage_size,
    npu_change_data_ptr,
    npu_clear_float_status,
    npu_format_cast,
    npu_fusion_attention,
    npu_get_float_status,
)

__version__ = "2.13.0"
is_simulated = True
atexit.register(tensor.write_calls)
