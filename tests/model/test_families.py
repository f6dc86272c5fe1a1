"""Each packed family and each variant that its description knows: transformers' numbers, and a reason for the rest."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packed_reference import (
    LENGTH_SETS,
    _backward,
    _compare,
    _stock_logits,
    assert_finite_differences,
    with_dropout,
)
from tiny_models import SETTINGS, packed_like, random_batch, stock_model, takes_types

from bert_glue.data.packing import PackedLayout
from bert_glue.model import attention
from bert_glue.model.attention import attend, block_attention, padded_attention
from bert_glue.model.families import FAMILIES, why_not_packed
from bert_glue.model.kernels import relative
from bert_glue.model.kernels.padded import sdpa_blocks
from bert_glue.model.layers import DropoutMasks
from bert_glue.precision.flat_buffers import flatten
from bert_glue.training.cuda_graphs import why_not_recorded

NEW = ("modernbert", "mpnet", "deberta-v2", "ernie", "rembert", "roberta-prelayernorm", "xlm-roberta-xl")
SITE = 8
ROTARY = {kind: {"rope_type": "default", "rope_theta": 50.0} for kind in ("full_attention", "sliding_attention")}
VARIANTS = [
    ("deberta-v2", {"share_att_key": False}),
    ("deberta-v2", {"pos_att_type": ["c2p"]}),
    ("deberta-v2", {"pos_att_type": "p2c", "share_att_key": False}),
    ("deberta-v2", {"position_biased_input": True, "norm_rel_ebd": "none", "type_vocab_size": 2}),
    ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 30}),
    ("deberta-v2", {"position_buckets": 8, "max_relative_positions": 40}),
    ("modernbert", {"classifier_pooling": "mean"}),
    ("modernbert", {"num_hidden_layers": 3}),  # the last layer, of first tokens alone, has a window
    ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}),
    ("modernbert", {"local_attention": 2, "num_hidden_layers": 2, "classifier_pooling": "mean"}),
    ("modernbert", {"layer_types": [*ROTARY, *ROTARY], "rope_parameters": ROTARY, "local_attention": 40}),
    ("ernie", {"use_task_id": False}),
    ("mpnet", {"relative_attention_num_buckets": 40}),
    ("rembert", {"input_embedding_size": 32}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=str)
def test_every_variant_equals_the_padded_run(model_type, changes):
    stock = stock_model(model_type, **changes)
    _compare(stock, packed_like(stock), LENGTH_SETS[0])
    module = packed_like(stock, gradient_checkpointing=True).train()
    flatten(module)
    _compare(stock, module, (20, 17, 16, 18, 40, 5), tail=9)


def test_the_window_and_the_rotation_equal_both_kernels_of_transformers():
    stock = stock_model("modernbert")
    for kernel in ("eager", "sdpa"):
        stock.set_attn_implementation(kernel)
        _compare(stock, packed_like(stock), (70, 8, 9, 10))


@pytest.mark.parametrize("model_type", NEW)
@pytest.mark.parametrize("batch", [1, 7, 32])
def test_six_optimizer_steps_end_at_the_same_weights(model_type, batch):
    stock, pairs = stock_model(model_type), takes_types(model_type)
    module = packed_like(stock)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3) for m in (stock, module)]
    for step in range(6):
        lengths = tuple(1 + (13 * step + 7 * row) % 40 for row in range(batch))
        packed, padded = random_batch(lengths, pairs=pairs and step % 2 == 0, seed=step)
        losses = []
        for optimizer, logits in zip(optimizers, (_stock_logits(stock, padded), module(**packed)), strict=True):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(logits, torch.arange(batch) % 3))
            losses[-1].backward()
            optimizer.step()
        assert abs(losses[0] - losses[1]) <= 1e-5 * max(1.0, losses[0].item())
    packed, padded = random_batch((40, 3), pairs=pairs)
    expected = _stock_logits(stock, padded)
    assert (module(**packed) - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


def test_rows_that_take_the_fused_kernel_equal_the_padded_run():
    stock = stock_model("modernbert", max_position_embeddings=1300)
    _compare(stock, packed_like(stock), (1300, 2))


@pytest.mark.slow
def test_the_longest_row_of_modernbert_trains():
    stock = stock_model("modernbert", max_position_embeddings=8192, num_attention_heads=1, num_hidden_layers=3)
    _compare(stock, packed_like(stock), (8192, 5))


# ---- windows ----


def _naive(query, key, value, layout: PackedLayout, window: int) -> torch.Tensor:
    out = []
    for begin, end in pairwise(layout.cu_seq_lens):
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], key[begin:end]) / query.shape[-1] ** 0.5
        place = torch.arange(end - begin)
        scores = scores.masked_fill((place[:, None] - place).abs() > window, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[begin:end]))
    return torch.cat(out)


@pytest.mark.parametrize("window", [1, 5, 16, 40])
@pytest.mark.parametrize("lengths", [(6,), (200, 33, 1, 64, 90), (40, 5, 5, 5, 80), (300,)], ids=str)
def test_windows_equal_a_naive_loop(window, lengths):
    layout = PackedLayout(lengths, tail=3)
    generator, real = torch.Generator().manual_seed(0), sum(lengths)
    inputs = [
        torch.randn(layout.tokens, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)
    ]
    expected = _naive(*inputs, layout, window)
    weights = torch.randn(real, 3, 4, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad((expected[:real] * weights).sum(), inputs, retain_graph=True)
    for function in (block_attention, padded_attention):
        ours = function(*inputs, layout.within(window), False, 0.0, None, SITE)
        torch.testing.assert_close(ours[:real], expected[:real])
        found = torch.autograd.grad((ours[:real] * weights).sum(), inputs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    firsts = torch.tensor(layout.cu_seq_lens[:-1])
    ours = attend(inputs[0][firsts], *inputs[1:], layout.within(window), True, 0.0, None, SITE)
    torch.testing.assert_close(ours[: len(lengths)], expected[firsts][: len(lengths)])


def test_a_window_takes_memory_that_grows_with_the_length():
    def cells(length: int) -> int:
        return sum(b.shape[0] * b.shape[1] * b.keys.shape[1] for b in PackedLayout((length,)).within(64).blocks)

    assert cells(8192) == 2 * cells(4096) == 4 * cells(2048)
    assert PackedLayout((60, 65)).within(64).window is None and PackedLayout((66,)).within(64).window == 64


# ---- scores by relative position on other devices ----


@pytest.mark.parametrize("model_type", ["mpnet", "deberta-v2"])
def test_blocks_of_torchs_operators_equal_those_of_a_cpu(model_type, monkeypatch):
    module = packed_like(stock_model(model_type)).double()
    packed, _ = random_batch((37, 1, 2, 100, 3, 64, 61, 12), tail=5)

    def elsewhere(query, key, value, layout, drop, masks, mask_id, table):
        return relative.attend_elsewhere(query, key, value, layout, drop, table)

    found = []
    for function in (relative.attend_on_cpu, elsewhere):
        monkeypatch.setattr(relative, "attend_on_cpu", function)
        module.zero_grad()
        logits = module(**packed)
        _backward(logits)
        found.append([logits.detach(), *(p.grad.clone() for p in module.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)


def test_blocks_drop_at_the_given_rate():
    layout = PackedLayout((90,) * 40)
    value = torch.ones(layout.tokens, 1, 1)
    query = torch.zeros(layout.tokens, 1, 1)
    dropped = sdpa_blocks(query, query, value, layout, 0.25)
    assert abs(dropped.mean() - 1.0) < 0.01 and dropped.std() == pytest.approx((0.25 / 0.75 / 90) ** 0.5, rel=0.1)


# ---- dropout ----


@pytest.mark.parametrize("model_type", ["modernbert", "mpnet", "deberta-v2"])
def test_gradients_with_dropout_match_finite_differences(model_type):
    assert_finite_differences(with_dropout(stock_model(model_type)).double(), (9, 3, 28), 1e-5)


@pytest.mark.parametrize("model_type", ["modernbert", "mpnet", "deberta-v2"])
def test_masks_follow_the_step_and_no_two_dropouts_share_one(model_type, monkeypatch):
    seen: list[int] = []
    keep = DropoutMasks.keep
    monkeypatch.setattr(DropoutMasks, "keep", lambda self, s, d, n: seen.append(n) or keep(self, s, d, n))
    packed, _ = random_batch((30, 7, 12, 100, 80))
    outputs = []
    for checkpointing, step in ((False, 5), (False, 6), (True, 5)):
        module, masks = with_dropout(stock_model(model_type), gradient_checkpointing=checkpointing), DropoutMasks(3)
        masks.begin(step)
        outputs.append(module(**packed, dropout_masks=masks))
        assert len(seen) == len(set(seen))
        seen.clear()
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)


# ---- 16 bits ----


@pytest.mark.parametrize("model_type", NEW)
def test_bf16_differs_no_more_than_padding_the_same_model(model_type):
    stock = stock_model(model_type)
    packed, padded = random_batch((50, 7, 1, 30), pairs=takes_types(model_type))
    exact = _stock_logits(stock, padded)
    ours = packed_like(stock).bfloat16()(**packed)
    theirs = _stock_logits(stock.bfloat16(), padded)
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + 2e-2


@pytest.mark.parametrize("model_type", ["deberta-v2", "modernbert"])
def test_fp16_with_a_loss_scale_is_finite(model_type):
    """Scores that exceed fp16 before they are scaled: large queries and keys, as public reports have them."""
    module = packed_like(stock_model(model_type))
    with torch.no_grad():
        for layer in module.layers:
            layer.qkv.weight[: 2 * module.shape.hidden] *= 20
    module.half()
    packed, _ = random_batch((100, 1, 2, 40, 7), tail=3)
    logits = module(**packed)
    (F.cross_entropy(logits.float(), torch.arange(5) % 3) * 1024).backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in module.parameters())


# ---- what a description does not know ----


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("deberta-v2", {"conv_kernel_size": 3}, "convolution"),
        ("deberta-v2", {"relative_attention": False}, "no relative positions"),
        ("deberta-v2", {"pos_att_type": ["p2p"]}, "p2p"),
        ("deberta-v2", {"norm_rel_ebd": "batch_norm"}, "norm_rel_ebd"),
        ("deberta-v2", {"embedding_size": 24}, "embedding_size 24"),
        ("deberta-v2", {"pooler_hidden_act": "mish"}, "mish"),
        ("deberta-v2", {"attention_head_size": 16}, "attention_head_size"),
        ("deberta-v2", {"position_buckets": 2}, "position_buckets"),
        ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling 'max'"),
        ("modernbert", {"hidden_activation": "relu6"}, "relu6"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "yarn"),
        ("modernbert", {"num_attention_heads": 32}, "odd number"),
        ("mpnet", {"relative_attention_num_buckets": 8}, "relative_attention_num_buckets"),
        ("roberta-prelayernorm", {"is_decoder": True}, "decoder"),
        ("bert", {"quantization_config": {"bits": 4}}, "quantised"),
        ("bert", {"layer_drop_every": 2}, "layer_drop_every (2)"),
        ("xlm-roberta-xl", {"pruned_heads": {"0": [1]}}, "pruned"),
    ],
)
def test_an_unknown_key_runs_padded_and_is_named(model_type, changes, reason):
    config = {**stock_model(model_type).config.to_dict(), **changes}
    assert reason in why_not_packed(config)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_keys_that_are_off_or_read_by_nothing_run_packed(model_type):
    config = stock_model(model_type).config.to_dict()
    for extra in ({}, {"_attn_implementation": "sdpa"}, {"layer_drop_every": 0}, {"model_max_length": 512}):
        assert why_not_packed(config | extra) is None


# ---- devices that are not here ----


def test_torchs_flash_kernel_takes_a_window():
    """On tensors without data: names, types and a gradient, no numbers."""
    x = torch.empty(10, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    out = attention._flash_kernel(x, x, x, cu_seqlens, cu_seqlens, 7, 7, 0.1, window=3)
    out.sum().backward()
    assert out.shape == x.grad.shape == (10, 2, 16)


def test_cuda_gives_the_kernel_the_window(monkeypatch):
    windows = []

    def kernel(query, key, value, q_cu_seqlens, k_cu_seqlens, q_longest, k_longest, drop, window=None):
        windows.append(window)
        return query * 1.0

    attention.cuda_kernel.cache_clear()
    monkeypatch.setattr(attention, "CUDA_KERNELS", {"stand-in": (kernel, True)})
    layout = PackedLayout((40, 3))
    x = torch.randn(43, 2, 4)
    for seen in (layout, layout.within(8)):
        attention.varlen_attention(x, x, x, seen, False, 0.0, None, SITE)
    attention.cuda_kernel.cache_clear()
    assert windows == [None, None, 8, 8]  # each a probe and a call


@pytest.mark.parametrize("model_type", ["modernbert", "mpnet", "deberta-v2"])
def test_cuda_graphs_are_refused_with_the_reason(model_type):
    class Model:
        is_packed, module = True, packed_like(stock_model(model_type))

    class Recording:
        can_record = True

    assert "lengths on the host" in why_not_recorded(Model, None, Recording)[0]


def test_the_configs_of_the_hub_run_packed():
    """The keys of published models, in the form in which they lie there."""
    sizes = {"vocab_size": 99, "num_hidden_layers": 4, "max_position_embeddings": 512, "hidden_size": 32}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 48}
    modern = {
        "model_type": "modernbert", "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0, "local_attention": 128, "position_embedding_type": "sans_pos",
        "reference_compile": True, "repad_logits_with_grad": False, "sparse_pred_ignore_index": -100,
        "layer_norm_eps": 1e-5, "norm_eps": 1e-5, "hidden_activation": "gelu", "classifier_pooling": "mean",
    }  # fmt: skip
    deberta = {
        "model_type": "deberta-v2", "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "pos_att_type": "p2c|c2p", "max_relative_positions": -1, "pooler_dropout": 0,
        "position_biased_input": False, "pooler_hidden_act": "gelu", "pooler_hidden_size": 32, "type_vocab_size": 0,
    }  # fmt: skip
    for config in (sizes | modern, sizes | deberta):
        assert why_not_packed(config) is None
    shape = FAMILIES["modernbert"].shape(sizes | modern, 2)
    assert shape.rotary == (160000.0, 10000.0, 10000.0, 160000.0) and shape.windows == (None, 64, 64, None)


def test_the_page_of_families_names_every_family():
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    named = {name for row in re.findall(r"^\| (`[^|]+) \|", page, re.M) for name in re.findall(r"`([^`]+)`", row)}
    assert named - {"model_type"} == set(FAMILIES)


def test_the_page_of_families_has_the_measured_ratios():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "families.md").read_text(encoding="utf-8")
    measured = json.loads((root / "benchmarks/results/families-cpu.json").read_text(encoding="utf-8"))
    for name, tasks in measured["families"].items():
        ratios = " | ".join(f"{tasks[task]['rate_vs_padded']:.2f}" for task in ("mrpc", "cola"))
        assert f"| `{name}` | {ratios} |" in page


def test_the_page_of_families_has_the_measured_ratios_of_whole_runs():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "families.md").read_text(encoding="utf-8")
    measured = json.loads((root / "benchmarks/results/families-runs-cpu.json").read_text(encoding="utf-8"))
    for name, tasks in measured["families"].items():
        for task, found in tasks.items():
            pairs = [[r[run]["real_tokens_per_second"] for run in ("ours", "hf_best")] for r in found["rounds"]]
            rates = [ours / theirs for ours, theirs in pairs]
            median, memory = found["real_tokens_per_second_vs_hf_best"], found["peak_bytes_vs_hf_best"]
            row = f"| `{name}` | {task} | {median:.2f} | {min(rates):.2f} to {max(rates):.2f} | {memory:.2f} |"
            assert row in page


# How the READMEs call each packed family; those left out are variants of one that is named.
_IN_README = {
    "bert": "BERT", "roberta": "RoBERTa", "xlm-roberta": "XLM-R", "camembert": "CamemBERT", "electra": "ELECTRA",
    "distilbert": "DistilBERT", "albert": "ALBERT", "rembert": "RemBERT", "modernbert": "ModernBERT",
    "deberta-v2": "DeBERTa v2", "mpnet": "MPNet", "ernie": "ERNIE", "data2vec-text": "data2vec",
}  # fmt: skip
_VARIANTS = {"roberta-prelayernorm", "xlm-roberta-xl"}


@pytest.mark.parametrize(
    ("page", "begin", "end"),
    [("README.md", "docs/families.md)): ", ". Other"), ("README.zh-CN.md", "docs/families.md)）：", "。其他")],
)
def test_the_line_of_families_in_the_readme_names_those_that_run_packed(page, begin, end):
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8").replace("\n", " ")
    line = text.partition(begin)[2].partition(end)[0]
    assert set(re.split(r",\s*|、\s*", re.sub(r" and v3| 和 v3", "", line))) == set(_IN_README.values())
    assert _IN_README.keys() | _VARIANTS == set(FAMILIES)
