"""--amp_backend apex, against a stand-in with apex's signatures (tests/support/apex_contract): simulated, on a CPU."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from free_port import free_port
from resume_checks import check_resume
from tiny_run import REPOSITORY, arguments, changed, fit, flags_of, losses, results_of

from bert_glue.config.parser import parse
from bert_glue.devices import cpu, device
from bert_glue.errors import CheckpointError, DivergedError, MachineError, UsageError
from bert_glue.pipeline import run as pipeline
from bert_glue.precision.apex import load_amp
from bert_glue.precision.plan import plan_precision
from bert_glue.training import throughput
from bert_glue.training.resume import whole_weights

CONTRACT = Path(__file__).parents[1] / "support" / "apex_contract"
ASCEND_ONLY = [
    "dynamic_init_scale", "scale_growth_factor", "scale_backoff_factor", "scale_window", "combine_grad",
    "combine_ddp", "ddp_replica_count", "user_cast_preferred", "check_combined_tensors",
]  # fmt: skip


def forget_apex() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def amp(monkeypatch):
    """Ascend's apex, and a CPU that is declared to have fp16."""
    monkeypatch.syspath_prepend(CONTRACT)
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx512_fp16"}))
    monkeypatch.setattr(throughput, "gemm_rate", lambda *_: 1.0)
    forget_apex()
    import apex.amp

    yield apex.amp
    apex.amp.undo()
    forget_apex()


@pytest.fixture
def nvidia_amp(amp, monkeypatch):
    """NVIDIA's last amp: the same without Ascend's arguments."""
    whole = amp.initialize
    parameters = inspect.signature(whole).parameters.values()

    def initialize(*args, **kwargs):
        assert not set(kwargs) & set(ASCEND_ONLY)
        return whole(*args, **kwargs)

    initialize.__signature__ = inspect.Signature([p for p in parameters if p.name not in ASCEND_ONLY])
    monkeypatch.setattr(amp, "initialize", initialize)
    return amp


def apex_arguments(folder, **changes):
    settings = {"fp16": True, "fp16_opt_level": "O2", "amp_backend": "apex", "max_steps": 8, "adam_epsilon": 1e-4}
    return arguments(folder, **{**settings, **changes})


# ---- how it is called ----


@pytest.mark.parametrize(
    ("flags", "given"),
    [
        ({}, {"opt_level": "O2", "loss_scale": 1024.0, "combine_grad": False}),
        ({"use_combine_grad": True}, {"opt_level": "O2", "loss_scale": 1024.0, "combine_grad": True}),
        ({"fp16_opt_level": "O1", "loss_scale": "dynamic"}, {"opt_level": "O1", "loss_scale": "dynamic"}),
        ({"fp16_opt_level": "O3", "loss_scale": "64"}, {"opt_level": "O3", "loss_scale": 64.0}),
        ({"fp16_opt_level": "O0"}, {"opt_level": "O0", "loss_scale": 1.0}),
    ],
)
def test_initialize_is_given_what_the_reference_gives(amp, tmp_path, flags, given):
    fit(apex_arguments(tmp_path, max_steps=2, **flags))
    (call,) = amp.CALLS
    assert {name: call[name] for name in given} == given
    untouched = inspect.signature(amp.initialize).parameters
    rest = set(call) - {"opt_level", "loss_scale", "combine_grad"}
    assert all(call[name] == untouched[name].default for name in rest)


