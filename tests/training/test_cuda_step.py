"""A whole step of BERT-base on CUDA tensors without memory: operators, waits of the host, and copies.

Nothing is computed, so this says nothing about numbers or time. It says what would be launched on a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).parents[1] / "support"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> str:
    """The device that a build without CUDA lacks, compiled; "" where torch has CUDA."""
    if torch.version.cuda is not None:
        return ""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("torch has no CUDA here, and there is no g++ to make up for it")
    torch_folder = Path(torch.__file__).parent
    target, places = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so", torch_folder / "lib"
    words = [
        compiler, "-std=c++20", "-shared", "-fPIC", str(SUPPORT / "fake_cuda.cpp"), "-o", str(target),
        f"-I{torch_folder / 'include'}", f"-L{places}", f"-Wl,-rpath,{places}", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this torch's headers differ: {done.stderr.strip().splitlines()[0][:200]}")
    return str(target)


@pytest.fixture(scope="session")
def step(library):
    """`step(level, passes=1, optimizer)` is what one step did; see fake_cuda_step.py."""
    found: dict[tuple, dict] = {}

    def run(*words: str) -> dict:
        if words not in found:
            done = started(library, *words)
            assert done.returncode == 0, done.stderr[-3000:]
            found[words] = json.loads(done.stdout)
        return found[words]

    return run


def started(library: str, *words: str) -> subprocess.CompletedProcess:
    path = f"{REPOSITORY}{os.pathsep}{SUPPORT}"
    return subprocess.run(
        [sys.executable, str(SUPPORT / "fake_cuda_step.py"), library, *words],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


# What torch 2.13 launches: operators of a pass, and of norm, clip and update; docs/cuda.md has them too.
OPERATORS = {"O0": (569, 30), "O1": (906, 30), "O2": (571, 34)}
every_level = pytest.mark.parametrize("level", OPERATORS)


@every_level
def test_the_host_waits_for_nothing(step, level):
    assert all(phase["waits"] == [] for phase in step(level).values())


def test_a_wait_would_be_found(library):
    """This optimizer reads on the host whether a gradient was not finite."""
    done = started(library, "O2", "1", "adamw_torch")
    assert done.returncode and "_local_scalar_dense" in done.stderr


@every_level
def test_a_batch_is_one_copy_and_nothing_else_crosses(step, level):
    copies = {name: phase["copies"] for name, phase in step(level).items()}
    assert copies == {"collate": {"asynchronous": 1}, "pass": {}, "update": {}}


@every_level
def test_operators_are_no_more_than_measured(step, level):
    """Each is a launch or more; eager steps of small batches take as long as the host needs for them."""
    found = step(level)
    assert found["collate"]["operators"] == 0
    for name, bound in zip(("pass", "update"), OPERATORS[level], strict=True):
        assert found[name]["operators"] <= bound, found[name]["most"]


def test_a_pass_of_several_adds_its_gradients_and_waits_for_nothing(step):
    """16-bit gradients are added to the fp32 sums: two groups, an addition and a zero each."""
    several = step("O2", "2")
    assert several["pass"]["operators"] <= OPERATORS["O2"][0] + 4 and several["pass"]["waits"] == []


@pytest.mark.parametrize(
    ("level", "kernel"), [("O0", "_efficient_attention"), ("O1", "_flash_attention"), ("O2", "_flash_attention")]
)
def test_every_layer_calls_the_kernel_once(step, level, kernel):
    counts = step(level)["pass"]["most"]
    assert counts[f"{kernel}_forward"] == counts[f"{kernel}_backward"] == 12
    assert not [name for name in counts if name.startswith(("index_put", "constant_pad", "embedding_dense"))]
    # Slices that need a gradient: weight and bias of the last layer's query and keys at O1, and the head's rows.
    assert counts.get("slice_backward", 0) <= 5 and "select_backward" not in counts


def test_the_page_says_what_a_step_launches():
    page = (REPOSITORY / "docs" / "cuda.md").read_text(encoding="utf-8")
    for level, (of_pass, of_update) in OPERATORS.items():
        dtype = "fp32" if level == "O0" else "bf16"
        assert f"| {level} {dtype} | {of_pass} | {of_update} | 0 | 1 |" in page
