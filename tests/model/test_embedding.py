"""Gradients of embeddings as products: the same sums as torch's, whatever way the sizes choose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bert_glue.model import embedding
from bert_glue.model.embedding import Embedding, row_sums
from bert_glue.precision.flat_buffers import flatten


def expected(grad, ids, rows):
    table = torch.zeros(rows, grad.shape[1], dtype=grad.dtype, requires_grad=True)
    F.embedding(ids, table).backward(grad)
    return table.grad


@pytest.mark.parametrize(("rows", "tokens"), [(2, 50), (40, 300), (40, 1), (3000, 60), (3000, 700)])
@pytest.mark.parametrize("limits", [(1024, 4096), (0, 4096), (0, 0)], ids=["one-hot", "by word", "sorted"])
def test_the_sums_are_torchs(monkeypatch, rows, tokens, limits):
    monkeypatch.setattr(embedding, "_SMALL_TABLE", limits[0])
    monkeypatch.setattr(embedding, "_MOST_TOKENS", limits[1])
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (tokens,), generator=draw)
    ids[: tokens // 3] = ids[0]  # a frequent word
    grad = torch.randn(tokens, 8, dtype=torch.float64, generator=draw)
    torch.testing.assert_close(row_sums(grad, ids, rows), expected(grad, ids, rows))


def test_many_bf16_gradients_of_a_word_are_rounded_once():
    """In bf16 a running sum of ones would end at 256."""
    grad = torch.ones(1000, 4, dtype=torch.bfloat16)
    for rows in (3, 2000):
        assert torch.equal(row_sums(grad, torch.full((1000,), 2), rows)[2], torch.full((4,), 1000.0).bfloat16())


def test_the_layer_is_torchs_embedding_with_that_gradient(monkeypatch):
    ids, asked = torch.tensor([3, 1, 3, 0]), []
    plain = torch.nn.Embedding(5, 4)
    ours = Embedding.from_pretrained(plain.weight.detach().clone(), freeze=False)
    monkeypatch.setattr(embedding, "has_slow_scatter", lambda kind: asked.append(kind) or True)
    out = ours(ids)
    assert torch.equal(out, plain(ids)) and type(out.grad_fn).__name__ == "_RowsBackward" and asked == ["cpu"]
    weights = torch.arange(16.0).view(4, 4)
    for layer in (ours, plain):
        (layer(ids) * weights).sum().backward()
    assert torch.equal(ours.weight.grad, plain.weight.grad)
    with torch.no_grad():
        assert torch.equal(ours(ids), plain(ids))


def test_other_devices_keep_torchs_gradient():
    assert type(Embedding(5, 4)(torch.tensor([1])).grad_fn).__name__ == "EmbeddingBackward0"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 900])
def test_rows_are_added_to_a_flat_gradient(dtype, tokens):
    """Over two passes, with a frequent word, as torch adds its own gradients; and every time the same bits."""
    draw, found = torch.Generator().manual_seed(0), []
    weight = torch.randn(50, 8, generator=draw).to(dtype)
    passes = [(torch.randint(50, (tokens,), generator=draw), torch.randn(tokens, 8, generator=draw).to(dtype))] * 2
    passes[0][0][: tokens // 3] = 7
    exact = sum(expected(grad.double(), ids, 50) for ids, grad in passes)
    for _ in range(2):
        table = Embedding.from_pretrained(weight.clone(), freeze=False)
        flatten(table)
        place = table.weight.grad.data_ptr()
        for ids, grad in passes:
            table(ids).backward(grad)
        assert table.weight.grad.data_ptr() == place
        found.append(table.weight.grad.clone())
    assert torch.equal(*found)
    loose = {"rtol": 0.05, "atol": 2.0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(found[0].double(), exact, **loose)


def test_a_frozen_table_gets_no_gradient():
    table = Embedding.from_pretrained(torch.ones(4, 2), freeze=True)
    assert not table(torch.tensor([1, 1])).requires_grad