def test_nvidias_amp_is_not_given_what_it_does_not_know(nvidia_amp, tmp_path):
    run = fit(apex_arguments(tmp_path, max_steps=2))
    assert run.learner.precision.plan.name == "O2 fp16, loss scale 1024, apex"
    with pytest.raises(MachineError, match="--use_combine_grad: this apex has no combine_grad"):
        fit(apex_arguments(tmp_path, use_combine_grad=True))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "apex is not installed"),
        ({"__init__.py": ""}, "this apex has no amp, which NVIDIA removed in 2025-05"),
        ({"__init__.py": "import torch._six"}, "apex cannot be imported (No module named 'torch._six')"),
        ({"__init__.py": "", "amp.py": "raise OSError('no libcudart')"}, "apex cannot be imported (no libcudart)"),
    ],
    ids=["absent", "no amp", "old", "broken"],
)
def test_an_apex_that_cannot_do_it_is_exit_code_4_with_the_fix(tmp_path, monkeypatch, files, said):
    monkeypatch.setattr(cpu, "features", lambda: frozenset({"avx512_fp16"}))
    forget_apex()
    for name, text in (files or {}).items():
        (tmp_path / "apex").mkdir(exist_ok=True)
        (tmp_path / "apex" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MachineError) as caught:
        plan_precision(apex_arguments(tmp_path, model_name_or_path="m", train_file="f"), device.Device("cpu"))
    forget_apex()
    assert caught.value.exit_code == 4 and said in str(caught.value)
    assert "leave --amp_backend out" in str(caught.value)


def test_apex_knows_no_bf16():
    words = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"]
    with pytest.raises(UsageError, match="--amp_backend apex does not support --bf16"):
        parse([*words, "--bf16", "--amp_backend", "apex"])
    assert parse([*words, "--fp16", "--half_precision_backend", "auto"]).amp_backend == "auto"


@pytest.mark.parametrize("epsilon", [1e-8, 2e-8, 1e-12])
def test_an_epsilon_that_is_0_in_fp16_is_refused_where_fp16_weights_are_updated(amp, tmp_path, epsilon):
    """A parameter with a gradient of 0 would become NaN: 0 / (sqrt(0) + 0)."""
    assert torch.tensor(epsilon).half() == 0
    with pytest.raises(UsageError, match="--adam_epsilon .* is 0 in fp16.*--adam_epsilon 1e-4") as caught:
        fit(apex_arguments(tmp_path, fp16_opt_level="O3", adam_epsilon=epsilon))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "flags",
    [
        {"fp16_opt_level": "O3", "adam_epsilon": 1e-7},
        {"fp16_opt_level": "O2", "adam_epsilon": 1e-8},
        {"fp16_opt_level": "O3", "adam_epsilon": 1e-8, "amp_backend": "auto"},
        {"fp16_opt_level": "O3", "adam_epsilon": 1e-8, "optim": "adafactor"},
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_other_epsilons_and_levels_train(amp, tmp_path, flags):
    run = fit(apex_arguments(tmp_path, max_steps=2, learning_rate=1e-5, **flags))
    assert all(torch.isfinite(p).all() for p in run.learner.precision.masters)


def test_auto_is_native(amp, tmp_path):
    run = fit(apex_arguments(tmp_path, amp_backend="auto", max_steps=1))
    assert run.learner.precision.plan.backend == "native" and not amp.CALLS


def test_a_level_that_the_optimizer_refuses_is_exit_code_4(amp, tmp_path):
    with pytest.raises(MachineError, match="npu fused optimizer can only be used"):
        fit(apex_arguments(tmp_path, fp16_opt_level="O3", optim="adamw_apex_fused_npu"))


# ---- it trains as the native levels do ----

TOLERANCE = {"O0": 1e-6, "O1": 2e-3, "O2": 2e-3, "O3": 2e-2}


@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("level", TOLERANCE)
def test_levels_train_as_the_native_ones(amp, tmp_path, level, combine):
    flags = {"fp16_opt_level": level, "max_grad_norm": 0.3, "weight_decay": 0.1, "learning_rate": 1e-3}
    theirs = fit(apex_arguments(tmp_path, use_combine_grad=combine, **flags))
    amp.undo()
    ours = fit(apex_arguments(tmp_path, amp_backend="native", **flags))
    assert losses(theirs) == pytest.approx(losses(ours), rel=TOLERANCE[level])
    norms = [[entry["grad_norm"] for entry in run.progress.history] for run in (theirs, ours)]
    assert norms[0] == pytest.approx(norms[1], rel=20 * TOLERANCE[level])
    assert max(norms[0]) > 0.3  # clipping acts
    low = torch.float16 if level in ("O2", "O3") else torch.float32
    assert {p.dtype for p in theirs.learner.model.module.parameters()} == {low}


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_accumulated_passes_are_one_large_batch(amp, tmp_path, level):
    flags = {"fp16_opt_level": level, "max_steps": 4}
    large = fit(apex_arguments(tmp_path, **flags))
    small = fit(apex_arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **flags))
    assert losses(small) == pytest.approx(losses(large), rel=2e-3)


