"""O-levels: dtypes, masters, loss scale, and what happens to a gradient that is not finite."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny_run
import torch
from tiny_run import arguments, fit, losses, results_of
from torch import nn

from bert_glue.config.arguments import Arguments
from bert_glue.config.parser import parse
from bert_glue.devices import cpu
from bert_glue.devices.device import Device
from bert_glue.errors import DivergedError, MachineError
from bert_glue.pipeline import run as pipeline
from bert_glue.precision import flat_buffers, native
from bert_glue.precision.native import NativePrecision
from bert_glue.precision.plan import PrecisionPlan, chosen_level, plan_precision
from bert_glue.training import throughput
from bert_glue.training.optim import build_optimizer, is_elementwise

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def without_fp16(monkeypatch):
    """A CPU as most are."""
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx2", "avx512f"}))


@pytest.fixture
def with_fp16(monkeypatch):
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx512_fp16"}))


def net(dtype=FP32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def build(plan: PrecisionPlan, optim: str = "adamw_torch_fused", rate: float = 0.01):
    module = net()
    state = NativePrecision(plan, module)
    args = Arguments(optim=optim, learning_rate=rate)
    optimizer, _ = build_optimizer(args, state.optimizer_groups(not is_elementwise(optim)))
    return module, state, optimizer


@pytest.mark.parametrize(
    ("level", "dtype", "model", "master", "autocast"),
    [
        ("O0", FP32, FP32, FP32, None),
        ("O1", BF16, FP32, FP32, BF16),
        ("O2", BF16, BF16, FP32, None),
        ("O2", FP16, FP16, FP32, None),
        ("O3", BF16, BF16, FP32, None),
        ("O3", FP16, FP16, FP32, None),
    ],
)
def test_dtypes(level, dtype, model, master, autocast):
    module, state, _ = build(PrecisionPlan(level, dtype, 1.0))
    assert {p.dtype for p in module.parameters()} == {model}  # LayerNorm too, as with apex
    assert {m.dtype for m in state.masters} == {g.dtype for g in state.gradients} == {master}
    with state.autocast():
        assert torch.is_autocast_enabled("cpu") == (autocast is not None)
        if autocast:
            assert module(torch.ones(1, 4)).dtype == autocast
    is_copy = state.masters[0].data_ptr() != state.groups[0].data.data_ptr()
    assert is_copy == (level in ("O2", "O3"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, PrecisionPlan("O0", FP32, 1.0)),
        ({"fp16": True, "fp16_opt_level": "O0"}, PrecisionPlan("O0", FP32, 1.0)),
        ({"fp16": True}, PrecisionPlan("O1", FP16, 1024.0)),
        ({"fp16": True, "fp16_opt_level": "O2", "loss_scale": "64"}, PrecisionPlan("O2", FP16, 64.0)),
        ({"fp16": True, "fp16_opt_level": "O2", "loss_scale": "dynamic"}, PrecisionPlan("O2", FP16, None)),
        ({"fp16": True, "fp16_opt_level": "O3"}, PrecisionPlan("O3", FP16, 1.0)),
        ({"bf16": True, "fp16_opt_level": "O2", "loss_scale": "dynamic"}, PrecisionPlan("O2", BF16, 1.0)),
    ],
)
def test_plans(with_fp16, flags, expected):
    assert plan_precision(Arguments(**flags), Device("cpu")) == expected


def test_fp16_is_refused_where_it_is_not_native(without_fp16):
    with pytest.raises(MachineError) as caught:
        plan_precision(Arguments(fp16=True), Device("cpu"))
    assert caught.value.exit_code == 4
    assert all(word in str(caught.value) for word in ("--fp16", "--bf16", "fp32", "--fallback_precision fp32"))


def test_a_cpu_whose_fast_format_is_bf16_is_told_so(monkeypatch):
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx512f", "avx512_bf16"}))
    plan = plan_precision(Arguments(fp16=True, fallback_precision="fp32"), Device("cpu"))
    assert plan.name == "O0 fp32" and plan.note.endswith("its fast 16-bit format is bf16 (--bf16)")


def test_apex_is_refused_where_it_is_not():
    with pytest.raises(MachineError, match="apex"):
        plan_precision(Arguments(bf16=True, amp_backend="apex"), Device("cpu"))


def test_fallback_trains_fp32_and_says_so(without_fp16, tmp_path):
    from bert_glue.pipeline import run as pipeline

    args = arguments(tmp_path, fp16=True, fp16_opt_level="O2", fallback_precision="fp32", max_steps=2)
    assert pipeline.run(args) == 0
    results = results_of(args)
    assert results["precision"] == "O0 fp32"
    assert "fp32 (O0) instead of fp16 O2" in results["fallback"] and "--bf16" not in results["fallback"]
    plain = fit(arguments(tmp_path, max_steps=2))
    assert losses(plain) == [e["loss"] for e in results_of(args, "trainer_state.json")["log_history"]]


def set_gradients(state: NativePrecision, value: float) -> torch.Tensor:
    for group in state.groups:
        group.grad.fill_(value)
    return state.gather_gradients()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_o2_is_fp32_masters_around_a_half_model(optim):
    """Against the algorithm written out: scale, backward in half, unscale in fp32, clip, AdamW, copy."""
    module, state, optimizer = build(PrecisionPlan("O2", FP16, 256.0), optim)
    half = net(FP16)
    masters = [p.detach().clone().requires_grad_() for p in net().parameters()]
    reference = torch.optim.AdamW(masters, lr=0.01, weight_decay=0.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        x = 8 * torch.randn(4, 4, generator=generator)
        for parameters in (module, half):
            parameters.zero_grad(set_to_none=False)
            (nn.functional.cross_entropy(parameters(x.half()).float(), torch.tensor([0, 1, 1, 0])) * 256).backward()
        state.step(optimizer, state.gather_gradients(), 0.5)
        for p, m in zip(half.parameters(), masters, strict=True):
            m.grad = p.grad.float() / 256
        nn.utils.clip_grad_norm_(masters, 0.5)
        reference.step()
        with torch.no_grad():
            for p, m in zip(half.parameters(), masters, strict=True):
                p.copy_(m)
    ours = dict(module.named_parameters())
    kept = {}
    for group, master in zip(state.groups, state.masters, strict=True):
        kept |= group.views(master)
    for (name, p), m in zip(half.named_parameters(), masters, strict=True):
        torch.testing.assert_close(kept[name], m.detach(), atol=2e-6, rtol=0)
        assert torch.equal(ours[name], kept[name].half()) and ours[name].dtype == p.dtype


def test_dynamic_scale_skips_and_halves_on_overflow():
    module, state, optimizer = build(PrecisionPlan("O2", FP16, None))
    before = [m.clone() for m in state.masters]
    assert not state.step(optimizer, set_gradients(state, float("inf")), 1.0)
    assert state.scale == 2.0**15 and state.skipped_steps == 1
    assert all(map(torch.equal, state.masters, before)) and not optimizer.state
    assert not state.step(optimizer, set_gradients(state, float("nan")), 1.0)
    assert state.step(optimizer, set_gradients(state, 1.0), 1.0)
    assert state.scale == 2.0**14 and state.skipped_steps == 2
    assert not any(map(torch.equal, state.masters, before))
    assert all(torch.isfinite(p).all() for p in module.parameters())
    state.check_finite()


def test_dynamic_scale_follows_torchs_scaler():
    """Scale and skips of torch.amp.GradScaler, over growth after 2000 clean steps and overflows between."""
    _, state, optimizer = build(PrecisionPlan("O2", FP16, None))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2000)
    p = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([p], lr=0.0)
    scaler.scale(torch.ones(()))
    overflows = {5, 6, 2006, 4500}
    for step in range(4600):
        bad = step in overflows
        p.grad = torch.tensor([float("inf") if bad else 1.0])
        scaler.step(sgd)
        scaler.update()
        norm = torch.tensor(float("inf") if bad else 1.0)
        # Only the scale is of interest here: the update itself would dominate the time.
        assert state._overflowed(bool(~torch.isfinite(norm))) == bad
        assert state.scale == scaler.get_scale(), step
    assert state.scale == 2.0**13  # down twice, once, up at step 4006, down


def test_dynamic_scale_has_a_ceiling_and_a_floor():
    _, state, optimizer = build(PrecisionPlan("O2", FP16, None))
    for _ in range(2000 * 12):
        state._overflowed(False)
    assert state.scale == 2.0**24
    scales = []
    with pytest.raises(DivergedError, match="30 times in a row, at last with loss scale 1:"):
        for _ in range(100):
            state.step(optimizer, set_gradients(state, float("inf")), 1.0)
            scales.append(state.scale)
    assert scales == [max(1.0, 2.0 ** (23 - n)) for n in range(29)]


def test_the_scale_goes_through_a_checkpoint():
    _, state, optimizer = build(PrecisionPlan("O2", FP16, None))
    state.step(optimizer, set_gradients(state, float("inf")), 1.0)
    for _ in range(3):
        state._overflowed(False)
    _, other, _ = build(PrecisionPlan("O2", FP16, None))
    other.load_scale_state(state.scale_state())
    assert (other.scale, other.clean_steps, other.skipped_steps) == (2.0**15, 3, 1)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "lamb"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_static_scale_makes_no_update_from_bad_gradients(optim, bad):
    _, state, optimizer = build(PrecisionPlan("O2", FP16, 1024.0), optim)
    state.step(optimizer, set_gradients(state, 1.0), 1.0)
    state.check_finite()
    before = [m.clone() for m in state.masters]
    state.step(optimizer, set_gradients(state, bad), 1.0)
    state.step(optimizer, set_gradients(state, 1.0), 1.0)  # nor from any later one: the run ends
    assert all(map(torch.equal, state.masters, before))
    with pytest.raises(DivergedError) as caught:
        state.check_finite()
    assert caught.value.exit_code == 5


def test_weights_that_left_the_numbers_are_found():
    _, state, _ = build(PrecisionPlan("O0", FP32, 1.0))
    state.check_finite()
    state.groups[0].data[3] = float("inf")
    with pytest.raises(DivergedError, match="weights"):
        state.check_finite()


def test_bf16_o2_is_close_to_fp32(tmp_path):
    exact = fit(arguments(tmp_path, num_train_epochs=5.0))
    low = fit(arguments(tmp_path, num_train_epochs=5.0, bf16=True, fp16_opt_level="O2"))
    assert {p.dtype for p in low.learner.model.module.parameters()} == {BF16}
    assert losses(low) != losses(exact)
    assert losses(low) == pytest.approx(losses(exact), abs=0.05)
    assert losses(exact)[-1] < 0.9 * losses(exact)[0]


@pytest.mark.parametrize("level", ["O1", "O3"])
def test_other_bf16_levels_learn(tmp_path, level):
    run = fit(arguments(tmp_path, num_train_epochs=5.0, bf16=True, fp16_opt_level=level, learning_rate=1e-2))
    assert losses(run)[-1] < losses(run)[0]


def test_dynamic_fp16_learns_and_its_log_is_json(with_fp16, monkeypatch, tmp_path):
    """The first scale overflows here; a skipped step must neither stop the run nor put Infinity in a file."""
    from bert_glue.pipeline import run as pipeline

    monkeypatch.setattr(throughput, "gemm_rate", lambda *_: 1.0)  # minutes where fp16 is emulated
    monkeypatch.setattr(native, "_FIRST_SCALE", 2.0**24)
    model = tiny_run.make_model(tmp_path / "model")
    args = arguments(
        tmp_path, model_name_or_path=str(model), fp16=True, fp16_opt_level="O2", loss_scale="dynamic", max_steps=8,
    )  # fmt: skip
    assert pipeline.run(args) == 0
    history = results_of(args, "trainer_state.json")["log_history"]
    assert results_of(args)["precision"] == "O2 fp16, loss scale dynamic"
    skipped = [entry for entry in history if entry["grad_norm"] is None]
    assert results_of(args)["train_skipped_updates"] == len(skipped)
    # The schedule's clock stands still on a skipped step.
    for before, entry in zip(history, history[1:], strict=False):
        assert (before["learning_rate"] == entry["learning_rate"]) == (before in skipped)
    assert skipped and len(skipped) < 8


# ---- apex's table, cell by cell: level, what the cell says, for fp16 and bf16 ----

LEVELS = ["O0", "O1", "O2", "O3"]


def plan_of(level: str, dtype: torch.dtype, scale: float | None = 1.0) -> PrecisionPlan:
    return PrecisionPlan(level, FP32 if level == "O0" else dtype, scale)


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.batch_norm, self.LayerNorm = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)

    def forward(self, x):
        return self.LayerNorm(self.batch_norm(self.dense(x)))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("level", LEVELS)
class TestTable:
    def test_model_dtype(self, level, dtype):
        module = WithBatchNorm()
        NativePrecision(plan_of(level, dtype), module)
        expected = dtype if level in ("O2", "O3") else FP32
        assert module.dense.weight.dtype == module.dense.bias.dtype == expected
        assert module.LayerNorm.weight.dtype == expected  # facts: LayerNorm goes fp16

    def test_batch_norm(self, level, dtype):
        """fp32 at O2 alone of the converted ones, statistics too, and it trains."""
        module = WithBatchNorm()
        state = NativePrecision(plan_of(level, dtype), module)
        expected = dtype if level == "O3" else FP32
        assert module.batch_norm.weight.dtype == module.batch_norm.running_mean.dtype == expected
        assert module.batch_norm.num_batches_tracked.dtype == torch.int64
        before = module.batch_norm.weight.detach().clone()
        optimizer, _ = build_optimizer(Arguments(learning_rate=0.1), state.optimizer_groups(per_parameter=False))
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(module.dense.weight.dtype)
        with state.autocast():
            loss = module(x).float().pow(3).sum()
        state.backward(loss)
        state.step(optimizer, state.gather_gradients(), 0.0)
        assert not torch.equal(module.batch_norm.weight, before)

    def test_masters(self, level, dtype):
        """O2 keeps what rounding loses: many updates below the dtype's resolution add up, at O3 they vanish."""
        module = net()
        state = NativePrecision(plan_of(level, dtype), module)
        optimizer, _ = build_optimizer(Arguments(learning_rate=1e-5), state.optimizer_groups(per_parameter=False))
        start = module[1].weight.detach().clone()
        assert torch.equal(start.float(), torch.ones(4))
        for _ in range(200):  # each 1e-5; at 1.0 fp16 has steps of 1e-3, bf16 of 8e-3
            set_gradients(state, -1.0)
            state.step(optimizer, state.gather_gradients(), 0.0)
        kept = {}
        for group, master in zip(state.groups, state.masters, strict=True):
            kept |= group.views(master)
        moved = (kept["1.weight"] - 1.0).tolist()
        assert moved == pytest.approx([0.0 if level == "O3" else 2e-3] * 4, rel=0.01)
        assert bool(state.named_masters()) == (level == "O2")
        if level in ("O2", "O3"):
            assert all(torch.equal(kept[n].to(dtype), p) for n, p in module.named_parameters())

    def test_masters_start_exact(self, level, dtype):
        """From the weights as stored, though the model has them rounded."""
        exact = {name: p.detach().clone() for name, p in net().named_parameters()}
        state = NativePrecision(plan_of(level, dtype), net())
        kept = {}
        for group, master in zip(state.groups, state.masters, strict=True):
            kept |= group.views(master)
        expected = {n: p.to(dtype).float() for n, p in exact.items()} if level == "O3" else exact
        assert all(torch.equal(kept[name], value) for name, value in expected.items())

    def test_default_scale(self, with_fp16, level, dtype):
        kind = "fp16" if dtype == FP16 else "bf16"
        plan = plan_precision(Arguments(**{kind: True}, fp16_opt_level=level), Device("cpu"))
        assert plan.loss_scale == (1024.0 if dtype == FP16 and level in ("O1", "O2") else 1.0)

    @pytest.mark.parametrize(("given", "scale"), [("dynamic", None), ("64", 64.0)])
    def test_given_scale(self, with_fp16, level, dtype, given, scale):
        """As with apex a given one overrides a level's own, at O3 too; fp32 and bf16 need none."""
        kind = "fp16" if dtype == FP16 else "bf16"
        plan = plan_precision(Arguments(**{kind: True}, fp16_opt_level=level, loss_scale=given), Device("cpu"))
        assert plan.loss_scale == (scale if dtype == FP16 and level != "O0" else 1.0)

    def test_casts(self, level, dtype):
        """O1 alone casts around functions; what comes out feeds an fp32 loss at every level."""
        module = net()
        state = NativePrecision(plan_of(level, dtype), module)
        low = module[0].weight.dtype
        with state.autocast():
            inner = module[0](torch.ones(2, 4, dtype=low))
            assert torch.is_autocast_enabled("cpu") == (level == "O1")
        assert inner.dtype == (FP32 if level == "O0" else dtype)
        from bert_glue.tasks import get_task
        from bert_glue.training.losses import sample_losses

        assert sample_losses(get_task("mrpc"), inner[:, :2], torch.tensor([0, 1]), 0.0).dtype == FP32

    def test_clip_acts_on_unscaled_fp32_gradients(self, level, dtype):
        """Scaled by 1024 a gradient of norm 0.9 is not clipped to 1; one of norm 30 is, to 0.5 %."""
        state = NativePrecision(plan_of(level, dtype, 1024.0), net())
        count = sum(g.grad.numel() for g in state.groups)
        for norm, expected in ((0.9, 0.9), (30.0, 1.0)):
            for group in state.groups:
                group.grad.fill_(1024.0 * norm / count**0.5)
            found = state.gather_gradients()
            assert found.item() == pytest.approx(norm, rel=5e-3) and found.dtype == FP32
            (parameter_groups, _), (others, _) = state.optimizer_groups(per_parameter=True)
            sgd = torch.optim.SGD([*parameter_groups, *others], lr=1.0)
            state.step(sgd, found, 1.0)
            clipped = torch.stack([g.norm() for g in state.gradients]).norm()
            assert clipped.item() == pytest.approx(expected, rel=5e-3)
            assert {g.dtype for g in state.gradients} == {FP32}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "lamb", "adafactor"])
