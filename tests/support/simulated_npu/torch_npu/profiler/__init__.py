"""torch_npu.profiler as far as it is called: the host's part is torch's own, the device's is not there."""

from __future__ import annotations

import torch


class profile:  # noqa: N801 - torch_npu's name
    def __init__(self, *, activities=None):
        self._host = torch.profiler.profile()

    def start(self):
        self._host.start()

    def stop(self):
        self._host.stop()

    def export_chrome_trace(self, output_path: str):
        self._host.export_chrome_trace(output_path)
