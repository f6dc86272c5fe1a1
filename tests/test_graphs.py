"""--cuda_graph: which passes are recorded, and that replayed ones compute what eager ones do.

On a CPU, with a stand-in that takes down operators (device_tape.py): it shows that nothing but the recording's own
memory is read and nothing of the host is baked in. Nothing here ran on a GPU.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from device_tape import Tape
from recipe_parts import arguments, fit, flags_of, losses, make_model
from test_attention import _loop_kernel
from test_training import assert_close, weights

from bert_glue import attention, graphs, packed, recipe
from bert_glue.command_line import parse
from bert_glue.device import Device
from bert_glue.errors import MachineError, UsageError

BASE = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"]


@pytest.fixture
def recordable(monkeypatch):
    """A CPU that attends as CUDA does, by borders on the device, and whose work can be recorded."""
    attention.cuda_kernel.cache_clear()
    monkeypatch.setitem(attention.ATTENTION, "cpu", attention.varlen_attention)
    monkeypatch.setattr(attention, "CUDA_KERNELS", {"stand-in": (_batched_kernel, True)})
    monkeypatch.setattr(graphs, "Recorder", Tape)
    monkeypatch.setattr(Device, "can_record", True)
    yield
    attention.cuda_kernel.cache_clear()


def _batched_kernel(query, key, value, q_borders, k_borders, q_longest, k_longest, drop):
    """Variable lengths by borders that stay tensors: all pairs, those of two sequences masked."""
    q_owner = torch.searchsorted(q_borders, torch.arange(len(query), dtype=torch.int32), right=True)
    k_owner = torch.searchsorted(k_borders, torch.arange(len(key), dtype=torch.int32), right=True)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(q_owner[:, None] != k_owner[None, :], torch.finfo(query.dtype).min)
    return torch.einsum("hqk,khd->qhd", F.dropout(scores.softmax(-1), drop), value)


def test_the_stand_in_kernel_is_attention():
    query, key, value = (torch.randn(9, 2, 4) for _ in range(3))
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    given = (query, key, value, borders, borders, 5, 5, 0.0)
    torch.testing.assert_close(_batched_kernel(*given), _loop_kernel([])(*given))


def runs(tmp_path, **settings):
    """The same run, eager on the same buckets and recorded."""
    settings = {"num_train_epochs": 10.0, "adam_epsilon": 1e-4, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_EAGER_FIRST", 10**9)
        eager = fit(arguments(tmp_path, cuda_graph=True, **settings))
    return eager, fit(arguments(tmp_path, cuda_graph=True, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "weight_decay": 0.1},
        {"bf16": True, "fp16_opt_level": "O2", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"bf16": True, "fp16_opt_level": "O1"},
        {"rdrop_alpha": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 5.0},
    ],
)
def test_replayed_steps_are_the_eager_ones_bit_for_bit(tmp_path, recordable, settings):
    eager, replayed = runs(tmp_path, **settings)
    assert eager.recorded.replays == 0 and replayed.recorded.replays > sum(replayed.recorded.seen.values()) / 2
    assert losses(replayed) == losses(eager)
    assert_close(weights(replayed), weights(eager), 0.0)


def test_buckets_change_no_loss(tmp_path, recordable):
    plain = fit(arguments(tmp_path, num_train_epochs=4.0))
    replayed = fit(arguments(tmp_path, num_train_epochs=4.0, cuda_graph=True))
    assert replayed.recorded.replays and losses(replayed) == pytest.approx(losses(plain), rel=1e-4)


def test_dropout_draws_anew_in_every_replay(tmp_path, recordable, monkeypatch):
    """A device's own dropout: numbers come from the generator, not from the recording."""

    def of_device(x, drop, noise, site, residual=None):
        dropped = F.dropout(x, drop, training=noise is not None)
        return dropped if residual is None else dropped + residual

    monkeypatch.setattr(packed, "dropout", of_device)
    eager, replayed = runs(tmp_path, model_name_or_path=str(make_model(tmp_path / "drops", dropout=0.2)))
    assert replayed.recorded.replays and losses(replayed) == losses(eager)


