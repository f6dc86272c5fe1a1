"""`--profile_steps 10:15`: a trace of some optimizer steps, as Chrome's trace format (chrome://tracing, Perfetto)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bert_glue.config.values import read_steps
from bert_glue.devices.device import Device
from bert_glue.errors import CheckpointError, UsageError
from bert_glue.storage import files
from bert_glue.storage.files import written_aside
from bert_glue.training.console import ConsoleLog
from bert_glue.training.throughput import Meter


class NoTrace:
    """A trace without `--profile_steps`; it does nothing."""

    def begin(self, step: int) -> None:
        """The optimizer step with this number begins."""

    def end(self, step: int) -> None:
        """The same step is over."""

    def close(self) -> None:
        """Training is over."""


class StepTrace(NoTrace):
    """Traces one range of optimizer steps of one rank.

    The meter stops meanwhile, because a traced step is slow and must not count in samples/s.

    Args:
        steps: value of `--profile_steps`.
        done: steps before the resume; 0 for a new run.
        total: steps of the whole run.
        path: file to write.

    Raises:
        UsageError: the run ends before the first step, or is resumed after the last.
    """

    def __init__(self, steps: str, done: int, total: int, device: Device, meter: Meter, log: ConsoleLog,
                 path: Path):  # fmt: skip
        self.first, self.last = read_steps(steps)
        if self.first > total or self.last <= done:
            raise UsageError(f"--profile_steps {steps}: this run goes from step {done + 1} to {total}")
        self.device = device
        self.meter = meter
        self.log = log
        self.path = path
        self._profiler: Any = None
        self._mark: Any = None
        self._traced: list[int] = []

    def begin(self, step: int) -> None:
        """The optimizer step with this number begins."""
        if not self.first <= step <= self.last:
            return
        if self._profiler is None:
            self.meter.hold()
            self._profiler = self.device.profiler()
            self._profiler.start()
        self._mark = torch.autograd.profiler.record_function(f"optimizer step {step}")
        self._mark.__enter__()
        self._traced.append(step)

    def end(self, step: int) -> None:
        """The same step is over."""
        if self._mark is not None:
            self.device.synchronize()
            self._mark.__exit__(None, None, None)
            self._mark = None
        if step == self.last:
            self.close()
            self.meter.start()

    def close(self) -> None:
        """Write the trace, if there is one that is not written yet.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        if self._mark is not None:  # the step was left by an error
            self._mark.__exit__(None, None, None)
            self._mark = None
        profiler.stop()
        with files.plain_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(self.path) as aside:
                profiler.export_chrome_trace(str(aside))
        if not self.path.is_file() or not self.path.stat().st_size:  # torch_npu's profiler only warns
            raise CheckpointError(f"--profile_steps: the profiler did not write {self.path}")
        self.meter.release()
        self.log.line(
            f"trace: optimizer steps {self._traced[0]} to {self._traced[-1]} in {self.path}, left out of samples/s"
        )