def test_overflow_skips_and_holds_the_schedule(amp, tmp_path, monkeypatch):
    monkeypatch.setattr(amp, "_Scaler", lambda *_, real=amp._Scaler: real("dynamic", 2.0**24, 2000, None, 2.0**24))
    run = fit(apex_arguments(tmp_path, loss_scale="dynamic"))
    history = run.progress.history
    scales = [2.0**24, *(entry["loss_scale"] for entry in history)]
    skips = [now < before for before, now in zip(scales, scales[1:], strict=False)]
    assert run.learner.precision.skipped_steps == sum(skips) and run.progress.updates == 8 - sum(skips)
    assert 0 < sum(skips) < 8
    for was_skipped, before, now in zip(skips, history, history[1:], strict=False):
        assert (before["learning_rate"] == now["learning_rate"]) == was_skipped


def test_overflow_without_end_stops_the_run(amp, tmp_path, monkeypatch):
    run = fit(apex_arguments(tmp_path, loss_scale="dynamic", max_steps=1))
    before = [master.clone() for master in run.learner.precision.masters]
    with pytest.raises(DivergedError, match="30 times in a row"):
        for _ in range(31):
            run.learner.precision.zero_gradients()
            run.learner.precision.backward(torch.tensor(float("inf")) * run.learner.model.module.head_output.bias.sum())
            run.learner.precision.step(run.learner.optimizer, run.learner.precision.gather_gradients(), 1.0)
    assert all(map(torch.equal, before, run.learner.precision.masters))


@pytest.mark.parametrize("combine", [False, True])
def test_bad_gradients_under_a_static_scale_make_no_update(amp, tmp_path, combine):
    run = fit(apex_arguments(tmp_path, max_steps=1, use_combine_grad=combine))
    before = [master.clone() for master in run.learner.precision.masters]
    run.learner.precision.zero_gradients()
    run.learner.precision.backward(torch.tensor(float("nan")) * run.learner.model.module.head_output.bias.sum())
    with pytest.raises(DivergedError) as caught:
        run.learner.precision.step(run.learner.optimizer, run.learner.precision.gather_gradients(), 1.0)
    assert caught.value.exit_code == 5
    assert all(map(torch.equal, before, run.learner.precision.masters))


# ---- checkpoints ----


