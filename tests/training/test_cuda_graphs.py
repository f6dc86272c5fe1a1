"""--cuda_graph: which work is recorded, and that replayed steps compute what eager ones do.

On a CPU, with a stand-in that takes down operators (fake_cuda_graph.py): it shows that nothing but the recording's own
memory is read and nothing of the host is baked in. Nothing here ran on a GPU.
"""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
import torch.nn.functional as F
from fake_cuda_graph import batched_kernel, stand_in
from forked_ranks import on_ranks
from loop_kernel import _loop_kernel
from resume_checks import assert_close, check_resume, weights
from tiny_run import arguments, fit, flags_of, losses, make_model

from bert_glue.config.parser import parse
from bert_glue.errors import MachineError, UsageError
from bert_glue.model import attention, encoder
from bert_glue.pipeline import run as pipeline
from bert_glue.precision import native
from bert_glue.precision.plan import PrecisionPlan
from bert_glue.training import cuda_graphs
from bert_glue.training.console import ConsoleLog

BASE = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"]


@pytest.fixture
def recordable(monkeypatch):
    """A CPU that attends as CUDA does and whose work can be recorded."""
    stand_in(monkeypatch)
    yield
    attention.cuda_kernel.cache_clear()


def test_the_stand_in_kernel_is_attention():
    query, key, value = (torch.randn(9, 2, 4) for _ in range(3))
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = (query, key, value, cu_seqlens, cu_seqlens, 5, 5, 0.0)
    torch.testing.assert_close(batched_kernel(*given), _loop_kernel([])(*given))


def runs(tmp_path, **settings):
    """The same run, eager on the same buckets and recorded."""
    settings = {"num_train_epochs": 10.0, "adam_epsilon": 1e-4, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "_EAGER_FIRST", 10**9)
        eager = fit(arguments(tmp_path, cuda_graph=True, **settings))
    return eager, fit(arguments(tmp_path, cuda_graph=True, **settings))


def pass_replays(run) -> tuple[int, int]:
    """Replays of passes, and passes."""
    works = [work for _, work in run.step.passes.values()]
    return sum(work.replays for work in works), sum(work.runs for work in works)


def update_replays(run) -> int:
    measure, update = run.step.after
    assert measure.runs >= update.runs
    return update.replays


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "weight_decay": 0.1},
        {"class_weights": "balanced", "per_device_train_batch_size": 4},
        {"bf16": True, "fp16_opt_level": "O2", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"bf16": True, "fp16_opt_level": "O1", "max_grad_norm": 0.0},
        {"bf16": True, "fp16_opt_level": "O3", "ema_decay": 0.9},
        {"rdrop_alpha": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 5.0},
        {"layerwise_lr_decay": 0.7, "weight_decay": 0.2},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_replayed_steps_are_the_eager_ones_bit_for_bit(tmp_path, recordable, settings):
    eager, replayed = runs(tmp_path, **settings)
    replays, passes = pass_replays(replayed)
    assert pass_replays(eager)[0] == update_replays(eager) == 0
    assert replays > passes / 2 and update_replays(replayed) == replayed.data.total_steps - 3
    assert losses(replayed) == losses(eager)
    assert_close(weights(replayed), weights(eager), 0.0)


def test_a_growing_loss_scale_and_a_skipped_step_are_those_of_the_eager_run(tmp_path, recordable, monkeypatch):
    """The scale is in device memory, so no recording fixes it; the host decides between two recordings."""
    monkeypatch.setattr(native, "_GROWTH_STEPS", 4)
    overflow = native.NativePrecision.should_skip

    def should_skip(self, norm):
        seen.append(self.scale)
        if len(seen) % 20 == 13:
            self._is_bad.fill_(1.0)
        return overflow(self, norm)

    monkeypatch.setattr(native.NativePrecision, "should_skip", should_skip)
    # As fp16 has it, which few CPUs compute in.
    monkeypatch.setattr(tiny_run, "plan_precision", lambda *_: PrecisionPlan("O2", torch.bfloat16, None))
    found = []
    monkeypatch.setattr(cuda_graphs, "_EAGER_FIRST", 10**9)
    for _ in range(2):
        seen = []
        found.append((fit(arguments(tmp_path, cuda_graph=True, adam_epsilon=1e-4, num_train_epochs=10.0)), seen))
        monkeypatch.setattr(cuda_graphs, "_EAGER_FIRST", 3)
    (eager, scales), (replayed, again) = found
    assert scales == again and len(set(scales)) > 3 and replayed.learner.precision.skipped_steps == 2
    assert update_replays(replayed) == replayed.data.total_steps - 3 - 2
    assert losses(replayed) == losses(eager)
    assert_close(weights(replayed), weights(eager), 0.0)


