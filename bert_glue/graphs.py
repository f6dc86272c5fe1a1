"""`--cuda_graph`: forward and backward of a pass, recorded once for each shape and then replayed in one launch.

A shape is seen a few times before it is recorded, so that rare ones stay eager. Batches are copied to where the
recording reads: token counts are rounded up to buckets, and borders of sequences lie on the device. What follows a
pass (sum over ranks, clip, update) is about thirty launches over flat buffers; it stays eager, and with it all that
the host decides: learning rate, skipped steps, accumulation. Has not run on a GPU yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bert_glue.attention import cuda_kernel
from bert_glue.batching import Batch
from bert_glue.device import Device
from bert_glue.errors import MachineError
from bert_glue.layout import RecordedLayout
from bert_glue.model import LoadedModel
from bert_glue.precision_plan import PrecisionPlan
from bert_glue.progress import ProgressLog

_EAGER_FIRST = 3  # passes of a shape before it is recorded; libraries choose kernels and workspaces in them

Pass = Callable[[Batch, int], torch.Tensor]


class Recorder:
    """The device's own recordings (torch.cuda.CUDAGraph)."""

    def __init__(self, device: Device):
        self._module = torch.get_device_module(device.torch_device)
        self._side = self._module.Stream()
        self._pool = self._module.graph_pool_handle()  # one for all: no two recordings run at once

    def beside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run on another stream, as passes before a recording must."""
        now = self._module.current_stream()
        self._side.wait_stream(now)
        with self._module.stream(self._side):
            result = work()
        now.wait_stream(self._side)
        return result

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Take down what `work` asks of the device, without doing it.

        Returns:
            Does it: reads and writes the memory that `work` read and wrote. The result is overwritten by
            the next recording that is replayed.
        """
        graph = self._module.CUDAGraph()
        # The thread that assembles batches allocates meanwhile.
        with self._module.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return lambda: (graph.replay(), result)[1]


@dataclass
class _Recording:
    batch: Batch  # where the recording reads
    replay: Callable[[], torch.Tensor]

    def fill(self, batch: Batch) -> None:
        """Copy a batch of the same shape to where the recording reads."""
        for name, place in self.batch.inputs.items():
            if name == "layout":
                place.fill(batch.inputs[name])
            else:
                place.copy_(batch.inputs[name])
        self.batch.labels.copy_(batch.labels)


class RecordedPasses:
    """A pass (batch, samples of the step) -> loss `[]`, replayed where its shape was recorded.

    Args:
        work: the pass, eagerly; may depend on nothing else that changes but `scale`.
        longest: tokens of the longest sample.
        scale: of the loss, a number of the host: recordings of another one are dropped.
    """

    def __init__(self, recorder: Recorder, work: Pass, longest: int, scale: Callable[[], float]):
        self.recorder, self.work, self.longest, self.scale = recorder, work, longest, scale
        self.recordings: dict[tuple, _Recording] = {}
        self.seen: Counter[tuple] = Counter()
        self.replays = 0
        self._scale = scale()

    def __call__(self, batch: Batch, samples: int) -> torch.Tensor:
        """The loss to show, 0-d; gradients are added to the flat buffers."""
        if self.scale() != self._scale:
            self._scale = self.scale()
            self.recordings.clear()
        shape = (batch.computed_tokens, batch.samples, samples)
        self.seen[shape] += 1
        if shape not in self.recordings:
            if self.seen[shape] <= _EAGER_FIRST:
                return self.recorder.beside(lambda: self.work(batch, samples))
            self.recordings[shape] = self._record(batch, samples)
        self.recordings[shape].fill(batch)
        self.replays += 1
        return self.recordings[shape].replay()

    def _record(self, batch: Batch, samples: int) -> _Recording:
        inputs = {name: value.clone() for name, value in batch.inputs.items() if name != "layout"}
        inputs["layout"] = RecordedLayout(batch.inputs["layout"], batch.labels.device, self.longest)
        still = replace(batch, inputs=inputs, labels=batch.labels.clone())
        return _Recording(still, self.recorder.record(lambda: self.work(still, samples)))

    def say(self, log: ProgressLog) -> None:
        """One line: how much was replayed."""
        passes = sum(self.seen.values())
        log.line(f"cuda_graph: {len(self.recordings)} recording(s), {self.replays} of {passes} passes replayed")


def check_recordable(model: LoadedModel, plan: PrecisionPlan, device: Device) -> None:
    """That `--cuda_graph` can be had here.

    Raises:
        MachineError: why not, and what to use.
    """
    if not device.can_record:
        raise MachineError(
            f"--cuda_graph: only CUDA devices replay recorded work, not this one ({device.name}); leave it out"
        )
    if not model.is_packed:
        raise MachineError(f"--cuda_graph: packed models only ({model.why_padded}); use --torch_compile")
    shape = model.module.shape
    dim = shape.hidden // shape.heads
    if cuda_kernel(device.torch_device, plan.dtype, dim, shape.attention_dropout) is None:
        raise MachineError(
            f"--cuda_graph: no attention kernel here takes {plan.name} with dropout {shape.attention_dropout:g}; "
            "use --bf16 or --fp16, and --attention_probs_dropout_prob 0"
        )
