"""`--cuda_graph`: an optimizer step as CUDA graphs, each replayed in one launch.

Forward and backward of a pass are recorded once for each shape of a batch. Norm, clip and update are the same for all
shapes and are recorded once. The work of the host and of all ranks together runs between the recordings: the learning
rate, a dynamic loss scale and the all_reduce. A pass adds to the gradients, so accumulation replays it several times.

A shape is recorded when it comes again, so that rare shapes never are. Each batch is copied into the memory that its
recording reads. To limit the number of shapes, token counts are rounded up to buckets; cu_seqlens are in device memory.
The first replay of each kind is compared with the eager work from the same state. If it differs, or if the device
refuses to record, the run says so and stays eager. This module has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bert_glue.config.arguments import Arguments
from bert_glue.config.checks import recording_conflicts
from bert_glue.data.batching import Batch
from bert_glue.data.packing import PackedLayout
from bert_glue.devices.device import Device
from bert_glue.errors import MachineError, first_line
from bert_glue.model.attention import REFUSALS, cuda_kernel
from bert_glue.model.classifier import LoadedModel
from bert_glue.precision.flat_buffers import l2_norm
from bert_glue.precision.native import NativePrecision
from bert_glue.precision.plan import PrecisionPlan
from bert_glue.training.optim import runs_without_host, state_tensors


class RecordedLayout:
    """The cumulative lengths of batches of one shape, in one buffer on the device that a recording reads.

    Args:
        layout: layout of the first batch; the others have as many tokens and sequences.
        device: device of the buffer.
        longest: tokens of the longest sample of any batch, >= 1.
    """

    window = None  # `why_not_recorded` refuses models whose attention has windows

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


# Eager runs of a kind of work before anything of that kind is recorded: in them libraries choose kernels and allocate
# workspaces, which a recording must not do. Each shape runs eagerly once: one that never comes again would cost the
# memory of a recording for as long as the run lasts.
_EAGER_FIRST = 3
# Largest difference between a replay and the eager work, as a share of the eager result (L2 norms). Atomic sums of
# flash's backward differ in the last bits of 16. A recording that reads other memory or draws other masks differs by 1.
_MOST_APART = 0.02
Pass = Callable[[Batch, int], torch.Tensor]


class Recorder:
    """Records work of the device as graphs (torch.cuda.CUDAGraph).

    Args:
        device: a device that can record.
    """

    def __init__(self, device: Device):
        self._device = device
        self._module = torch.get_device_module(device.torch_device)
        self._side = self._module.Stream()
        # One memory pool for all recordings, since no two run at once: memory grows with the largest shape and not with
        # the number of shapes. In return a replay overwrites the results of the others.
        self._pool = self._module.graph_pool_handle()
        # A node of autograd that outlives its pass keeps the stream of that pass, which breaks a recording (pytorch
        # issue 189591). None does here, which a test counts; from torch 2.13 on torch also takes the current stream.
        override = getattr(torch.autograd.graph, "set_override_stale_capture_stream", None)
        if override is not None:
            override(True)

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

        Raises:
            RuntimeError: the device refuses.
        """
        graph = self._module.CUDAGraph()
        try:
            # The thread that collates batches allocates memory meanwhile, which the default mode forbids to all
            # threads.
            with self._module.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError:
            self._device.renew_generator()
            raise

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay

    def random_state(self) -> list[torch.Tensor | None]:
        """State of torch's generators, of the host and the device."""
        return [torch.get_rng_state(), self._device.random_state()]

    def set_random_state(self, state: list[torch.Tensor | None]) -> None:
        """Restore what `random_state` returned."""
        torch.set_rng_state(state[0])
        if state[1] is not None:
            self._device.set_random_state(state[1])


@dataclass
class Kind:
    """What all recordings of one kind share: passes, sums of gradients, or updates.

    Args:
        name: for the log.
        changed: the memory that the work changes, apart from its result.
        say: writes a line to the log.
        eager: eager runs so far.
        is_checked: the first replay was compared with the eager work.
        is_off: nothing more is recorded, because the device refused or a replay differed.
    """

    name: str
    changed: Callable[[], list[torch.Tensor]]
    say: Callable[[str], None]
    eager: int = 0
    is_checked: bool = False
    is_off: bool = False

    def give_up(self, reason: str) -> None:
        """Record nothing more of this kind, and say why."""
        self.is_off = True
        self.say(f"note: cuda_graph: {self.name} stay eager from here on: {reason}")