@pytest.mark.parametrize("optim", ["adamw_torch", "lamb"])
def test_an_optimizer_that_asks_the_host_stays_eager(tmp_path, recordable, optim):
    eager, replayed = runs(tmp_path, optim=optim)
    assert replayed.step.after is None and pass_replays(replayed)[0]
    assert losses(replayed) == losses(eager)
    assert "passes replayed; updates stay eager, because this optimizer needs numbers" in replayed.step.summary()


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "fp16_opt_level": "O2"}], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_same(tmp_path, recordable, monkeypatch, settings):
    monkeypatch.setattr(cuda_graphs, "_EAGER_FIRST", 1)
    monkeypatch.setattr(encoder, "dropout", of_device)
    check_resume(tmp_path, {"cuda_graph": True, **settings})


def test_buckets_change_no_loss(tmp_path, recordable):
    plain = fit(arguments(tmp_path, num_train_epochs=4.0))
    replayed = fit(arguments(tmp_path, num_train_epochs=4.0, cuda_graph=True))
    assert pass_replays(replayed)[0] and losses(replayed) == pytest.approx(losses(plain), rel=1e-4)


def of_device(x, drop, dropout_masks, mask_id, residual=None):
    """A device's own dropout: numbers come from the generator, not from the recording."""
    dropped = F.dropout(x, drop, training=dropout_masks is not None)
    return dropped if residual is None else dropped + residual


def test_dropout_draws_anew_in_every_replay(tmp_path, recordable, monkeypatch):
    monkeypatch.setattr(encoder, "dropout", of_device)
    eager, replayed = runs(tmp_path, model_name_or_path=str(make_model(tmp_path / "drops", dropout=0.2)))
    assert pass_replays(replayed)[0] and losses(replayed) == losses(eager)


def test_a_number_baked_in_would_be_seen(tmp_path, recordable):
    """Masks that the host draws, as on a CPU, are such numbers: the stand-in is no mere second call."""
    eager, replayed = runs(tmp_path, model_name_or_path=str(make_model(tmp_path / "drops", dropout=0.2)))
    assert losses(replayed) != losses(eager)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    """The sum over ranks runs between two recordings."""
    (alone,), pair = (on_ranks(world, "recorded_run", tmp_path / str(world)) for world in (1, 2))
    for found in pair:
        assert found["updates"] > 3 and found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["weight"] == pytest.approx(alone["weight"], abs=1e-4)


class Notes:
    """A recorder that logs its calls."""

    def __init__(self):
        self.asked = []

    def random_state(self):
        return None

    def set_random_state(self, state):
        return None

    def beside(self, work):
        self.asked.append("eager")
        return work()

    def record(self, work):
        self.asked.append("record")
        return lambda: (self.asked.append("replay"), work())[1]


def _batch(lengths: tuple[int, ...], first: int = 0):
    from token_splits import _assembler, _split

    split = _split([range(first, first + n) for n in lengths], labels=list(range(len(lengths))))
    return _assembler("packed", is_rounded=True)(split, np.arange(len(lengths)))


def steps(say=print):
    """A recorder's notes, and what each pass read of its batch."""

    def run_pass(batch, samples):
        found.append(
            (batch.inputs["input_ids"].sum(), batch.inputs["layout"].cu_seqlens(None).clone(), batch.labels.sum())
        )
        return batch.inputs["input_ids"].sum() / samples

    found, notes = [], Notes()
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    precision = SimpleNamespace(gradient_memory=lambda: [])
    step = cuda_graphs.RecordedStep(
        notes, run_pass, longest=9, precision=precision, optimizer=sgd, max_norm=0.0, say=say
    )
    return step, notes.asked, found


def test_a_shape_is_recorded_when_it_comes_again():
    step, asked, _ = steps()
    for _ in range(5):
        step.run_pass(_batch((5, 4)), 2)
    checked = ["eager", "record", "replay"]  # the first replay is compared with the eager work
    assert asked == ["eager"] * 3 + checked + ["replay"]
    asked.clear()
    step.run_pass(_batch((5, 12)), 2)  # the next bucket
    step.run_pass(_batch((5, 12)), 2)
    step.run_pass(_batch((5, 4)), 4)  # the last step of an epoch has fewer samples
    assert asked == ["eager", "record", "replay", "eager"]
    assert sum(work.replays for _, work in step.passes.values()) == 3


