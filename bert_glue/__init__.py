"""Fine-tune BERT-family encoders on GLUE, on Ascend NPU, CUDA or CPU."""

__version__ = "0.1.0"