def test_a_number_baked_in_would_be_seen(tmp_path, recordable):
    """Masks that the host draws, as on a CPU, are such numbers: the stand-in is no mere second call."""
    eager, replayed = runs(tmp_path, model_name_or_path=str(make_model(tmp_path / "drops", dropout=0.2)))
    assert losses(replayed) != losses(eager)


class Notes:
    """A recorder that notes what it was asked for."""

    def __init__(self):
        self.asked = []

    def beside(self, work):
        self.asked.append("eager")
        return work()

    def record(self, work):
        self.asked.append("record")
        return lambda: (self.asked.append("replay"), work())[1]


def _batch(lengths: tuple[int, ...], first: int = 0):
    from test_batching import _assembler, _split

    split = _split([range(first, first + n) for n in lengths], labels=list(range(len(lengths))))
    return _assembler("packed", is_rounded=True)(split, np.arange(len(lengths)))


def passes(scale=lambda: 1.0):
    def work(batch, samples):
        found.append(
            (batch.inputs["input_ids"].sum(), batch.inputs["layout"].borders(None).clone(), batch.labels.sum())
        )
        return batch.inputs["input_ids"].sum() / samples

    found, notes = [], Notes()
    return graphs.RecordedPasses(notes, work, 9, scale), notes.asked, found


def test_a_shape_is_recorded_when_it_is_no_longer_rare():
    run, asked, _ = passes()
    for _ in range(5):
        run(_batch((5, 4)), 2)
    run(_batch((5, 12)), 2)  # the next bucket
    run(_batch((5, 4)), 4)  # the last step of an epoch has fewer samples
    assert asked == ["eager"] * 3 + ["record", "replay", "replay"] + ["eager"] * 2
    assert run.replays == 2


def test_another_batch_of_the_shape_is_copied_to_the_recording():
    run, asked, found = passes()
    for first in range(4):
        run(_batch((5, 4), first), 2)
    loss = run(_batch((2, 7), first=30), 2)
    assert asked[-1] == "replay" and loss == (sum(range(30, 32)) + sum(range(30, 37))) / 2
    assert found[-1][1].tolist() == [0, 2, 9, 16]


def test_another_loss_scale_is_recorded_anew():
    scale = [1.0]
    run, asked, _ = passes(lambda: scale[0])
    for _ in range(4):
        run(_batch((5, 4)), 2)
    scale[0] = 0.5
    run(_batch((5, 4)), 2)
    assert asked[-2:] == ["record", "replay"] and len(run.recordings) == 1


def test_the_run_says_how_much_was_replayed(tmp_path, recordable, capsys):
    assert recipe.run(arguments(tmp_path, num_train_epochs=6.0, cuda_graph=True)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda_graph: ")]
    assert line.endswith("of 24 passes replayed") and not line.startswith("cuda_graph: 0 ")


def test_torch_has_what_the_recorder_asks_for():
    """Names and arguments of torch.cuda, without a device."""
    taken = set(inspect.signature(torch.cuda.graph).parameters)
    assert {"cuda_graph", "pool", "capture_error_mode"} <= taken
    assert hasattr(torch.cuda.CUDAGraph, "replay") and callable(torch.cuda.graph_pool_handle)
    assert torch.get_device_module(torch.device("cuda", 0)) is torch.cuda


# ---- where it cannot be ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--torch_compile", "--cuda_graph with --torch_compile"),
        ("--gradient_checkpointing", "--cuda_graph with --gradient_checkpointing"),
        ("--fgm_epsilon 0.1", "--cuda_graph with --fgm_epsilon"),
        ("--fp16 --amp_backend apex", "--cuda_graph goes with --amp_backend native only"),
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
    assert line.startswith("error: --cuda_graph: only CUDA devices replay recorded work, not this one (CPU, ")


def test_padded_models_and_absent_kernels_are_refused(tmp_path, recordable, monkeypatch):
    with pytest.raises(MachineError, match="packed models only .*use --torch_compile"):
        recipe.run(arguments(tmp_path, cuda_graph=True, padding="longest"))
    monkeypatch.setattr(attention, "CUDA_KERNELS", {})
    attention.cuda_kernel.cache_clear()
    with pytest.raises(MachineError, match="no attention kernel here takes O0 fp32 with dropout 0; use --bf16"):
        recipe.run(arguments(tmp_path, cuda_graph=True))
