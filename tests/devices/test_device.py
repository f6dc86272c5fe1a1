"""Which device a request means, and the error if this machine does not have it."""

from __future__ import annotations

import inspect
import sys
import types

import pytest
import torch

from bert_glue.devices import cpu, device, npu_versions
from bert_glue.devices.device import Device, is_available, resolve_device
from bert_glue.errors import MachineError, UsageError


@pytest.fixture
def three_gpus(monkeypatch):
    """A host whose torch sees three CUDA devices and no NPU."""
    fake = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 3)
    monkeypatch.setattr(device, "_module", lambda kind: fake if kind == "cuda" else None)


@pytest.fixture
def host_only(monkeypatch):
    monkeypatch.setattr(device, "_module", lambda kind: None)


@pytest.mark.parametrize(
    ("requested", "local_rank", "expected"),
    [
        ("auto", 0, Device("cuda", 0)),
        ("auto", 2, Device("cuda", 2)),
        ("cuda", 1, Device("cuda", 1)),
        ("cuda:1", 2, Device("cuda", 1)),
        ("2", 0, Device("cuda", 2)),
        ("cpu", 1, Device("cpu", 0)),
    ],
)
def test_resolves(three_gpus, requested, local_rank, expected):
    assert resolve_device(requested, local_rank) == expected


def test_use_cpu_wins(three_gpus):
    assert resolve_device("cuda:1", 0, use_cpu=True) == Device("cpu")


def test_auto_is_the_host_where_there_is_nothing_else(host_only):
    assert resolve_device("auto", 3) == resolve_device("0") == Device("cpu", 0)


@pytest.mark.parametrize(("requested", "nearest"), [("nup", "npu"), ("cudaa:1", "cuda"), ("CPU", None)])
def test_unknown_kind(host_only, requested, nearest):
    with pytest.raises(UsageError, match="unknown device") as caught:
        resolve_device(requested)
    assert (f"Did you mean {nearest}?" in str(caught.value)) == (nearest is not None)
    assert all(kind in str(caught.value) for kind in ("auto", *device.KINDS))


@pytest.mark.parametrize("requested", ["cuda:x", "cuda:-1", "cuda:", "npu:1.5"])
def test_an_index_that_is_no_number(three_gpus, requested):
    with pytest.raises(UsageError, match="not a device number"):
        resolve_device(requested)


@pytest.mark.parametrize(("requested", "fix"), [("npu", "set_env.sh"), ("npu:3", "torch_npu"), ("cuda", "nvidia-smi")])
def test_an_absent_kind_comes_with_its_fix(host_only, requested, fix):
    with pytest.raises(MachineError, match="there is: cpu") as caught:
        resolve_device(requested)
    assert fix in str(caught.value) and f"--device {requested}" in str(caught.value)


@pytest.mark.parametrize(("requested", "local_rank"), [("cuda:3", 0), ("7", 0), ("auto", 5)])
def test_an_absent_index(three_gpus, requested, local_rank):
    with pytest.raises(MachineError, match="there are 3"):
        resolve_device(requested, local_rank)


@pytest.fixture
def broken_torch_npu(monkeypatch, tmp_path):
    """Makes a torch_npu whose import fails with a message, beside installed versions of torch and CANN."""

    def make(
        message: str,
        torch_npu: str = "2.12.0",
        torch_version: str = "2.12.0+cpu",
        needs: tuple[str, ...] = (),
        cann: str | None = None,
        is_sourced: bool = False,
    ) -> None:
        (tmp_path / "torch_npu.py").write_text(f"raise ImportError({message!r})")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        versions = {"torch": torch_version, "torch_npu": torch_npu}
        monkeypatch.setattr(npu_versions.metadata, "version", versions.__getitem__)
        monkeypatch.setattr(npu_versions.metadata, "requires", {"torch": list(needs)}.__getitem__)
        monkeypatch.setattr(npu_versions, "cann_version", lambda: cann)
        monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
        if is_sourced:
            monkeypatch.setenv("ASCEND_HOME_PATH", "/usr/local/Ascend/cann")

    return make


SOURCED = {"cann": "9.1.0", "is_sourced": True}


