"""--torch_compile: the numbers of an eager run, few graphs, separate timing, and its errors."""

from __future__ import annotations

import pytest
import torch
from forked_ranks import on_ranks
from resume_checks import check_resume
from tiny_models import packed_like, random_batch, stock_model
from tiny_run import arguments, changed, fit, flags_of, losses, results_of

from bert_glue.config.parser import parse
from bert_glue.devices.device import Device
from bert_glue.devices.rng import random_tensors
from bert_glue.errors import MachineError, UsageError
from bert_glue.model.layers import DropoutMasks
from bert_glue.pipeline import run as pipeline
from bert_glue.results.perf import perf_of
from bert_glue.training import compile, resume
from bert_glue.training.compile import compile_model

# Captures and differentiates as inductor does and runs the graph's operators one by one: no C++ compiler at work.
FAST = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
BASE = ["--model_name_or_path", "m", "--task_name", "mrpc", "--output_dir", "o", "--do_train"]


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch.compiler.reset()
    compile.counters.clear()
    yield
    torch.compiler.reset()


# ---- flags ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (False, None, None)),
        ("--torch_compile", (True, "inductor", None)),
        ("--torch_compile_backend aot_eager", (True, "aot_eager", None)),
        ("--torch_compile_mode max-autotune", (True, "inductor", "max-autotune")),
    ],
)
def test_flags_mean_what_they_do_in_training_arguments(words, expected):
    args = parse([*BASE, *words.split()])
    assert (args.torch_compile, args.torch_compile_backend, args.torch_compile_mode) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--torch_compile_mode default --torch_compile_backend eager", "belongs to inductor, not to eager"),
        ("--torch_compile --fp16 --amp_backend apex", "--torch_compile works only with --amp_backend native"),
        ("--torch_compile_mode fast", "--torch_compile_mode"),
    ],
)
def test_what_does_not_go_together_is_one_line(words, expected):
    with pytest.raises(UsageError) as caught:
        parse([*BASE, *words.split()])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# ---- the same numbers ----


