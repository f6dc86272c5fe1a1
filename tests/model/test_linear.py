"""Products: which is taken, and that oneDNN's, forward and backward, computes what torch's does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packed_reference import LENGTH_SETS, _compare
from resume_checks import check_resume
from tiny_models import packed_like, random_batch, stock_model

from bert_glue.devices import cpu
from bert_glue.model import layers
from bert_glue.model.layers import DropoutMasks, Linear
from bert_glue.precision.flat_buffers import flatten
from bert_glue.training import compile


@pytest.fixture(autouse=True)
def _onednn_processor(monkeypatch):
    # The rules of a processor on which oneDNN is the faster library, also where the tests run on Intel's.
    monkeypatch.setattr(cpu, "product_library", lambda: "oneDNN")


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN multiplies whatever the size; the shapes it was given, `(rows, in, out)`."""
    calls, taken = [], layers._onednn
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")

    def record(x, weight, bias):
        calls.append((*x.shape, len(weight)))
        return taken(x, weight, bias)

    monkeypatch.setattr(layers, "_onednn", record)
    monkeypatch.setattr(layers, "_LEAST_FOR_ONEDNN", 0)
    return calls


def _layers(into_grad: bool) -> tuple[Linear, torch.Tensor]:
    torch.manual_seed(0)
    layer = Linear(5, 7)
    if into_grad:
        flatten(layer)
    return layer, torch.randn(3, 5, requires_grad=True)


@pytest.mark.parametrize("into_grad", [False, True])
@pytest.mark.parametrize("which", [slice(None), slice(2, 6)], ids=["all", "some"])
def test_values_and_gradients_are_those_of_torch(products, which, into_grad):
    layer, x = _layers(into_grad)
    reference = [tensor.detach().clone().requires_grad_() for tensor in (x, layer.weight, layer.bias)]
    for _ in range(2):  # gradients add up
        for y in (layer.rows(x, which, None, 0), F.linear(reference[0], reference[1][which], reference[2][which])):
            y.square().sum().backward()
    torch.testing.assert_close(layer.rows(x, which, None, 0), y)
    for ours, theirs in zip((x, layer.weight, layer.bias), reference, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    outputs = len(layer.weight[which])
    assert products[:3] == ([(3, 5, outputs)] + sorted([(3, outputs, 5), (outputs, 3, 5)], reverse=into_grad))


def test_no_gradient_is_computed_that_nobody_wants(products):
    layer, x = _layers(into_grad=False)
    layer.requires_grad_(False)
    layer(x).sum().backward()
    assert products == [(3, 5, 7), (3, 7, 5)] and x.grad is not None and layer.weight.grad is None


def test_size_chooses(monkeypatch):
    """In both directions by the multiply-adds, which are the same in all three products."""
    calls, taken = [], layers._onednn
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(layers, "_onednn", lambda *given: calls.append(len(given[0])) or taken(*given))
    layer = Linear(512, 512)
    layer(torch.randn(255, 512)).sum().backward()
    assert not calls
    layer(torch.randn(256, 512)).sum().backward()
    assert calls == [256, 512]


@pytest.mark.parametrize("how", ["autocast", "bf16", "fp64"])
def test_fp32_alone_is_multiplied_by_it(products, how):
    dtype = {"autocast": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[how]
    layer, x = Linear(5, 7).to(dtype), torch.randn(3, 5).to(dtype)
    expected = F.linear(x, layer.weight, layer.bias).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        layer(x).float().sum().backward()
        with torch.no_grad():
            ours, part = layer(x), layer.rows(x, slice(2, 6), None, 0)
    torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(part.float(), expected[:, 2:6], rtol=2e-2, atol=2e-2)
    assert not products


def test_a_torch_without_it_multiplies_as_ever(products, monkeypatch):
    monkeypatch.setattr(layers, "has_onednn_linear", lambda *_: False)
    layer, x = _layers(into_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not products


def test_below_avx512_transposes_are_left_to_mkl(products, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    layer, x = _layers(into_grad=True)
    layer(x).sum().backward()
    assert products == [(3, 5, 7)]


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert"])
@pytest.mark.parametrize("is_flat", [False, True])
def test_the_packed_model_equals_the_padded_one(products, model_type, is_flat):
    stock = stock_model(model_type)
    module = packed_like(stock)
    if is_flat:
        flatten(module)
    _compare(stock, module, LENGTH_SETS[0])
    assert products


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"gradient_checkpointing": True}], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_same(products, tmp_path, settings):
    check_resume(tmp_path, settings)
    assert products


def test_a_compiled_graph_calls_it_too(products):
    """One graph for every number of rows, and the product is in it."""
    torch.compiler.reset()
    compile.counters.clear()
    stock = stock_model("bert", num_hidden_layers=2, hidden_dropout_prob=0.1)
    eager, other = (packed_like(stock).train() for _ in range(2))
    compile.compile_layers(other, {"backend": "inductor", "dynamic": True})
    for lengths in [(5, 7, 9), (4, 8, 20, 3)]:
        inputs, dropout_masks = random_batch(lengths)[0], DropoutMasks(3)
        outputs = [eager(**inputs, dropout_masks=dropout_masks)]
        with torch.profiler.profile() as calls:
            outputs.append(other(**inputs, dropout_masks=dropout_masks))
        assert "bert_glue::product" in {call.key for call in calls.key_averages()}
        torch.testing.assert_close(*outputs)
        gradients = [
            torch.autograd.grad(output.square().sum(), list(module.parameters()), allow_unused=True)
            for output, module in zip(outputs, (eager, other), strict=True)
        ]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert compile.graphs_made() == 1
    torch.compiler.reset()