@pytest.mark.parametrize("message", ["libhccl.so: undefined symbol: x", "Two accelerators", "something new\nand more"])
@pytest.mark.parametrize(
    ("installed", "fix"),
    [
        ({"torch_npu": "2.12.0.post2", "torch_version": "2.13.0+cpu"}, "built for torch 2.12.0, not 2.13.0+cpu"),
        ({"torch_version": "2.6.0", **SOURCED}, "install torch==2.12.0, or the torch_npu of torch 2.6.0"),
        ({"torch_version": "2.12.0+cu126", **SOURCED}, "install the CPU build of torch"),
        ({"torch_version": "2.12.0", "needs": ("nvidia-nccl-cu12==2.2",), **SOURCED}, "install the CPU build of torch"),
        ({}, "install CANN and source its set_env.sh"),
        ({"cann": "9.1.0"}, "the environment of CANN 9.1.0 is not set: source its set_env.sh"),
        ({"cann": "8.5.0", "is_sourced": True}, "was tested with CANN 9.1.0, not 8.5.0"),
        (SOURCED, "the versions match: reinstall torch_npu"),
    ],
)
def test_the_fix_for_a_broken_torch_npu_follows_from_versions_and_not_from_the_message(
    broken_torch_npu, message, installed, fix
):
    broken_torch_npu(message, **installed)
    with pytest.raises(MachineError) as caught:
        is_available("npu")
    first, here, *table = str(caught.value).splitlines()
    assert first.startswith(f"torch_npu cannot be imported: {message.splitlines()[0]}; ") and fix in first
    assert installed.get("torch_npu", "2.12.0") in here
    assert ("ASCEND_HOME_PATH is not set" in here) == ("is_sourced" not in installed)
    assert any("2.12.0: CANN 9.1.0" in line for line in table) and "--device cpu" in table[-1]


def test_a_broken_torch_npu_leaves_other_devices_alone(broken_torch_npu):
    broken_torch_npu("undefined symbol")
    resolve_device("cpu").activate()
    assert sys.modules["torch_npu"] is None  # transformers and accelerate import it where they find it
    del sys.modules["torch_npu"]
    with pytest.raises(MachineError, match="no cuda device here .there is: cpu."):
        resolve_device("cuda")


def test_a_torch_npu_without_a_device_says_what_to_check(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    monkeypatch.setattr(device, "_module", lambda kind: None)
    with pytest.raises(MachineError, match="npu-smi info.*ASCEND_RT_VISIBLE_DEVICES"):
        resolve_device("npu:0")


def test_without_torch_npu_there_is_no_npu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # an import that finds nothing
    assert not is_available("npu") and is_available("cpu")


def test_the_host():
    host = Device("cpu")
    host.activate()
    host.synchronize()
    assert host.torch_device == torch.device("cpu") and host.is_host and "cores" in host.name
    assert host.supports(torch.float32) and host.collective_backend == "gloo"
    before = host.peak_memory()
    block = torch.ones(before // 4)  # four times `before` in bytes would be too much; once is enough
    assert before > 10**7 and host.peak_memory() >= before + block.nbytes // 2
    assert host.random_state() is None


@pytest.mark.parametrize(("flags", "expected"), [({"avx512_fp16"}, True), ({"asimdhp"}, True), ({"avx2"}, False)])
def test_fp16_on_a_host_needs_instructions(monkeypatch, flags, expected):
    monkeypatch.setattr(cpu, "features", lambda: frozenset(flags))
    assert Device("cpu").supports(torch.float16) is expected


# ---- what differs on CUDA ----


def test_emulated_bf16_is_not_native(monkeypatch):
    """torch.cuda counts chips before Ampere, which convert every number: V100 and T4."""
    asked = []

    def is_bf16_supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation

    fake = types.SimpleNamespace(is_bf16_supported=is_bf16_supported)
    monkeypatch.setattr(device, "_module", lambda kind: fake)
    assert not Device("cuda").supports(torch.bfloat16) and asked == [False]
    assert Device("cuda").supports(torch.float16)
    assert "including_emulation" in inspect.signature(torch.cuda.is_bf16_supported).parameters


def test_the_barrier_of_nccl_names_its_device():
    assert Device("cuda", 3).barrier_options("nccl") == {"device_ids": [3]}
    assert Device("cuda", 3).barrier_options("gloo") == Device("npu", 3).barrier_options("hccl") == {}
    assert "device_ids" in inspect.signature(torch.distributed.barrier).parameters


def test_a_generator_goes_on_after_a_recording_that_failed(monkeypatch):
    """With a clone of its state, which draws the same numbers and waits for no recording."""
    calls = []
    generator = types.SimpleNamespace(clone_state=lambda: "clone", graphsafe_set_state=calls.append)
    monkeypatch.setattr(device, "_module", lambda kind: types.SimpleNamespace(default_generators=["other", generator]))
    Device("cuda", 1).renew_generator()
    Device("cpu").renew_generator()
    assert calls == ["clone"]


def test_a_device_says_how_it_multiplies_fp32():
    """--tf32 is said in the run's line: its results differ in the fourth digit."""
    kept, found = torch.get_float32_matmul_precision(), {}
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            found[precision] = (Device("cuda").fp32_products, Device("cpu").fp32_products, Device("npu").fp32_products)
    finally:
        torch.set_float32_matmul_precision(kept)
    assert found == {"highest": ("fp32", None, None), "high": ("TF32", None, None), "medium": ("TF32", "bf16", None)}