def test_o3_survives_what_16_bit_moments_do_not(optim):
    """Gradients of 1e-5: their squares are 0 in fp16, and AdamW in fp16 divides by that."""
    _, state, optimizer = build(PrecisionPlan("O3", FP16, 1.0), optim, rate=1e-3)
    for _ in range(3):
        state.step(optimizer, set_gradients(state, 1e-5), 1.0)
    state.check_finite()
    assert all(torch.equal(m, m.half().float()) for m in state.masters)


def test_passes_of_one_step_add_up_in_fp32():
    """512 passes of 1: bf16 stays at 256. The sum over ranks is of those fp32 sums then."""
    module = net()
    state = NativePrecision(PrecisionPlan("O2", BF16, 1.0), module, passes=512)
    state.zero_gradients()
    for _ in range(512):
        state.backward(module[2].bias.float().sum())
    assert state.summed.dtypes == [FP32] and state.summed.gradients is state.gradients
    gathered = {}
    state.gather_gradients()
    for group, gradient in zip(state.groups, state.gradients, strict=True):
        gathered |= group.views(gradient)
    assert gathered["2.bias"].tolist() == [512.0, 512.0]
    state.zero_gradients()
    assert not any(g.any() for g in (*state.gradients, *(group.grad for group in state.groups)))