@pytest.mark.parametrize(
    "flags",
    [
        {"fp16_opt_level": "O2"},
        {"fp16_opt_level": "O2", "loss_scale": "dynamic"},
        {"fp16_opt_level": "O1", "loss_scale": "dynamic"},
        {"fp16_opt_level": "O2", "use_combine_grad": True, "optim": "adamw_apex_fused_npu"},
        {"fp16_opt_level": "O2", "optim": "adamw_apex_fused"},
        {"fp16_opt_level": "O3", "adam_epsilon": 1e-4},  # 1e-8 is refused
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_a_resumed_run_is_the_same_run(amp, tmp_path, flags):
    """Not so with apex alone: it saves half weights and no masters."""
    check_resume(tmp_path, {"fp16": True, "amp_backend": "apex", **flags})


def test_masters_are_saved_whole_and_the_scale_with_them(amp, tmp_path):
    run = fit(apex_arguments(tmp_path, loss_scale="dynamic"))
    saved = whole_weights(run)
    model = {name: p for name, p in run.learner.model.module.named_parameters()}
    assert {value.dtype for value in saved.values()} == {torch.float32}
    masters = run.learner.precision.named_masters()
    assert masters.keys() == model.keys()
    assert any(not torch.equal(masters[name], model[name].float()) for name in model)  # more than the halves hold
    assert all(torch.equal(masters[name].half(), model[name]) for name in model)
    assert all(p.dtype == torch.float16 for p in run.learner.model.module.parameters())  # put back after saving
    assert run.learner.precision.scale_state()["amp"] == {"loss_scaler0": {"loss_scale": 2.0**16, "unskipped": 8}}


def test_a_checkpoint_of_one_backend_is_refused_by_the_other(amp, tmp_path):
    args = apex_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    fit(args)
    with pytest.raises(CheckpointError, match="--amp_backend"):
        fit(changed(args, amp_backend="native", resume_from_checkpoint="auto"))


# ---- the whole recipe ----


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_evaluation_alone_and_after_training(amp, tmp_path, level):
    args = apex_arguments(tmp_path, fp16_opt_level=level, do_eval=True, optim="adamw_apex_fused_npu")
    assert pipeline.run(args) == 0
    results = results_of(args)
    assert results["precision"] == f"{level} fp16, loss scale 1024, apex"
    assert results["optimizer"] == "adamw_apex_fused_npu"
    amp.undo()
    alone = changed(args, do_train=False, model_name_or_path=args.output_dir, output_dir=str(tmp_path / "alone"))
    assert pipeline.run(alone) == 0
    assert results_of(alone)["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-3)


START = """
import sys
from bert_glue.devices import cpu
from bert_glue.training import throughput
cpu.features = lambda: frozenset({"avx512_fp16"})
throughput.gemm_rate = lambda *_: 1.0
import run_glue
sys.exit(run_glue.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("passes", [1, 2])
def test_two_ranks_are_one_with_the_same_global_batch(amp, tmp_path, level, passes):
    """29 rows: in the last pass of an epoch one rank has no row at all (batches of 2 x 2 leave 1)."""
    batch = 2 if passes == 2 else 4
    args = apex_arguments(
        tmp_path, fp16_opt_level=level, per_device_train_batch_size=batch, gradient_accumulation_steps=passes
    )
    (tmp_path / "start.py").write_text(START)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
         f"--master_port={free_port()}", str(tmp_path / "start.py"), *flags_of(args)],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{CONTRACT}:{REPOSITORY}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone = fit(changed(args, per_device_train_batch_size=2 * batch, output_dir=str(tmp_path / "alone")))
    history = results_of(args, "trainer_state.json")["log_history"]
    assert [entry["loss"] for entry in history] == pytest.approx(losses(alone), rel=2e-3)
    norms = [entry["grad_norm"] for entry in alone.progress.history]
    assert [entry["grad_norm"] for entry in history] == pytest.approx(norms, rel=2e-2)


# ---- apex's FusedAdam without amp ----


def test_fused_adam_alone_trains_as_torchs_adamw(amp, tmp_path):
    flags = {"max_steps": 8, "weight_decay": 0.1, "adam_epsilon": 1e-4, "max_grad_norm": 0.3}
    theirs = fit(arguments(tmp_path, optim="adamw_apex_fused", strict_optim=True, **flags))
    assert theirs.learner.optimizer_name == "adamw_apex_fused" and not amp.CALLS
    assert losses(theirs) == pytest.approx(losses(fit(arguments(tmp_path, optim="adamw_torch", **flags))), rel=1e-5)


@pytest.mark.parametrize("precision", [{}, {"bf16": True, "fp16_opt_level": "O2"}])
def test_fused_adam_resumes_with_its_step(amp, tmp_path, precision):
    """It counts steps in its groups, where state_dict()["state"] does not have them."""
    check_resume(tmp_path, {"optim": "adamw_apex_fused", **precision})


def test_a_fused_adam_without_kernels_is_replaced(amp, tmp_path, monkeypatch):
    import apex.optimizers

    def refuse(*args, **kwargs):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(apex.optimizers, "FusedAdam", refuse)
    run = fit(arguments(tmp_path, optim="adamw_apex_fused", max_steps=1))
    assert run.learner.optimizer_name.startswith(
        "adamw_torch_fused instead of adamw_apex_fused: FusedAdam does not run here"
    )


def test_load_amp_gives_the_module(amp):
    assert load_amp(needs_combine_grad=True) is amp
