"""Fine-tune BERT-family encoders on GLUE, on Ascend NPU, CUDA or CPU."""

import os

__version__ = "0.1.0"

# Left alone, `import torch` imports an installed torch_npu, and fails with it: a broken CANN would keep every
# device from training. device.py imports torch_npu itself, where a run asks for it, and explains a failure.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