class Doubling:
    """Two ranks with the same gradients."""

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor.mul_(2)


def test_an_overflow_of_the_sum_over_ranks_is_an_overflow():
    """Two ranks with 60000 each, finite in fp16, are inf together; all see the same sum and decide alike."""
    _, state, optimizer = build(PrecisionPlan("O2", FP16, None))
    before = [m.clone() for m in state.masters]
    set_gradients(state, 60000.0)
    state.summed.all_reduce(Doubling())
    assert not state.step(optimizer, state.gather_gradients(), 1.0)
    assert state.skipped_steps == 1 and all(map(torch.equal, state.masters, before))
    fixed = build(PrecisionPlan("O2", FP16, 1024.0))[1]
    set_gradients(fixed, 60000.0)
    fixed.summed.all_reduce(Doubling())
    fixed.step(optimizer, fixed.gather_gradients(), 1.0)
    with pytest.raises(DivergedError):
        fixed.check_finite()


# ---- --use_combine_grad: what it promises, natively at every level ----


class CountingRanks:
    """Stands for two ranks with equal gradients, and counts collectives."""

    world_size, rank, is_first = 2, 0, True

    def __init__(self, real):
        self.device, self.sums = real.device, []

    def all_reduce(self, tensors):
        self.sums.append([tensor.numel() for tensor in tensors])

    def all_gather_object(self, value):
        return [value]

    def barrier(self): ...


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "lamb"])
@pytest.mark.parametrize("flags", [{}, {"bf16": True, "fp16_opt_level": "O2"}], ids=["O0", "O2"])
def test_gradients_are_views_of_flat_buffers_and_summed_in_one_collective(tmp_path, flags, optim):
    from bert_glue.training.loop import train

    run = fit(arguments(tmp_path, max_steps=1, optim=optim, use_combine_grad=True, **flags))
    parameters = dict(run.learner.model.module.named_parameters())
    sizes = [group.grad.numel() for group in run.learner.precision.groups]
    assert len(sizes) == 2 and sum(sizes) == sum(p.numel() for p in parameters.values())
    for _ in range(2):  # and they still are after a step
        for group in run.learner.precision.groups:
            start, end = group.grad.data_ptr(), group.grad.data_ptr() + group.grad.nbytes
            for name in group.names:
                grad = parameters[name].grad
                assert start <= grad.data_ptr() and grad.data_ptr() + grad.nbytes <= end and grad.is_contiguous()
                assert start <= grad.data_ptr() < end
        ranks = CountingRanks(run.ranks)
        run.progress.step = 1
        train(replace(run, ranks=ranks, data=replace(run.data, total_steps=2)))
        (gradient_sum,) = [sums for sums in ranks.sums if sums != [1]]  # [1]: the loss, for the log
        (elements,) = gradient_sum
        assert sum(sizes) + 2 <= elements < sum(sizes) + 2 + 64 * len(sizes)


