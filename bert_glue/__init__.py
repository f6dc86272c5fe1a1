"""Fine-tune BERT-family encoders on GLUE, on Ascend NPU, CUDA or CPU."""

import os

__version__ = "0.1.0"

# Left alone, `import torch` imports an installed torch_npu, and fails with it: a broken CANN would keep every
# device from training. device.py imports torch_npu itself, where a run asks for it, and explains a failure.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

# Nothing here reports to anybody; read by the libraries when they are imported.
for _switch in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"):
    os.environ.setdefault(_switch, "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