def compiled_layers(module, backend: str):
    """Compile as `compile_model` does, without a run."""
    compile.compile_layers(module, {"backend": backend, "dynamic": True})
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_values_are_those_of_the_eager_module(dtype):
    """The graph runs the same operators, so nothing may differ: not in one mask, for any length."""
    stock = stock_model("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1, num_hidden_layers=3)
    eager, other = (packed_like(stock).to(dtype).train() for _ in range(2))
    compiled_layers(other, "aot_eager")
    for step, lengths in enumerate([(5, 7, 9), (4, 8, 20, 3), (5,)]):
        inputs, _ = random_batch(lengths, tail=6)
        dropout_masks = DropoutMasks(3)
        dropout_masks.begin(step)
        outputs = [module(**inputs, dropout_masks=dropout_masks) for module in (eager, other)]
        assert torch.equal(*outputs)
        gradients = [
            torch.autograd.grad(output.square().sum(), list(module.parameters()), allow_unused=True)
            for output, module in zip(outputs, (eager, other), strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)
        with torch.no_grad():
            # Outside a compiler oneDNN multiplies where there are no gradients.
            torch.testing.assert_close(eager(**inputs), other(**inputs))
    assert compile.graphs_made() == 2  # with gradients and without, for all layers and lengths


@pytest.mark.slow
@pytest.mark.parametrize("trains", [False, True])
def test_inductor_and_filler_change_nothing(tmp_path, monkeypatch, trains):
    """Logits and gradients of a batch with filler, compiled, against the eager one without."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stock, found = stock_model("bert", num_hidden_layers=2), []
    for tail in (0, 9):
        module = packed_like(stock).train(trains).requires_grad_(trains)
        if tail:
            compiled_layers(module, "inductor")
        with torch.set_grad_enabled(trains):
            logits = module(**random_batch((5, 7, 9), tail=tail)[0])
        if trains:
            logits.square().sum().backward()
        found.append((logits, [p.grad for p in module.parameters() if trains]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    for ours, expected in zip(found[1][1], found[0][1], strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ({"gradient_accumulation_steps": 3}, 1),
        ({"bf16": True, "fp16_opt_level": "O2", "gradient_accumulation_steps": 2}, 1),
        pytest.param({"bf16": True, "fp16_opt_level": "O1", "eval_strategy": "epoch"}, 2, marks=pytest.mark.slow),
        pytest.param({"gradient_checkpointing": True, "rdrop_alpha": 0.5}, 1, marks=pytest.mark.slow),
        pytest.param({"fgm_epsilon": 0.3, "per_device_train_batch_size": 4}, 1, marks=pytest.mark.slow),
        ({"freeze_encoder": True}, 1),
        pytest.param({"padding": "longest", "eval_strategy": "epoch"}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_has_the_losses_of_an_eager_run(tmp_path, settings, graphs):
    expected = fit(arguments(tmp_path, **settings))
    ours = fit(arguments(tmp_path, **settings, **FAST))
    is_low = "bf16" in settings  # filler moves the borders of vectorised loops in bf16 products
    assert losses(ours) == pytest.approx(losses(expected), rel=2e-2 if is_low else 1e-5)
    assert compile.graphs_made() == graphs
    scores = [[e["eval_loss"] for e in run.progress.history if "eval_loss" in e] for run in (ours, expected)]
    assert scores[0] == pytest.approx(scores[1], rel=2e-2 if is_low else 1e-4)
    assert ours.observers.meter.real_tokens == expected.observers.meter.real_tokens
    assert ours.observers.meter.computed_tokens > ours.observers.meter.real_tokens


@pytest.mark.slow
def test_lora_with_dropout(tmp_path):
    pytest.importorskip("peft")
    settings = {"lora_rank": 2, "lora_dropout": 0.3, "lora_target_modules": "all-linear", "max_steps": 4}
    expected, ours = (fit(arguments(tmp_path, **settings, **how)) for how in ({}, FAST))
    assert losses(ours) == pytest.approx(losses(expected), rel=1e-5)  # filler comes last: the same masks before it
    assert compile.graphs_made() <= 3


def test_a_resumed_compiled_run_is_bit_for_bit_the_same(tmp_path):
    check_resume(tmp_path, FAST)


def test_a_checkpoint_from_before_the_flag_is_resumed_and_the_change_said(tmp_path, monkeypatch):
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    with monkeypatch.context() as patch:
        known = [name for name in resume._SETTINGS if "compile" not in name and name != "cuda_graph"]
        patch.setattr(resume, "_SETTINGS", known)
        whole = fit(args)
    at = str(whole.output_dir / "checkpoint-2")
    again = changed(args, resume_from_checkpoint=at, output_dir=str(tmp_path / "again"), **FAST)
    resumed = fit(again)
    assert resumed.progress.changes == ["after step 2: --torch_compile_backend aot_eager (was None)"]
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    (alone,), pair = (on_ranks(world, "compiled_run", tmp_path / str(world)) for world in (1, 2))
    for found in pair:
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert found["weight"] == pytest.approx(alone["weight"], abs=1e-4)


# ---- what it leaves and says ----


def test_the_whole_recipe_tells_graphs_shapes_and_seconds(tmp_path, capsys):
    args = arguments(tmp_path, do_eval=True, do_predict=True, explain=1, **FAST)
    assert pipeline.run(args) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("torch_compile")]
    assert lines[0].startswith("torch_compile: aot_eager made 2 graph(s) in ")
    results = results_of(args)
    assert lines[1].startswith(f"torch_compile: 2 graph(s) ran {results['compiled_token_counts']} token count(s) (")
    assert (results["compiled"], results["compiled_graphs"]) == ("aot_eager", 2)
    assert results["seconds"]["compile"] > 0 and results["train_padding_percent"] > 0
    assert results["compiled_graphs_later"] == 1  # --explain differentiates an evaluation, after all rates
    perf = perf_of(results)
    assert perf["seconds"]["compile"] == results["seconds"]["compile"] and "seconds.compile" not in perf["reasons"]
    assert perf["setup"]["compiled"] == "aot_eager"  # no baseline of an eager run


def test_the_warm_up_moves_no_generator_and_leaves_no_gradient(tmp_path, monkeypatch):
    """A padded model draws its dropout from torch's generator, which a checkpoint holds."""
    warm_up, seen = compile._warm_up, {}

    def draws(*given):
        warm_up(*given)
        torch.rand(3)

    def watched(args, model, evaluator, splits, log):
        device = evaluator.ranks.device
        before = random_tensors(device)
        found = compile_model(args, model, evaluator, splits, log)
        seen["same"] = [torch.equal(before[name], value) for name, value in random_tensors(device).items()]
        seen["gradients"] = [float(g.abs().sum()) for g in evaluator.precision.gradients]
        return found

    monkeypatch.setattr(compile, "_warm_up", draws)
    monkeypatch.setattr(compile, "compile_model", watched)
    fit(arguments(tmp_path, **FAST))
    assert all(seen["same"]) and seen["gradients"] and not any(seen["gradients"])


# ---- where it cannot be ----


def main(args, capsys) -> tuple[int, list[str]]:
    import run_glue

    return run_glue.main(flags_of(args)), capsys.readouterr().err.splitlines()


def test_no_compiler_is_one_line_and_exit_code_4(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, lines = main(arguments(tmp_path, torch_compile=True), capsys)
    assert code == 4 and len(lines) == 1
    assert lines[0].startswith(
        "error: --torch_compile: inductor needs a C++ compiler, and there is no no-such-compiler"
    )


def test_an_unknown_backend_is_named_with_the_choices(tmp_path, capsys):
    code, lines = main(arguments(tmp_path, torch_compile_backend="inductr"), capsys)
    assert code == 2 and len(lines) == 1
    assert "Did you mean inductor?" in lines[0] and "aot_eager" in lines[0]


def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch):
    def fails(*given):
        raise RuntimeError("C++ compile error\nline two")

    monkeypatch.setattr(compile, "_warm_up", fails)
    with pytest.raises(MachineError) as caught:
        fit(arguments(tmp_path, **FAST))
    assert str(caught.value) == (
        "--torch_compile: aot_eager cannot compile this model here (RuntimeError: C++ compile error)"
    )


def test_a_device_without_a_tried_compiler_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Device, "can_compile", False)
    with pytest.raises(MachineError, match="--torch_compile: not on this kind of device"):
        fit(arguments(tmp_path, **FAST))


def test_hooks_into_a_padded_model_are_refused(tmp_path):
    with pytest.raises(UsageError, match="packed models only"):
        fit(arguments(tmp_path, fgm_epsilon=0.1, padding="longest", **FAST))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_that_record_are_refused_on_cuda(monkeypatch, mode):
    monkeypatch.setattr(Device, "can_record", True)
    with pytest.raises(MachineError, match=f"--torch_compile_mode {mode} records graphs of its own.*with --cuda_graph"):
        compile._check("inductor", mode, Device("cpu"))
    monkeypatch.undo()
    compile._check("eager", mode, Device("cpu"))