def test_the_log_says_how_gradients_are_kept(tmp_path, monkeypatch):
    from bert_glue.pipeline import run as pipeline

    lines = []
    monkeypatch.setattr(pipeline.ConsoleLog, "line", lambda self, text: lines.append(text))
    fit(arguments(tmp_path, max_steps=1, bf16=True, fp16_opt_level="O2", use_combine_grad=True), prepared_log())
    (line,) = [line for line in lines if line.startswith("gradients: ")]
    assert "views of 2 flat buffers" in line and "x 2 bytes" in line
    assert "1 all-reduce(s) a step in bfloat16, fused clip" in line


def prepared_log():
    from bert_glue.training.console import ConsoleLog

    return ConsoleLog(True, False)


def test_flags_without_effect_are_told():
    from bert_glue.config.parser import parse

    base = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"]
    told = {
        "--loss_scale 1024.0": "--loss_scale 1024.0 has no effect: fp32 needs none",
        "--bf16 --loss_scale dynamic": "--loss_scale dynamic has no effect: bf16 has the range of fp32",
        "--fp16 --fp16_opt_level O0 --loss_scale 8": "--loss_scale 8 has no effect: fp32 needs none",
        "--fp16_opt_level O2": "--fp16_opt_level O2 has no effect without --fp16 or --bf16; the run trains in fp32",
    }
    for words, notice in told.items():
        assert parse([*base, *words.split()]).notices == (notice,)
    assert parse([*base, "--fp16", "--fp16_opt_level", "O3", "--loss_scale", "1024.0"]).notices == ()


