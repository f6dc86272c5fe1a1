import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from bert_glue.devices import cpu
from bert_glue.devices.device import Device, has_onednn_linear
from bert_glue.errors import MachineError

MINILM = nn.Sequential(nn.Embedding(2, 384), nn.Linear(384, 1536), nn.Linear(1536, 384))
TINY = nn.Sequential(nn.Embedding(30000, 64), nn.Linear(64, 128))


@pytest.fixture
def four_threads(monkeypatch):
    """A process that torch gave four threads; their number is put back."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu, "_threads_at_start", lambda: 4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_small_models_take_one_thread_and_others_all():
    assert cpu.use_threads(cpu.largest_product(TINY, 32 * 128), None).startswith("1 (a small model")
    assert torch.get_num_threads() == 1
    assert cpu.use_threads(cpu.largest_product(MINILM, 8 * 128), None) == "4 (all cores)"
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_the_user_decides_before_the_size(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert cpu.use_threads(0, None) == "4 (OMP_NUM_THREADS)"
    assert cpu.use_threads(0, 2) == "2 (--num_cpu_threads_per_process)"
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("vendor", "has_mkl", "expected"),
    [
        ("GenuineIntel", True, "MKL"),
        ("GenuineIntel", False, "oneDNN"),
        ("AuthenticAMD", True, "oneDNN"),
        ("", True, "oneDNN"),
    ],
)
def test_the_library_of_products_follows_from_the_processor(monkeypatch, vendor, has_mkl, expected):
    monkeypatch.setattr(cpu, "_facts", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    cpu.product_library.cache_clear()
    try:
        assert Device("cpu").product_library == expected
        assert has_onednn_linear("cpu") <= (expected == "oneDNN")
    finally:
        cpu.product_library.cache_clear()


def test_the_largest_product_is_no_embedding():
    assert cpu.largest_product(TINY, 10) == 10 * 64 * 128
    assert cpu.largest_product(nn.Embedding(9, 9), 10) == 0


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="no /proc")
def test_features_are_the_kernels_names():
    assert cpu.features() and all(name == name.lower() for name in cpu.features())


def test_few_kernels_are_kept_unless_the_environment_says_how_many(monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "999")
    cpu.limit_kernels()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256" and os.environ["LRU_CACHE_CAPACITY"] == "999"


_FRAGMENTED = """
import torch
from bert_glue.devices import cpu
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
cpu.keep_freed_pages()
blocks = [torch.ones(1 << 18) for _ in range(200)]  # 1 MiB each
kept = blocks[::20]
del blocks
before = resident()
cpu.return_freed_pages()
print(before - resident())
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_free_pages_between_used_ones_go_back_to_the_kernel():
    """Uses 200 MiB and keeps every twentieth block: glibc alone returns no memory below the last of these."""
    found = subprocess.run([sys.executable, "-c", _FRAGMENTED], capture_output=True, text=True, check=True)
    assert int(found.stdout) > 150 << 20


def test_without_glibc_nothing_is_returned(monkeypatch):
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: object())
    cpu.keep_freed_pages()
    cpu.return_freed_pages()


@pytest.fixture
def precision_of_products():
    """How torch multiplies fp32 matrices; it is put back."""
    before = torch.get_float32_matmul_precision()
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_products_with_fewer_digits_where_the_processor_has_them(monkeypatch, precision_of_products):
    monkeypatch.setattr(cpu, "has_bf16_products", lambda: True)
    Device("cpu").activate()
    Device("cpu").activate(tf32=False)
    assert precision_of_products() == "highest"
    Device("cpu").activate(tf32=True)
    assert precision_of_products() == "medium"


def test_products_with_fewer_digits_are_refused_elsewhere(monkeypatch, precision_of_products):
    monkeypatch.setattr(cpu, "has_bf16_products", lambda: False)
    with pytest.raises(MachineError, match="--tf32: this processor has no products with fewer digits"):
        Device("cpu").activate(tf32=True)
    assert precision_of_products() == "highest"
