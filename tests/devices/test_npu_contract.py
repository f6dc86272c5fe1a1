"""Our calls of torch_npu against the real package's sources and operators; the real fused optimizer run from them.

The wheel is downloaded by pip into pytest's cache, parsed and never imported; without a network these tests
are skipped.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from fused_checks import check_fused_semantics, fused_semantics
from npu_calls import Sources, Use
from npu_wheel import PIN, REPOSITORY, Wheel, fetch_wheel

from bert_glue.devices.npu_versions import PAIRS


@pytest.fixture(scope="module")
def wheel(pytestconfig) -> Wheel:
    return Wheel(fetch_wheel(Path(pytestconfig.cache.mkdir("torch_npu_wheel"))))


def problem(use: Use, wheel: Wheel) -> str | None:
    """What is wrong with a use, in one line."""
    found = wheel.find(use.name)
    if found is None:
        return f"{use.where}: torch_npu {PIN} has no {use.name}"
    if use.call is None or found.signature is None:
        return None
    positional = [argument for argument in use.call.args if not isinstance(argument, ast.Starred)]
    keywords = {keyword.arg: None for keyword in use.call.keywords if keyword.arg}
    is_open = len(positional) < len(use.call.args) or len(keywords) < len(use.call.keywords)
    bind = found.signature.bind_partial if is_open else found.signature.bind
    try:
        bind(*positional, **keywords)
    except TypeError as error:
        return f"{use.where}: {use.name}{found.signature} called as {ast.unparse(use.call)}: {error}"
    return None


def test_every_call_of_torch_npu_is_one_it_has(wheel: Wheel) -> None:
    uses = list(Sources.of_folder(REPOSITORY / "bert_glue").uses())
    assert [text for use in uses if (text := problem(use, wheel))] == []
    # The search itself: some of what it must see, each found another way.
    expected = {
        "torch_npu.npu_fusion_attention", "torch_npu.npu_get_float_status", "torch_npu.npu.set_compile_mode",
        "torch_npu.npu.set_device", "torch_npu.npu.get_rng_state", "torch_npu.npu.utils.is_support_inf_nan",
        "torch_npu.optim.NpuFusedAdamW", "torch_npu.profiler.profile",
    }  # fmt: skip
    assert expected <= {use.name for use in uses}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import torch_npu\ntorch_npu.npu_fusion_attentoin(q)", "has no torch_npu.npu_fusion_attentoin"),
        ("import torch_npu\ntorch_npu.npu_fusion_attention(q, k, v, 1, 'TND', actual_seq_len=x)", "actual_seq_len"),
        ("import torch_npu as n\nn.npu_fusion_attention(q, k, v)", "missing a required argument: 'head_num'"),
        ("import torch\ntorch.npu.set_compile_mode(jit=False)", "unexpected keyword argument 'jit'"),
        ("import torch\nm = torch.npu\nm.set_device(0, 1)", "too many positional arguments"),
        ("from torch_npu.optim import NpuFusedAdamX", "has no torch_npu.optim.NpuFusedAdamX"),
        ("from torch_npu.optim import NpuFusedAdamW\nNpuFusedAdamW(p, fused=True)", "unexpected keyword"),
        ("import torch_npu\nhasattr(torch_npu, 'npu_fusion')", "has no torch_npu.npu_fusion"),
        ("import torch\ndef f(kind):\n    return getattr(torch, kind)\nf('npu').get_device_nam()", "get_device_nam"),
        (
            "import torch_npu\nclass A:\n    def g(self):\n        self.n = torch_npu\n        self.n.nothing()",
            "nothing",
        ),
    ],
)
def test_drift_is_seen(wheel: Wheel, code: str, says: str) -> None:
    found = [problem(use, wheel) for use in Sources({"code.py": code}).uses()]
    assert says in " ".join(filter(None, found))


def test_a_right_call_is_no_drift(wheel: Wheel) -> None:
    code = """
import torch, torch_npu
from torch_npu.optim import NpuFusedAdamW
torch_npu.npu_fusion_attention(q, k, v, 1, "TND", scale=1.0, actual_seq_qlen=a, actual_seq_kvlen=a)
torch.npu.set_compile_mode(jit_compile=False)
torch.npu.get_rng_state()
NpuFusedAdamW(params, **options)
getattr(torch_npu, "is_simulated", False)
"""
    uses = list(Sources({"code.py": code}).uses())
    assert len(uses) == 5 and [problem(use, wheel) for use in uses] == [None] * 5


def simulated() -> dict[str, inspect.Signature | None]:
    """Public functions of the simulated package by the name they have in torch_npu."""
    from npu_wheel import _of_arguments

    root, found = REPOSITORY / "tests/support/simulated_npu/torch_npu", {}
    modules = {"npu/__init__.py": "torch_npu.npu", "npu/utils.py": "torch_npu.npu.utils", "operators.py": "torch_npu"}
    for file, module in modules.items():
        for node in ast.parse((root / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found[f"{module}.{node.name}"] = _of_arguments(node.args)
    return found


def test_the_simulated_package_has_the_real_signatures(wheel: Wheel) -> None:
    """Else a call could be right on the simulated device and wrong on a real one."""
    ours = {"torch_npu.npu.own_generator"}
    for name, signature in simulated().items():
        if name in ours:
            continue
        real = wheel.find(name)
        assert real is not None, name
        if real.signature is not None:
            real_names = ["self" if p == "input" else p for p in real.signature.parameters]
            assert list(signature.parameters) == real_names, name


def test_the_pins_are_a_pair(wheel: Wheel) -> None:
    needs = re.search(r"^Requires-Dist: torch==([\d.]+)\.\*$", wheel.metadata, re.MULTILINE)[1]
    pinned = re.search(r"^torch==([\d.]+)$", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert pinned == needs == PIN


def test_the_pairing_table_is_the_wheels(wheel: Wheel) -> None:
    """Its README's newest CANN; rows of later releases are from COMPATIBILITY.md, which is in no wheel."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in wheel.metadata.splitlines()]
    begin = next(at for at, row in enumerate(rows) if row[0] == "CANN 8.5.0")
    ours = next(versions for versions, cann in PAIRS if cann == "8.5.0")
    theirs = {row[2] for row in rows[begin : begin + 7]}
    assert set(ours.split(", ")) <= theirs


def test_the_real_fused_optimizer_steps_on_our_gradients(wheel: Wheel) -> None:
    """Its own Python, out of the wheel, on the simulated device."""
    report = fused_semantics(SIMULATED_NPU_WHEEL=str(wheel.path))
    assert report["class"] == "torch_npu.optim.npu_fused_adamw.NpuFusedAdamW" and str(wheel.path) in report["source"]
    check_fused_semantics(report)