# ---- the norm ----


def worst_case(elements: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Equal squares, so that each rounding of a long fp32 sum goes the same way."""
    return torch.full((elements,), 1.1e-3, dtype=dtype)


def exact_norm(tensors: list[torch.Tensor]) -> float:
    """In float64, a piece at a time."""
    return math.sqrt(sum(piece.double().square().sum().item() for t in tensors for piece in t.split(1 << 22)))


def test_a_norm_of_chunks_covers_every_element(monkeypatch):
    """Small chunks, and tensors that fill none, some exactly, or some and a part."""
    monkeypatch.setattr(flat_buffers, "_NORM_CHUNK", 16)
    draws = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (1, 15, 16, 17, 1000)]
    for tensors in (draws, draws[:1], [draws[4].view(10, 100).t()], [torch.zeros(0), draws[3]]):
        assert flat_buffers.l2_norm(tensors).item() == pytest.approx(exact_norm(tensors), rel=3e-7)
    assert flat_buffers.l2_norm([]).item() == flat_buffers.l2_norm([torch.zeros(20)]).item() == 0.0
    assert flat_buffers.l2_norm([torch.tensor([3.0, torch.inf])]).item() == torch.inf
    assert flat_buffers.l2_norm([torch.full((40,), torch.nan)]).isnan()


def test_a_norm_keeps_what_one_long_sum_loses():
    gradient = worst_case(1 << 24)
    assert flat_buffers.l2_norm([gradient]).item() == pytest.approx(exact_norm([gradient]), rel=1e-6)


@pytest.mark.parametrize("level, dtype", [("O0", FP32), ("O1", BF16), ("O2", BF16), ("O2", FP16), ("O3", BF16)])
def test_norm_and_clip_of_many_elements(level, dtype):
    """For 12 M elements `Tensor.norm` is 4e-4 too low; clip and logged norm equal those of float64."""
    module = nn.Linear(4096, 3072, bias=False)
    state = NativePrecision(PrecisionPlan(level, dtype, 1.0), module)
    for group in state.groups:
        group.grad.copy_(torch.randn(group.grad.shape, generator=torch.Generator().manual_seed(3)))
    expected = exact_norm([group.grad for group in state.groups])
    norm = state.gather_gradients()
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    parameter_groups = [
        leaf for parameter_groups, _ in state.optimizer_groups(per_parameter=False) for leaf in parameter_groups
    ]
    state.step(torch.optim.SGD(parameter_groups, lr=0.0), norm, 1.0)
    assert exact_norm(state.gradients) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("draw", [worst_case, lambda elements: torch.randn(elements) * 1e-3])
def test_the_norm_of_335_million_elements(draw):
    """bert-large has 335 M parameters: one sum is 5 % low."""
    gradient = draw(335_000_000)
    assert flat_buffers.l2_norm([gradient]).item() == pytest.approx(exact_norm([gradient]), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "kind", "expected"),
    [
        ("--bf16", "cuda", "O2"),
        ("--bf16 --fp16_opt_level O1", "cuda", "O1"),
        ("--fp16", "cuda", "O1"),
        ("--bf16", "npu", "O1"),
        ("--bf16", "cpu", "O1"),
    ],
)
def test_bf16_alone_means_o2_on_cuda(words, kind, expected):
    args = parse(
        [*["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"], *words.split()]
    )
    assert chosen_level(args, Device(kind)) == expected


def test_the_run_says_that_bf16_means_o2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Device, "prefers_low_precision_model", True)
    monkeypatch.setattr(Device, "fp32_products", "TF32")
    args = replace(arguments(tmp_path, bf16=True, max_steps=1), given=frozenset({"bf16"}))
    assert pipeline.run(args) == 0
    out = capsys.readouterr().out
    assert "precision: O2 bf16, TF32 products; batches: packed" in out
    assert (
        "note: --bf16 alone means O2 on this device, with fp32 master weights; --fp16_opt_level O1 gives autocast"
        in out
    )
