"""samples/s are samples that were consumed over seconds that were spent on them."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_run import arguments, changed, fit, results_of
from torch.optim.optimizer import register_optimizer_step_post_hook

from bert_glue.data.batching import Batch
from bert_glue.data.packing import PackedLayout
from bert_glue.devices import device
from bert_glue.devices.device import Device
from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.shape import EncoderShape
from bert_glue.pipeline import run as pipeline
from bert_glue.training import loop, setup, throughput
from bert_glue.training.throughput import Meter, forward_flops, gemm_rate


def shape(**changes) -> EncoderShape:
    sizes = {
        "vocab": 30, "embedding": 16, "hidden": 16, "layers": 3, "heads": 2, "intermediate": 24, "positions": 40,
        "types": 2, "labels": 2, "activation": "gelu", "norm_eps": 1e-12, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "output_dropout": 0.0, "head_activation": "tanh", "head_dropouts": (0.0, 0.0),
    }  # fmt: skip
    return EncoderShape(**{**sizes, **changes})


def test_flops_by_hand():
    """hidden 16, feed-forward 24, 3 layers, sequences of 5 and 7 tokens."""
    lengths = (5, 7)
    full = 12 * (4 * 2 * 16 * 16 + 2 * 2 * 16 * 24) + 2 * 2 * 16 * (25 + 49)
    key_value = 12 * 2 * 2 * 16 * 16
    cls_positions = 2 * (2 * 2 * 16 * 16 + 2 * 2 * 16 * 24) + 2 * 2 * 16 * (5 + 7)
    head = 2 * 2 * 16 * 16
    assert forward_flops(shape(), lengths) == 2 * full + key_value + cls_positions + head
    assert forward_flops(shape(), lengths, first_only_last=False) == 3 * full + head


def test_flops_are_those_torch_counts():
    """On sequences of one length, so that nothing is padded; without the 2 outputs of the classifier."""
    from torch.utils.flop_counter import FlopCounterMode

    lengths = (48,) * 4
    layout, module = PackedLayout(lengths), PackedClassifier(shape(positions=48)).eval()
    ids = torch.ones(1, sum(lengths), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:  # it does not know oneDNN's product, which is for larger ones
        module(ids, ids * 0, torch.from_numpy(layout.positions)[None], layout)
    assert forward_flops(shape(), lengths) == counter.get_total_flops() - 2 * 16 * 2 * len(lengths)


@pytest.mark.parametrize("skip", [0, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_samples_are_those_of_the_timed_steps(tmp_path, monkeypatch, skip, drop_last, accumulation):
    seen = []
    original = Meter.end_step
    monkeypatch.setattr(Meter, "end_step", lambda self: (seen.append(self.samples), original(self))[1])
    run = fit(
        arguments(
            tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation, skip_steps=skip,
            dataloader_drop_last=drop_last, num_train_epochs=2.0,
        )
    )  # fmt: skip
    rows = 28 if drop_last else 29  # 7 batches of 4, then one of 1
    passes = [4] * 7 + ([] if drop_last else [1])
    steps = [sum(passes[i : i + accumulation]) for i in range(0, len(passes), accumulation)] * 2
    assert sum(steps) == 2 * rows == run.progress.samples
    assert run.observers.meter.samples == sum(steps[skip:])
    assert run.observers.meter.steps == len(steps) == len(seen)
    lengths = run.data.split.table.lengths
    order = [
        pass_
        for epoch in (0, 1)
        for s in range(run.data.sampler.steps_per_epoch)
        for pass_ in [run.data.sampler.step(run.data.sampler.permutation(epoch), s)]
    ]
    assert run.observers.meter.real_tokens == sum(int(lengths[rows].sum()) for step in order[skip:] for rows in step)


def test_flops_of_a_run_are_three_forwards(tmp_path):
    run = fit(arguments(tmp_path, max_steps=4))
    rows = [run.data.sampler.step(run.data.sampler.permutation(0), s)[0] for s in range(4)]
    lengths = run.data.split.table.lengths
    expected = sum(3 * forward_flops(run.learner.model.module.shape, tuple(lengths[r].tolist())) for r in rows)
    assert run.observers.meter.flops == expected


def test_flops_of_a_padded_run_are_those_torch_counts(tmp_path):
    """Three forwards of a whole last layer: real tokens only, though padding is computed too."""
    run = fit(arguments(tmp_path, max_steps=1, padding="longest", per_device_train_batch_size=3))
    lengths = run.data.split.table.lengths[run.data.sampler.step(run.data.sampler.permutation(0), 0)[0]]
    assert run.observers.meter.flops == 3 * forward_flops(
        run.learner.model.shape, tuple(lengths.tolist()), first_only_last=False
    )
    from torch.utils.flop_counter import FlopCounterMode

    run.learner.model.module.stock.set_attn_implementation("eager")  # torch counts nothing of its fused CPU kernel
    ids = torch.ones(4, 9, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:  # it does not know oneDNN's product, which is for larger ones
        run.learner.model.module.eval()(input_ids=ids, attention_mask=ids)
    head = 2 * run.learner.model.shape.hidden * run.learner.model.shape.labels * 4
    assert forward_flops(run.learner.model.shape, (9,) * 4, first_only_last=False) == counter.get_total_flops() - head


def test_operations_of_other_encoders_are_null_with_the_reason(tmp_path):
    meter = Meter(Device("cpu"), skip_steps=0)
    meter.start()
    meter.count(batch(2))
    meter.end_step()
    meter.stop()
    rates = meter.rates(totals(meter), torch.float32)
    assert rates["train_share_of_gemm"] is None and "not counted" in rates["train_share_of_gemm_reason"]


def totals(meter: Meter) -> dict[str, float]:
    keys = ("samples", "windows", "real_tokens", "computed_tokens", "flops")
    return {key: getattr(meter, key) for key in keys}


def test_the_clock_stands_still_while_a_run_evaluates_and_saves(tmp_path, monkeypatch):
    events = []

    def noted(owner, name: str, word: str, result=None) -> None:
        original = getattr(owner, name)

        def call(*given):
            events.append(word)
            return original(*given) if result is None else result

        monkeypatch.setattr(owner, name, call)

    noted(Meter, "start", "start")
    noted(Meter, "stop", "stop")
    noted(setup, "evaluate", "work", {"eval_accuracy": 0.5})
    noted(loop, "save_checkpoint", "work")
    fit(arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1))
    assert events.count("work") == 6 and events.count("stop") == 4
    for at, word in enumerate(events):
        if word == "work":
            assert [w for w in events[:at] if w != "work"][-1] == "stop", events
    assert events[-1] == "stop"


def batch(samples: int) -> Batch:
    return Batch({}, None, (10,) * samples, 16 * samples)


def test_rates_of_a_meter_with_a_known_clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    meter = Meter(Device("cpu"), skip_steps=1)
    meter.start()
    for seconds, samples in ((50.0, 8), (2.0, 8), (3.0, 4)):
        meter.count(batch(samples))
        clock.now += seconds
        meter.end_step()
    meter.stop()
    clock.now += 1000.0  # evaluation
    meter.start()
    meter.count(batch(8))
    clock.now += 5.0
    meter.end_step()
    meter.stop()
    rates = meter.rates(totals(meter), torch.float32)
    assert rates["train_samples_per_second"] == 20 / 10.0
    assert rates["train_real_tokens_per_second"] == 20.0
    assert rates["train_computed_tokens_per_second"] == 32.0
    assert rates["train_padding_percent"] == pytest.approx(37.5)
    assert (rates["train_timed_steps"], rates["train_timed_seconds"]) == (3, 10.0)
    assert meter.step_seconds == [2.0, 3.0, 5.0]  # neither the skipped step nor the evaluation
    assert rates["train_step_ms_median"] == 3000.0
    assert rates["train_step_ms_p10"] < 3000.0 < rates["train_step_ms_p90"] <= 5000.0


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("skip", [0, 5])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("drop_last", [False, True])
def test_rate_is_that_of_an_independent_count(tmp_path, monkeypatch, drop_last, accumulation, skip, resumes):
    """A forward pass takes 1 s of a clock of our own, an evaluation 100 and a save 50; 2 or 4 steps an epoch."""
    clock, passes, steps = SimpleNamespace(now=0.0), [], []
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(throughput, "gemm_rate", lambda *_: 1e9)

    def slow(owner, name: str, seconds: float, note=lambda result: None) -> None:
        original = getattr(owner, name)

        def call(*given, **named):
            clock.now += seconds
            result = original(*given, **named)
            note(result)
            return result

        monkeypatch.setattr(owner, name, call)

    slow(PackedClassifier, "forward", 1.0, lambda logits: passes.append(len(logits)))
    slow(loop, "save_checkpoint", 50.0)
    monkeypatch.setattr(setup, "evaluate", lambda *_: setattr(clock, "now", clock.now + 100.0) or {})
    hook = register_optimizer_step_post_hook(lambda *_: steps.append((sum(passes), len(passes))))
    args = arguments(
        tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=accumulation, skip_steps=skip,
        dataloader_drop_last=drop_last, num_train_epochs=8.0, eval_strategy="epoch", save_strategy="epoch",
    )  # fmt: skip
    try:
        run = fit(args)
        if resumes:
            half = run.output_dir / f"checkpoint-{4 * run.data.sampler.steps_per_epoch}"
            passes.clear(), steps.clear()
            run = fit(changed(args, resume_from_checkpoint=str(half), output_dir=str(tmp_path / "resumed")))
    finally:
        hook.remove()
    assert run.data.sampler.steps_per_epoch == (3 if drop_last else 4) // accumulation + (
        drop_last and accumulation == 2
    )
    samples, seconds = (last - first for last, first in zip(steps[-1], ([(0, 0), *steps])[skip], strict=True))
    rates = run.observers.meter.rates(totals(run.observers.meter), torch.float32)
    assert rates["train_samples_per_second"] == pytest.approx(samples / seconds, rel=0.005)
    assert rates["train_timed_seconds"] == seconds and rates["train_timed_steps"] == len(steps) - skip
    assert rates["train_step_ms_median"] == 1000.0 * accumulation or accumulation == 2


def test_a_moment_counts_for_the_inner_phase(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    phase = throughput.Phases()
    for _ in range(2):
        with phase("train"):
            clock.now += 5.0
            with phase("evaluate"):
                clock.now += 2.0
            clock.now += 1.0
        clock.now += 100.0
    with pytest.raises(ValueError), phase("save"):
        clock.now += 3.0
        raise ValueError
    assert phase.seconds.pop("import") > 0
    assert phase.seconds == {"compile": None, "train": 12.0, "evaluate": 4.0, "save": 3.0}


def test_nothing_left_to_time_is_null_with_the_reason(tmp_path):
    args = arguments(tmp_path, max_steps=3, skip_steps=3)
    assert pipeline.run(args) == 0
    results = results_of(args, "train_results.json")
    assert results["train_samples_per_second"] is None
    assert results["train_samples_per_second_reason"] == "no step was left to time: 3 optimizer steps, --skip_steps 3"
    assert results["train_samples_consumed"] == 24


def test_the_devices_own_rate_is_a_rate():
    began = time.perf_counter()
    assert 1e8 < gemm_rate(Device("cpu"), torch.float32, 0.1) < 1e15
    assert time.perf_counter() - began < 10


class Accelerator(Device):
    """The CPU as a device whose clock is a queue of events: each product takes as long as the rate says."""

    is_host, rate, now = False, 1e15, 0.0

    def mark(self) -> float:
        return Accelerator.now

    def synchronize(self) -> None:
        pass


@pytest.mark.parametrize("kind", [Device, Accelerator])
def test_a_device_multiplies_larger_matrices_and_its_own_events_time_them(monkeypatch, kind):
    """The host's clock would add its launches to each product, and a small product measures little else."""
    sides = []

    def product(a, b):
        sides.append(len(a))
        Accelerator.now += 2 * len(a) ** 3 / Accelerator.rate

    monkeypatch.setattr(throughput.torch, "matmul", product)
    monkeypatch.setattr(throughput, "multiply", product)
    monkeypatch.setattr(throughput, "_square", lambda device, dtype, size: range(size))
    found = gemm_rate(kind("cpu"), torch.float32, 0.2)
    assert sorted(set(sides)) == [256 * 2**n for n in range(4 if kind is Device else 6)]
    if kind is Accelerator:
        assert found == pytest.approx(Accelerator.rate)


def test_a_share_is_of_the_products_that_are_computed(monkeypatch):
    """A CPU without 16-bit products computes them in fp32: no share of an emulation a hundred times as slow."""
    asked = []
    monkeypatch.setattr(throughput, "gemm_rate", lambda device, dtype: asked.append(dtype) or 1e9)
    for slow in (True, False):
        monkeypatch.setattr(device, "has_slow_products", lambda *_, slow=slow: slow)
        meter = Meter(Device("cpu"), 0, shape())
        meter.start()
        meter.count(batch(2))
        meter.end_step()
        meter.stop()
        rates = meter.rates(totals(meter), torch.bfloat16)
        assert rates["train_share_of_gemm"] == pytest.approx(rates["train_model_tflops_per_second"] * 1e12 / 1e9)
    assert asked == [torch.float32, torch.bfloat16]


def test_an_emulated_dtype_does_not_take_minutes():
    began = time.perf_counter()
    assert gemm_rate(Device("cpu"), torch.float16, 0.1) > 0
    assert time.perf_counter() - began < 10