class Recorded:
    """Work on the same memory in every call: eager at first, then recorded, then replayed.

    Args:
        recorder: records the work.
        work: the work; it may depend on nothing that changes except the contents of that memory.
        kind: what it shares with others.
    """

    def __init__(self, recorder: Recorder, work: Callable[[], torch.Tensor], kind: Kind):
        self.recorder, self.work, self.kind = recorder, work, kind
        self.runs = self.replays = 0
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self) -> torch.Tensor:
        """Run the work and return its result, which the next replay of any recording may overwrite."""
        self.runs += 1
        if self._replay is None and self._may_record():
            if not self.kind.is_checked:
                return self._first()
            self._replay = self._record()
        if self._replay is None:
            self.kind.eager += 1
            return self.recorder.beside(self.work)
        self.replays += 1
        return self._replay()

    def _may_record(self) -> bool:
        return self.runs > 1 and self.kind.eager >= _EAGER_FIRST and not self.kind.is_off

    def _record(self) -> Callable[[], torch.Tensor] | None:
        try:
            return self.recorder.record(self.work)
        except RuntimeError as error:  # torch has no narrower class for what a capture forbids
            self.kind.give_up(f"the device could not record them ({type(error).__name__}: {first_line(error)[:200]})")
            return None

    def _first(self) -> torch.Tensor:
        """Run the work eagerly, record it, replay it from the same state, and compare; return the result."""
        # Once a run for each kind: two copies of what the work changes, and a host that waits for one number. For an
        # update that is 36 bytes a parameter, 4 GB for 110 M, until this function returns.
        changed = self.kind.changed()
        random = self.recorder.random_state()  # eager work and replay then drop the same elements
        try:
            before, eager = [x.clone() for x in changed], [torch.empty_like(x) for x in changed]
        except torch.OutOfMemoryError:
            self.kind.give_up("there is no memory for the copies that compare the first replay")
            return self.recorder.beside(self.work)
        result = self.recorder.beside(self.work).clone()
        _copy(eager, changed)
        # An overflow under a dynamic loss scale leaves nothing to compare: the next run is the first one then.
        replay = self._record() if all(torch.isfinite(tensor).all() for tensor in (result, *eager)) else None
        if replay is None:
            return result
        _copy(changed, before)
        self.recorder.set_random_state(random)
        replayed = replay()
        apart = _apart([replayed, *changed], [result, *eager])
        if not apart <= _MOST_APART:
            self.kind.give_up(f"the first replay differs from the eager work by {apart:.2g} (at most {_MOST_APART})")
            _copy(changed, eager)
            return result
        self._replay, self.kind.is_checked = replay, True
        self.replays += 1
        how = "bit for bit" if apart == 0.0 else f"to {apart:.1g}"
        self.kind.say(f"cuda_graph: the first replay of {self.kind.name} equals the eager work {how}")
        return replayed


def _copy(places: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for place, value in zip(places, values, strict=True):
            place.copy_(value)


@torch.no_grad()
def _apart(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest L2 distance of two tensors, as a share of the expected one's norm; infinite where one is NaN."""
    shares = []
    for one, other in zip(found, expected, strict=True):
        distance = l2_norm([one.float() - other.float()])
        shares.append(torch.where(distance == 0.0, 0.0, distance / l2_norm([other.float()])))  # two zeros are equal
    return float(torch.stack(shares).max().nan_to_num(nan=torch.inf))


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
        say: writes a line to the log.
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
        say: Callable[[str], None] = lambda line: None,
    ):
        self.recorder = recorder
        self.longest = longest
        self.precision = precision
        self.optimizer = optimizer
        self.max_norm = max_norm
        self._pass = run_pass
        self.passes: dict[tuple, tuple[_Place, Recorded]] = {}
        self._of_passes = Kind("passes", lambda: precision.gradient_memory(), say)
        self.after: tuple[Recorded, Recorded] | None = None
        if runs_without_host(self.optimizer):
            sums = Kind("sums of gradients", lambda: precision.gradient_memory(), say)
            updates = Kind("updates", lambda: precision.weight_memory() + state_tensors(optimizer), say)
            self.after = (
                Recorded(recorder, self.precision.gather_gradients, sums),
                Recorded(recorder, self._update, updates),
            )

    def run_pass(self, batch: Batch, samples: int, is_last: bool = True) -> torch.Tensor:
        """Add the gradients of a batch to the flat buffers; return the loss to log, 0-d."""
        # `samples` divides the loss as a host number, which the recording keeps: another count is another recording.
        shape = (batch.computed_tokens, batch.samples, samples)
        if shape not in self.passes:
            place = _Place(batch, self.longest)
            work = Recorded(self.recorder, lambda: self._pass(place.batch, samples), self._of_passes)
            self.passes[shape] = place, work
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


def why_not_recorded(model: LoadedModel, plan: PrecisionPlan, device: Device) -> tuple[str, str] | None:
    """Why steps of this model, precision and device cannot be recorded, and what to use instead; None if they can."""
    if not device.can_record:
        return f"only CUDA devices replay recorded work, and this device is {device.name}", "drop the flag"
    if not model.is_packed:
        return f"only packed models are recorded ({model.why_padded})", "use --torch_compile"
    shape = model.module.shape
    if shape.has_relative_scores or shape.windows or shape.pooling != "first":
        reason = "this family's attention or pooling reads lengths on the host in every step, which a recording repeats"
        return reason, "leave it out, or use --torch_compile"
    dim = shape.hidden // shape.heads
    # Without such a kernel, attention would split the batch by lengths on the host, and a recording would keep the
    # lengths of one batch for all.
    if cuda_kernel(device.torch_device, plan.dtype, dim, shape.attention_dropout) is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in REFUSALS.items())
        reason = f"no attention kernel supports {plan.name} with dropout {shape.attention_dropout:g} here"
        return f"{reason} ({reasons})", "use another precision, or --attention_probs_dropout_prob 0"
    return None


def settle_recording(
    args: Arguments, model: LoadedModel, plan: PrecisionPlan, device: Device, say: Callable[[str], None]
) -> Arguments:
    """`args` with `cuda_graph` settled: without the flag, CUDA devices record where everything it needs is there.

    Raises:
        MachineError: `--cuda_graph` is given and cannot be; the message says why and what to use instead.
    """
    if args.cuda_graph is False or not args.do_train or (args.cuda_graph is None and not device.can_record):
        return replace(args, cuda_graph=False)
    found = why_not_recorded(model, plan, device)
    if args.cuda_graph:
        if found:
            raise MachineError(f"--cuda_graph: {found[0]}; {found[1]}")
        return args
    conflicts = [f"--{name}: {reason}" for name, reason in recording_conflicts(args).items()]
    reasons = [*conflicts, *([found[0]] if found else [])]
    if reasons:
        say(f"note: cuda_graph: steps stay eager: {reasons[0]}")
    return replace(args, cuda_graph=not reasons)