def test_another_batch_of_the_shape_is_copied_to_the_recording():
    step, asked, found = steps()
    for first in range(4):
        step.run_pass(_batch((5, 4), first), 2)
    loss = step.run_pass(_batch((2, 7), first=30), 2)
    assert asked[-1] == "replay" and loss == (sum(range(30, 32)) + sum(range(30, 37))) / 2
    assert found[-1][1].tolist() == [0, 2, 9, 16]


def test_the_run_says_how_much_was_replayed(tmp_path, recordable, capsys):
    assert pipeline.run(arguments(tmp_path, num_train_epochs=6.0, cuda_graph=True)) == 0
    line = _lines(capsys)[-1]
    assert re.fullmatch(r"cuda_graph: [1-9] recording\(s\), \d+ of 24 passes replayed; 21 of 24 updates", line)


# ---- without the flag, and where a recording fails ----


def _lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "cuda_graph: " in line]


def test_steps_are_recorded_without_the_flag(tmp_path, recordable, capsys):
    assert pipeline.run(arguments(tmp_path, num_train_epochs=6.0)) == 0
    lines = _lines(capsys)
    kinds = ("sums of gradients", "updates", "passes")
    expected = [f"cuda_graph: the first replay of {kind} equals the eager work bit for bit" for kind in kinds]
    assert lines[:3] == expected and len(lines) == 4 and re.search(r"[1-9]\d* of 24 passes replayed", lines[3])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"cuda_graph": False}, []),
        ({"do_train": False, "do_eval": True}, []),
        (
            {"gradient_checkpointing": True},
            ["note: cuda_graph: steps stay eager: --gradient_checkpointing: it reads the generator's state"],
        ),
        ({"padding": "longest"}, ["note: cuda_graph: steps stay eager: only packed models are recorded (--padding"]),
    ],
    ids=str,
)
def test_steps_stay_eager(tmp_path, recordable, capsys, settings, expected):
    assert pipeline.run(arguments(tmp_path, max_steps=6, **settings)) == 0
    lines = _lines(capsys)
    assert len(lines) == len(expected) and all(map(str.startswith, lines, expected))


def test_a_cpu_does_not_mention_recordings(tmp_path, capsys):
    assert pipeline.run(arguments(tmp_path, max_steps=2)) == 0 and _lines(capsys) == []


def broken_at(monkeypatch, number: int, breaks) -> None:
    """The recording of this number (from 1) becomes `breaks(replay)`."""
    record, count = cuda_graphs.Recorder.record, iter(range(1, 10**6))

    def broken(self, work):
        replay = record(self, work)
        return breaks(replay) if next(count) == number else replay

    monkeypatch.setattr(cuda_graphs.Recorder, "record", broken)


def _refuses(replay):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(("number", "kind"), [(1, "sums of gradients"), (2, "updates"), (3, "passes")])
@pytest.mark.parametrize(
    ("breaks", "expected"),
    [
        (_refuses, "the device could not record them (RuntimeError: operation not permitted when stream is capturing)"),
        (lambda replay: lambda: replay() * 1.1, "the first replay differs from the eager work by 0.1 (at most 0.02)"),
        (lambda replay: lambda: replay() * torch.nan, "the first replay differs from the eager work by inf ("),
    ],
    ids=["refused", "differs", "NaN"],
)
def test_a_run_goes_on_eagerly_and_says_so(tmp_path, recordable, monkeypatch, capsys, number, kind, breaks, expected):
    settings = {"num_train_epochs": 6.0, "adam_epsilon": 1e-4}
    plain = fit(arguments(tmp_path, **settings, cuda_graph=True))
    broken_at(monkeypatch, number, breaks)
    log = ConsoleLog(True, False)
    run = fit(arguments(tmp_path, **settings, cuda_graph=True), log)
    notes = [line for line in _lines(capsys) if line.startswith("note")]
    assert len(notes) == 1 and notes[0].startswith(f"note: cuda_graph: {kind} stay eager from here on: {expected}")
    assert losses(run) == losses(plain)
    assert_close(weights(run), weights(plain), 0.0)


