"""`--cuda_graph`: an optimizer step as CUDA graphs, each replayed in one launch.

Forward and backward of a pass are recorded once for each shape of a batch. Norm, clip and update are the same for all
shapes and are recorded once. The work of the host and of all ranks together runs between the recordings: the learning
rate, a dynamic loss scale and the all_reduce. A pass adds to the gradients, so accumulation replays it several times.

Every shape runs eagerly a few times first, so rare shapes are never recorded. Each batch is copied into the memory that
its recording reads. To limit the number of shapes, token counts are rounded up to buckets; cu_seqlens are in device
memory. This module has not run on a GPU yet.
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
    """The cumulative lengths of batches of one shape, in one buffer on the device that a recording reads.

    Args:
        layout: layout of the first batch; the others have as many tokens and sequences.
        device: device of the buffer.
        longest: tokens of the longest sample of any batch, >= 1.
    """

    window = None  # `check_recordable` refuses models whose attention has windows

    def __init__(self, layout: PackedLayout, device: torch.device, longest: int):
        self.lengths = layout.lengths
        # The bound is a number in the recording, so it must hold for every later batch: the longest sample, or the
        # filler, which is at most a sixteenth of all tokens. A bound that is too high launches some empty blocks.
        self.longest = max(longest, layout.tokens // 16 + 1, 16)
        self._place = layout.cu_seqlens(device).clone()

    def cu_seqlens(self, device: torch.device) -> torch.Tensor:
        """The cumulative lengths, `[sequences + 1]` int32."""
        return self._place

    def within(self, window: None) -> RecordedLayout:
        """Itself: there is no window."""
        return self

    def fill(self, layout: PackedLayout) -> None:
        """Copy the cumulative lengths of another batch into the buffer."""
        self._place.copy_(layout.cu_seqlens(self._place.device))


# Eager passes of a shape before it is recorded. Libraries choose kernels and allocate workspaces in them, which a
# recording must not do. A recording takes memory of its own for as long as the run lasts.
_EAGER_FIRST = 3
Pass = Callable[[Batch, int], torch.Tensor]


class Recorder:
    """Records work of the device as graphs (torch.cuda.CUDAGraph).

    Args:
        device: a device that can record.
    """

    def __init__(self, device: Device):
        self._module = torch.get_device_module(device.torch_device)
        self._side = self._module.Stream()
        # One memory pool for all recordings, since no two run at once: memory grows with the largest shape and not with
        # the number of shapes. In return a replay overwrites the results of the others.
        self._pool = self._module.graph_pool_handle()

    def beside(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work` on another stream, as torch requires of the passes before a recording."""
        now = self._module.current_stream()
        self._side.wait_stream(now)
        with self._module.stream(self._side):
            result = work()
        now.wait_stream(self._side)
        return result

    def record(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Record what `work` launches on the device, without running it.

        Returns:
            A function that runs it on the memory that `work` reads and writes. The next replay of any recording
            overwrites its result.
        """
        graph = self._module.CUDAGraph()
        # The thread that collates batches allocates memory meanwhile, which the default mode forbids to all threads.
        with self._module.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


class Recorded:
    """Work on the same memory in every call: eager at first, then recorded, then replayed.

    Args:
        recorder: records the work.
        work: the work; it may depend on nothing that changes except the contents of that memory.
    """

    def __init__(self, recorder: Recorder, work: Callable[[], torch.Tensor]):
        self.recorder, self.work = recorder, work
        self.runs = self.replays = 0
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        """Run the work and return its result, which the next replay of any recording may overwrite."""
        self.runs += 1
        if self._replay is None:
            if self.runs <= _EAGER_FIRST:
                return self.recorder.beside(self.work)
            self._replay = self.recorder.record(self.work)
        self.replays += 1
        return self._replay()


class _Place:
    """The memory from which the work of one shape reads its batch.

    Args:
        batch: the first batch of this shape.
        longest: tokens of the longest sample of any batch.
    """

    def __init__(self, batch: Batch, longest: int):
        inputs = {name: value.clone() for name, value in batch.inputs.items() if name != "layout"}
        inputs["layout"] = RecordedLayout(batch.inputs["layout"], batch.labels.device, longest)
        total = None if batch.step_weight is None else batch.step_weight.clone()
        self.batch = replace(batch, inputs=inputs, labels=batch.labels.clone(), step_weight=total)

    def fill(self, batch: Batch) -> None:
        """Copy another batch of the same shape into this memory."""
        # A few copies of `[tokens]` on the device; they are small beside the launches that a replay saves.
        for name, place in self.batch.inputs.items():
            if name == "layout":
                place.fill(batch.inputs[name])
            else:
                place.copy_(batch.inputs[name])
        self.batch.labels.copy_(batch.labels)
        if batch.step_weight is not None:
            self.batch.step_weight.copy_(batch.step_weight)


class RecordedStep:
    """Recorded passes, norm and update of a run's optimizer steps; see `OptimizerStep`.

    Args:
        run_pass: (batch, samples of the step) -> loss, 0-d; runs eagerly and adds gradients to the flat buffers.
        longest: tokens of the longest sample.
        precision: owner of gradients, masters and loss scale.
        optimizer: the optimizer; if it needs numbers from the host, everything after the passes stays eager.
        max_norm: L2 norm that gradients are clipped to; 0 for no clipping.
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
        """Add the gradients of a batch to the flat buffers; return the loss to log, 0-d."""
        # `samples` divides the loss as a host number, which the recording keeps: another count is another recording.
        shape = (batch.computed_tokens, batch.samples, samples)
        if shape not in self.passes:
            place = _Place(batch, self.longest)
            self.passes[shape] = place, Recorded(self.recorder, lambda: self._pass(place.batch, samples))
        place, work = self.passes[shape]
        place.fill(batch)
        return work()

    def gather_gradients(self) -> torch.Tensor:
        """As `NativePrecision.gather_gradients`."""
        return self.after[0]() if self.after else self.precision.gather_gradients()

    def finish(self, norm: torch.Tensor) -> bool:
        """As `NativePrecision.step`."""
        if self.after is None:
            return self.precision.step(self.optimizer, norm, self.max_norm)
        # With a dynamic loss scale the host waits here for the norm, because it decides whether to launch the update.
        if self.precision.should_skip(norm):
            return False
        self.after[1]()
        return True

    def _update(self) -> torch.Tensor:
        norm = self.precision.norm
        self.precision.update(self.optimizer, norm, self.max_norm)
        return norm

    def summary(self) -> str:
        """A line for the log on how many passes and updates were replayed."""
        works = [work for _, work in self.passes.values()]
        passes, replays = sum(work.runs for work in works), sum(work.replays for work in works)
        recordings = sum(work.replays > 0 for work in works)
        after = "updates stay eager, because this optimizer needs numbers from the host"
        if self.after:
            after = f"{self.after[1].replays} of {self.after[1].runs} updates"
        return f"cuda_graph: {recordings} recording(s), {replays} of {passes} passes replayed; {after}"


def check_recordable(model: LoadedModel, plan: PrecisionPlan, device: Device) -> None:
    """Check that `--cuda_graph` works with this model, precision and device.

    Raises:
        MachineError: it does not; the message says why and what to use instead.
    """
    if not device.can_record:
        raise MachineError(
            f"--cuda_graph: only CUDA devices replay recorded work, and this device is {device.name}; drop the flag"
        )
    if not model.is_packed:
        raise MachineError(f"--cuda_graph works only with packed models ({model.why_padded}); use --torch_compile")
    shape = model.module.shape
    if shape.has_relative_scores or shape.windows or shape.pooling != "first":
        raise MachineError(
            "--cuda_graph: this family's attention or pooling reads lengths on the host in every step, which a "
            "recording would repeat; leave it out, or use --torch_compile"
        )
    dim = shape.hidden // shape.heads
    # Without such a kernel, attention would split the batch by lengths on the host, and a recording would keep the
    # lengths of one batch for all.
    if cuda_kernel(device.torch_device, plan.dtype, dim, shape.attention_dropout) is None:
        raise MachineError(
            f"--cuda_graph: no attention kernel supports {plan.name} with dropout {shape.attention_dropout:g} here; "
            "use --bf16 or --fp16, and --attention_probs_dropout_prob 0"
        )
