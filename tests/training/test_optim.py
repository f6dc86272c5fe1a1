"""Optimizers on flat buffers equal the ones everybody knows, parameter by parameter."""

from __future__ import annotations

import copy
import math

import pytest
import tiny_run
import torch
from torch import nn

from bert_glue.config.arguments import Arguments
from bert_glue.errors import MachineError
from bert_glue.precision.flat_buffers import flatten
from bert_glue.precision.native import NativePrecision
from bert_glue.precision.plan import PrecisionPlan
from bert_glue.training.optim import build_optimizer, is_elementwise, schedule

STEPS = 12
DECAY = 0.1


class Net(nn.Module):
    """Names as in BERT."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.dense = nn.Linear(6, 8)
        self.LayerNorm = nn.LayerNorm(8)
        self.output = nn.Linear(8, 2)

    def forward(self, x):
        return self.output(torch.tanh(self.LayerNorm(self.dense(x))))


def batches():
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        # Inputs of 10 to make gradients large enough that clipping acts.
        yield 10 * torch.randn(4, 6, generator=generator), torch.randint(0, 2, (4,), generator=generator)


def ours(optim: str, max_norm: float) -> dict[str, torch.Tensor]:
    module = Net()
    precision = NativePrecision(PrecisionPlan("O0", torch.float32, 1.0), module)
    args = Arguments(optim=optim, learning_rate=0.01, weight_decay=DECAY)
    optimizer, _ = build_optimizer(args, precision.optimizer_groups(not is_elementwise(optim)))
    for x, y in batches():
        precision.zero_gradients()
        nn.functional.cross_entropy(module(x), y).backward()
        assert precision.step(optimizer, precision.gather_gradients(), max_norm)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def theirs(make, max_norm: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    module = Net()
    groups = [
        {"params": [module.dense.weight, module.output.weight], "weight_decay": DECAY},
        {
            "params": [module.dense.bias, module.LayerNorm.weight, module.LayerNorm.bias, module.output.bias],
            "weight_decay": 0.0,
        },
    ]
    optimizer, norms = make(groups), []
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        if max_norm:
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), max_norm).item())
        optimizer.step()
    return {name: p.detach().clone() for name, p in module.named_parameters()}, norms


def assert_same(ours: dict, theirs: dict, tolerance: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adamw_apex_fused_npu"])
def test_adamw_is_torchs(optim, max_norm):
    expected, norms = theirs(lambda groups: torch.optim.AdamW(groups, lr=0.01), max_norm)
    assert not norms or min(norms) < 0.5 < max(norms)  # some steps are clipped and some are not
    assert_same(ours(optim, max_norm), expected)


class NaiveLamb:
    """Algorithm 2 of the paper, one parameter and one line at a time."""

    def __init__(self, groups):
        self.members = [(p, g["weight_decay"]) for g in groups for p in g["params"]]
        self.m = [torch.zeros_like(p) for p, _ in self.members]
        self.v = [torch.zeros_like(p) for p, _ in self.members]
        self.t = 0

    def zero_grad(self):
        for p, _ in self.members:
            p.grad = None

    @torch.no_grad()
    def step(self):
        self.t += 1
        for at, (p, decay) in enumerate(self.members):
            self.m[at] = 0.9 * self.m[at] + 0.1 * p.grad
            self.v[at] = 0.999 * self.v[at] + 0.001 * p.grad**2
            mean, square = self.m[at] / (1 - 0.9**self.t), self.v[at] / (1 - 0.999**self.t)
            update = mean / (square.sqrt() + 1e-8) + decay * p
            length, step = math.sqrt((p**2).sum()), math.sqrt((update**2).sum())
            p -= 0.01 * (length / step if length > 0 and step > 0 else 1.0) * update


def test_lamb_is_the_papers():
    expected, _ = theirs(NaiveLamb, 0.5)
    assert_same(ours("lamb", 0.5), expected, 2e-6)


def test_adafactor_is_transformers():
    from transformers.optimization import Adafactor

    expected, _ = theirs(
        lambda groups: Adafactor(groups, lr=0.01, scale_parameter=False, relative_step=False), max_norm=0.5
    )
    assert_same(ours("adafactor", 0.5), expected, 2e-6)


def decayed_by_transformers(module: nn.Module) -> set[str]:
    from transformers.trainer_pt_utils import get_parameter_names

    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # Trainer's own
    return set(get_parameter_names(module, [nn.LayerNorm], patterns))


def decayed_by_us(module: nn.Module) -> set[str]:
    return {name for group in flatten(copy.deepcopy(module))[0] if group.is_decayed for name in group.names}


@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_decay_groups_are_transformers(tmp_path, padding):
    from bert_glue.model.loading import load_model
    from bert_glue.tasks import get_task

    module = load_model(tiny_run.arguments(tmp_path, padding=padding), get_task("mrpc")).module
    decayed = decayed_by_us(module)
    assert decayed == decayed_by_transformers(module)
    assert 0 < len(decayed) < len(list(module.parameters()))


@pytest.mark.parametrize("kind", ["DistilBert", "Albert", "Electra"])
def test_decay_groups_of_other_families(kind):
    import transformers

    sizes = {
        "vocab_size": 10, "hidden_size": 8, "dim": 8, "n_layers": 1, "num_hidden_layers": 1, "n_heads": 2,
        "num_attention_heads": 2, "hidden_dim": 8, "intermediate_size": 8, "embedding_size": 4,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind.lower())
    for name in sizes.keys() & set(vars(config)):
        setattr(config, name, sizes[name])
    module = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    assert decayed_by_us(module) == decayed_by_transformers(module)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 7.0])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_transformers(name, warmup):
    from transformers.optimization import get_scheduler

    total = 31
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup_steps = math.ceil(total * warmup) if warmup < 1 else int(warmup)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total)
    expected = []
    for _ in range(total + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    factor = schedule(name, total, warmup)
    assert [factor(step) for step in range(total + 1)] == pytest.approx(expected, abs=1e-12)


def test_one_step_of_warmup_alone():
    assert [schedule("linear", 1, 0.0)(step) for step in (0, 1)] == [1.0, 0.0]
    assert schedule("cosine", 4, 4.0)(4) == pytest.approx(1.0)


# ---- which optimizer runs ----

# Name -> what a CPU without apex and torch_npu has instead, and a word of the reason; None: it is here.
ON_A_BARE_CPU = {
    "adamw_torch": None,
    "adamw_torch_fused": None,
    "adamw_apex_fused_npu": ("adamw_torch_fused", "only with --amp_backend apex"),
    "adamw_torch_npu_fused": ("adamw_torch_fused", "not on cpu"),
    "adamw_apex_fused": ("adamw_torch_fused", "No module named 'apex'"),
    "adamw_hf": ("adamw_torch", "transformers has removed it"),
    "adafactor": None,
    "lamb": None,
}


def built(optim: str, **changes):
    precision = NativePrecision(PrecisionPlan("O0", torch.float32, 1.0), Net())
    args = Arguments(optim=optim, learning_rate=0.01, weight_decay=DECAY, **changes)
    return build_optimizer(args, precision.optimizer_groups(not is_elementwise(optim)))


def test_every_name_is_in_the_table():
    from bert_glue.config.arguments import FLAGS

    assert set(ON_A_BARE_CPU) == set(FLAGS["optim"].choices)


@pytest.mark.parametrize("name", ON_A_BARE_CPU)
def test_an_absent_optimizer_is_replaced_by_the_nearest_and_named(name):
    optimizer, used = built(name)
    if ON_A_BARE_CPU[name] is None:
        assert used == name
        return
    nearest, reason = ON_A_BARE_CPU[name]
    assert used.startswith(f"{nearest} instead of {name}: ") and reason in used
    assert type(optimizer) is torch.optim.AdamW and bool(optimizer.defaults["fused"]) == (nearest != "adamw_torch")


@pytest.mark.parametrize("name", ON_A_BARE_CPU)
def test_strict_optim_refuses_what_is_not_here(name):
    if ON_A_BARE_CPU[name] is None:
        assert built(name, strict_optim=True)[1] == name
        return
    with pytest.raises(MachineError) as caught:
        built(name, strict_optim=True)
    assert caught.value.exit_code == 4
    assert str(caught.value).startswith(f"--optim {name} --strict_optim: ")
    assert ON_A_BARE_CPU[name][1] in str(caught.value)


def test_a_device_without_fused_adamw(monkeypatch):
    real = torch.optim.AdamW

    def without_fused(params, fused=False, **options):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return real(params, **options)

    monkeypatch.setattr(torch.optim, "AdamW", without_fused)
    optimizer, used = built("adamw_torch_fused")
    assert used == "adamw_torch instead of adamw_torch_fused: torch has no fused AdamW for cpu"
    assert optimizer.defaults["foreach"]
    assert built("adamw_apex_fused")[1].startswith("adamw_torch instead of adamw_apex_fused: ")
    with pytest.raises(MachineError, match="--optim adamw_torch_fused --strict_optim: torch has no fused AdamW"):
        built("adamw_torch_fused", strict_optim=True)


def test_log_and_results_name_the_optimizer_that_ran(tmp_path, monkeypatch):
    from bert_glue.pipeline import run as pipeline

    lines = []
    monkeypatch.setattr(pipeline.ConsoleLog, "line", lambda self, text: lines.append(text))
    args = tiny_run.arguments(tmp_path, optim="adamw_hf", max_steps=2)
    assert pipeline.run(args) == 0
    said = "adamw_torch instead of adamw_hf: transformers has removed it"
    assert f"optimizer: {said}" in lines
    assert tiny_run.results_of(args)["optimizer"] == said
    assert said in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "lamb", "adafactor"])
def test_scale_and_clip_reach_every_optimizer(name, level, max_norm):
    """A scale of 2**20 around small gradients: the same masters as with no scale at all, to fp32 rounding."""
    results = []
    for scale in (1.0, 2.0**20):
        precision = NativePrecision(
            PrecisionPlan(level, torch.bfloat16 if level != "O0" else torch.float32, scale), Net()
        )
        args = Arguments(optim=name, learning_rate=0.01, weight_decay=DECAY)
        optimizer, _ = build_optimizer(args, precision.optimizer_groups(not is_elementwise(name)))
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for group in precision.groups:
                group.grad.copy_(torch.randn(group.grad.shape, generator=generator)).mul_(scale)
            assert precision.step(optimizer, precision.gather_gradients(), max_norm)
        results.append(precision.masters)
    for plain, scaled in zip(*results, strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=0)
    assert {m.dtype for m in results[0]} == {torch.float32}
