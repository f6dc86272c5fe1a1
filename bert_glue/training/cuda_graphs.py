"""`--cuda_graph`: an optimizer step as recordings, each replayed in one launch.

Forward and backward of a pass are recorded once for each shape of a batch; norm, clip and update, which are the same
for all shapes, once. Between them lies what the host decides or the ranks do together: the learning rate, a dynamic
loss scale, the sum over ranks. A pass adds to the gradients, so that accumulation is its replay again.

All is run eagerly a few times first, so that rare shapes are never recorded. Batches are copied to where a recording
reads: token counts are rounded up to buckets, and borders of sequences lie on the device. Has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bert_glue.data.batching import Batch
from bert_glue.data.packing import PackedLayout
from bert_glue.devices.device import Device
from bert_glue.errors import MachineError
from bert_glue.model.attention import cuda_kernel
from bert_glue.model.classifier import LoadedModel
from bert_glue.precision.native import NativePrecision
from bert_glue.precision.plan import PrecisionPlan
from bert_glue.training.optim import runs_without_host


class RecordedLayout:
    """The cumulative lengths of batches of one shape, in one buffer on the device, for recorded work.

    Args:
        layout: of the first batch; others have as many tokens and sequences.
        longest: tokens of the longest sample of any batch.
    """

    def __init__(self, layout: PackedLayout, device: torch.device, longest: int):
        self.lengths = layout.lengths
        # Kernels take any bound; filler is a sixteenth of all tokens at most.
        self.longest = max(longest, layout.tokens // 16 + 1, 16)
        self._place = layout.cu_seqlens(device).clone()

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """`[sequences + 1]` int32."""
        return self._place

    def fill(self, layout: PackedLayout) -> None:
        """Take the cumulative lengths of another batch."""
        self._place.copy_(layout.cu_seqlens(self._place.device))


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

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class Recorded:
    """Work on the same memory each time: eager at first, then recorded, then replayed.

    Args:
        work: may depend on nothing that changes but the contents of that memory.
    """

    def __init__(self, recorder: Recorder, work: Callable[[], torch.Tensor]):
        self.recorder, self.work = recorder, work
        self.runs = self.replays = 0
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        """What `work` returns; the next replay of any recording may overwrite it."""
        self.runs += 1
        if self._replay is None:
            if self.runs <= _EAGER_FIRST:
                return self.recorder.beside(self.work)
            self._replay = self.recorder.record(self.work)
        self.replays += 1
        return self._replay()


class _Place:
    """Where the work of one shape reads its batch.

    Args:
        longest: tokens of the longest sample of any batch.
    """

    def __init__(self, batch: Batch, longest: int):
        inputs = {name: value.clone() for name, value in batch.inputs.items() if name != "layout"}
        inputs["layout"] = RecordedLayout(batch.inputs["layout"], batch.labels.device, longest)
        total = None if batch.step_weight is None else batch.step_weight.clone()
        self.batch = replace(batch, inputs=inputs, labels=batch.labels.clone(), step_weight=total)

    def fill(self, batch: Batch) -> None:
        """Copy another batch of the same shape there."""
        for name, place in self.batch.inputs.items():
            if name == "layout":
                place.fill(batch.inputs[name])
            else:
                place.copy_(batch.inputs[name])
        self.batch.labels.copy_(batch.labels)
        if batch.step_weight is not None:
            self.batch.step_weight.copy_(batch.step_weight)


class RecordedStep:
    """Passes, norm and update of a run's optimizer steps; see `OptimizerStep`.

    Args:
        run_pass: (batch, samples of the step) -> loss `[]`, eagerly; gradients are added to the flat buffers.
        longest: tokens of the longest sample.
        optimizer: where it asks the host for numbers, all that follows the passes stays eager.
        max_norm: L2 norm gradients are clipped to, 0 for none.
    """

    def __init__(
        self,
        recorder: Recorder,
        run_pass: Pass,
        *,
        longest: int,
        precision: NativePrecision,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
    ):
        self.recorder = recorder
        self.longest = longest
        self.precision = precision
        self.optimizer = optimizer
        self.max_norm = max_norm
        self._pass = run_pass
        self.passes: dict[tuple, tuple[_Place, Recorded]] = {}
        self.after: tuple[Recorded, Recorded] | None = None
        if runs_without_host(self.optimizer):
            self.after = Recorded(recorder, self.precision.gather_gradients), Recorded(recorder, self._update)

    def run_pass(self, batch: Batch, samples: int, is_last: bool = True) -> torch.Tensor:
        """The loss to show, 0-d; gradients are added to the flat buffers."""
        shape = (batch.computed_tokens, batch.samples, samples)
        if shape not in self.passes:
            place = _Place(batch, self.longest)
            self.passes[shape] = place, Recorded(self.recorder, lambda: self._pass(place.batch, samples))
        place, work = self.passes[shape]
        place.fill(batch)
        return work()

    def gather_gradients(self) -> torch.Tensor:
        """As of `NativePrecision`."""
        return self.after[0]() if self.after else self.precision.gather_gradients()

    def finish(self, norm: torch.Tensor) -> bool:
        """As `NativePrecision.step`."""
        if self.after is None:
            return self.precision.step(self.optimizer, norm, self.max_norm)
        if self.precision.should_skip(norm):
            return False
        self.after[1]()
        return True

    def _update(self) -> torch.Tensor:
        norm = self.precision.norm
        self.precision.update(self.optimizer, norm, self.max_norm)
        return norm

    def summary(self) -> str:
        """How much was replayed, one line for the log."""
        works = [work for _, work in self.passes.values()]
        passes, replays = sum(work.runs for work in works), sum(work.replays for work in works)
        recordings = sum(work.replays > 0 for work in works)
        after = "updates stay eager: this optimizer asks the host"
        if self.after:
            after = f"{self.after[1].replays} of {self.after[1].runs} updates"
        return f"cuda_graph: {recordings} recording(s), {replays} of {passes} passes replayed; {after}"


def check_recordable(model: LoadedModel, plan: PrecisionPlan, device: Device) -> None:
    """Check that `--cuda_graph` works here.

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