def test_a_run_without_memory_for_the_comparison_stays_eager(recordable):
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    said = []
    step, asked, _ = steps(said.append)
    step.precision.gradient_memory = lambda: [SimpleNamespace(clone=no_memory)]
    for _ in range(6):
        step.run_pass(_batch((5, 4)), 2)
    assert asked == ["eager"] * 6 and len(said) == 1 and "there is no memory for the copies" in said[0]


def test_an_overflow_is_no_comparison(tmp_path, recordable, monkeypatch):
    """A dynamic scale begins with overflows: a step whose numbers are not finite is not the first replay."""
    step, asked, found = steps()
    step.precision.gradient_memory = lambda: [torch.tensor(torch.inf)] if len(found) < 7 else []
    for _ in range(8):
        step.run_pass(_batch((5, 4)), 2)
    assert asked == ["eager"] * 8 + ["record", "replay"]


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "fp16_opt_level": "O1"}, {"rdrop_alpha": 0.5}], ids=str)
def test_no_node_of_autograd_outlives_its_pass(tmp_path, monkeypatch, settings):
    """A node that adds gradients keeps the stream of its pass; a recording on another stream then fails."""
    run = fit(arguments(tmp_path, max_steps=1, **settings))
    assert survivors(run, monkeypatch, keeps_loss=False) == 0
    assert survivors(run, monkeypatch, keeps_loss=True) > 0  # what the count is able to see


def survivors(run, monkeypatch, keeps_loss: bool) -> int:
    """Parameters whose node lives on after a pass."""
    edge, kept = torch.autograd.graph.get_gradient_edge, []
    parameters = [p for group in run.learner.precision.groups for p in group.parameters]
    backward = native.NativePrecision.backward

    def marked(self, loss, is_last=True):
        for parameter in parameters:
            edge(parameter).node.metadata["of this pass"] = True
        backward(self, loss, is_last)
        kept.append(loss if keeps_loss else None)

    monkeypatch.setattr(native.NativePrecision, "backward", marked)
    run.learner.precision.zero_gradients()
    run.step.run_pass(run.data.collate(run.data.split, np.arange(4)), 4)
    monkeypatch.setattr(native.NativePrecision, "backward", backward)
    return sum("of this pass" in edge(parameter).node.metadata for parameter in parameters)


def test_torch_has_what_the_recorder_asks_for():
    """Names and arguments of torch.cuda, without a device."""
    taken = set(inspect.signature(torch.cuda.graph).parameters)
    assert {"cuda_graph", "pool", "capture_error_mode"} <= taken
    assert hasattr(torch.cuda.CUDAGraph, "replay") and callable(torch.cuda.graph_pool_handle)
    assert "capturable" in inspect.signature(torch.optim.AdamW).parameters
    assert torch.get_device_module(torch.device("cuda", 0)) is torch.cuda
    assert callable(torch.Generator.clone_state) and callable(torch.Generator.graphsafe_set_state)


# ---- where it cannot be ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gradient_checkpointing", "--cuda_graph with --gradient_checkpointing"),
        ("--fgm_epsilon 0.1", "--cuda_graph with --fgm_epsilon"),
        ("--fp16 --amp_backend apex", "--cuda_graph with --amp_backend apex: only the native levels are recorded"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, expected):
    with pytest.raises(UsageError) as caught:
        parse([*BASE, "--cuda_graph", *words.split()])
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_other_devices_are_refused_with_exit_code_4(tmp_path, capsys):
    import run_glue

    assert run_glue.main(flags_of(arguments(tmp_path, cuda_graph=True))) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --cuda_graph: only CUDA devices replay recorded work, and this device is CPU, ")


def test_padded_models_and_absent_kernels_are_refused(tmp_path, recordable, monkeypatch):
    with pytest.raises(MachineError, match="only packed models are recorded .*use --torch_compile"):
        pipeline.run(arguments(tmp_path, cuda_graph=True, padding="longest"))
    monkeypatch.setattr(attention, "CUDA_KERNELS", {"flash": (_only_ampere, True)})
    monkeypatch.setattr(attention, "REFUSALS", refusals := {})
    monkeypatch.setattr(cuda_graphs, "REFUSALS", refusals)
    attention.cuda_kernel.cache_clear()
    expected = (
        r"no attention kernel supports O0 fp32 with dropout 0 here \(flash: RuntimeError: only Ampere\); use another"
    )
    with pytest.raises(MachineError, match=expected):
        pipeline.run(arguments(tmp_path, cuda_graph=True))


def _only_ampere(*given):
    raise RuntimeError("only Ampere")
