"""From a model folder or name to logits and back: heads, fallbacks, saved folders, refusals."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import LFS_POINTER, VOCAB, stock_model, write_model

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import Collator, TokenSplit
from bert_glue.data.splits import Split
from bert_glue.errors import MachineError
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.families import FAMILIES
from bert_glue.model.folder import model_folder, read_config, task_of_model
from bert_glue.model.loading import load_model
from bert_glue.tasks import get_task

MRPC, MNLI, STSB = get_task("mrpc"), get_task("mnli"), get_task("stsb")
TEXTS = (["the cat sat .", "a big dog ran on the mat", "unable"], ["a dog ran", "", "the red hat ! " * 5])
PAIR = Split("validation", TEXTS, None, "")
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    write_model(folder)
    return folder


def _load(folder, task=MRPC, **flags) -> LoadedModel:
    torch.manual_seed(0)
    model = load_model(Arguments(model_name_or_path=str(folder), **flags), task)
    model.module.eval()
    return model


def _logits(model: LoadedModel, padding: str | None = None) -> torch.Tensor:
    table = model.tokenizer.encode(PAIR, 48)
    collate = Collator(
        padding=padding or ("packed" if model.is_packed else "longest"),
        max_length=48,
        pad_id=model.pad_id,
        gives_types=model.tokenizer.gives_types,
        device=DEVICE,
    )
    batch = collate(TokenSplit("validation", table, None), np.arange(len(PAIR)))
    with torch.no_grad():
        return model.module(**batch.inputs)


# ---- packed and padded ----


@pytest.mark.parametrize("model_type", FAMILIES)
def test_our_padded_path_equals_packed(model_type, tmp_path):
    write_model(tmp_path, model_type, max_position_embeddings=64)
    packed, padded = _load(tmp_path), _load(tmp_path, padding="longest")
    assert packed.is_packed and not padded.is_packed and padded.why_padded == "--padding longest"
    expected = _logits(packed)
    for padding in ("longest", "max_length"):
        torch.testing.assert_close(_logits(padded, padding), expected, atol=1e-5, rtol=0)
    assert packed.position_limit == padded.position_limit
    assert packed.position_limit == 64 - packed.module.shape.position_offset


@pytest.mark.parametrize("model_type", ["deberta", "fnet"])
def test_an_unknown_family_runs_padded_and_says_why(model_type, tmp_path):
    changes = {} if model_type == "deberta" else {"use_tpu_fourier_optimizations": False}
    write_model(tmp_path, model_type, **changes)
    model = _load(tmp_path)
    assert not model.is_packed and f"model_type '{model_type}'" in model.why_padded
    assert _logits(model).shape == (3, 2)
    assert model.position_limit == 512
    with pytest.raises(MachineError, match="cannot run packed"):
        _load(tmp_path, padding="packed")


def test_a_missing_encoder_weight_is_refused_on_the_padded_path_too(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    tensors = load_file(bert / "model.safetensors")
    tensors.pop("bert.encoder.layer.0.output.dense.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for padding in ("packed", "longest"):
        with pytest.raises(MachineError, match="bert.encoder.layer.0.output.dense.weight"):
            _load(tmp_path, padding=padding)


def test_gradient_checkpointing_reaches_both_paths(bert):
    assert _load(bert, gradient_checkpointing=True).module.gradient_checkpointing
    padded = _load(bert, gradient_checkpointing=True, padding="longest")
    assert padded.module.stock.is_gradient_checkpointing


# ---- dropout flags ----


@pytest.mark.parametrize("padding", ["auto", "longest"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_dropout_flags(model_type, padding, tmp_path):
    write_model(tmp_path, model_type)
    model = _load(tmp_path, padding=padding, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    if model.is_packed:
        shape = model.module.shape
        assert (shape.hidden_dropout, shape.attention_dropout) == (0.25, 0.5)
    else:
        rates = {part.p for part in model.module.modules() if isinstance(part, torch.nn.Dropout)}
        assert 0.25 in rates


# ---- heads ----


def _with_config(folder: Path, target: Path, **changes) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.fixture(scope="module")
def bert_of_three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    write_model(folder, labels=3)
    return folder


@pytest.mark.parametrize("padding", ["packed", "longest"])
@pytest.mark.parametrize(
    "names", [["CONTRADICTION", "Entailment", "neutral"], ["neutral", "contradiction", "entailment"]]
)
def test_a_stored_head_is_reordered_by_name(bert_of_three, tmp_path, names, padding):
    plain = _logits(_load(bert_of_three, MNLI, padding=padding))
    named = _with_config(bert_of_three, tmp_path, id2label={str(i): n for i, n in enumerate(names)})
    model = _load(named, MNLI, padding=padding)
    order = [[n.lower() for n in names].index(label) for label in MNLI.labels]
    assert order != [0, 1, 2] and "reordered by name" in model.notes[0]
    torch.testing.assert_close(_logits(model), plain[:, order])
    assert list(model.config["id2label"].values()) == list(MNLI.labels)


@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_other_label_names_keep_their_order_with_a_note(bert_of_three, tmp_path, padding):
    plain = _logits(_load(bert_of_three, MNLI, padding=padding))
    named = _with_config(bert_of_three, tmp_path, id2label={"0": "no", "1": "maybe", "2": "yes"})
    model = _load(named, MNLI, padding=padding, do_train=True)
    assert "their order is kept" in model.notes[0] and torch.equal(_logits(model), plain)


@pytest.mark.parametrize("names", [["no", "maybe", "yes"], ["entailment", "neutral", "other"], ["NEUTRAL"] * 3])
def test_a_model_with_other_classes_is_not_scored(bert_of_three, tmp_path, names):
    named = _with_config(bert_of_three, tmp_path, id2label=dict(zip("012", names, strict=True)))
    with pytest.raises(MachineError, match=f"{names[0]}.*differ from those of mnli.*contradiction"):
        _load(named, MNLI)


@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_a_head_of_another_size(bert_of_three, padding):
    with pytest.raises(MachineError, match="--ignore_mismatched_sizes|ignore_mismatched_sizes"):
        _load(bert_of_three, MRPC, padding=padding)
    model = _load(bert_of_three, MRPC, padding=padding, ignore_mismatched_sizes=True)
    assert "initialised at random" in model.notes[0] and _logits(model).shape == (3, 2)


@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_a_head_that_is_not_stored_starts_anew(bert, tmp_path, padding):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    kept = {n: v for n, v in load_file(bert / "model.safetensors").items() if not n.startswith("classifier")}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model = _load(tmp_path, MNLI, padding=padding)
    assert "initialised at random" in model.notes[0] and _logits(model).shape == (3, 3)


def test_regression_has_one_output(tmp_path):
    write_model(tmp_path, labels=1)
    model = _load(tmp_path, STSB)
    assert _logits(model).shape == (3, 1) and model.config["problem_type"] == "regression"


# ---- saved folders ----


@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_a_saved_folder_works_in_a_pipeline(bert, tmp_path, padding):
    from transformers import pipeline

    model = _load(bert, padding=padding)
    model.save(tmp_path)
    again = _load(tmp_path, padding=padding)
    assert torch.equal(_logits(again), _logits(model)) and again.notes == []
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None)
    # The pipeline takes an empty second text for none at all.
    pairs = [{"text": a, "text_pair": b} for a, b in zip(*TEXTS, strict=True)]
    answers = classify([pair for pair in pairs if pair["text_pair"]], batch_size=2)
    probabilities = _logits(model).softmax(-1)[[0, 2]]
    for answer, row in zip(answers, probabilities, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert scores == pytest.approx(dict(zip(MRPC.labels, row.tolist(), strict=True)), abs=1e-5)


def test_tensors_can_be_put_back(bert):
    for padding in ("packed", "longest"):
        model = _load(bert, padding=padding)
        expected, tensors = _logits(model), {n: v.clone() for n, v in model.tensors().items()}
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.add_(1.0)
        assert not torch.allclose(_logits(model), expected)
        model.load_tensors(tensors)
        assert torch.equal(_logits(model), expected)


# ---- folders and names ----


def test_config_and_tokenizer_from_elsewhere(bert, tmp_path):
    weights, config, words = (tmp_path / name for name in ("weights", "config", "words"))
    for folder in (weights, config, words):
        folder.mkdir()
    shutil.copy(bert / "model.safetensors", weights)
    shutil.copy(bert / "config.json", config)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(bert / name, words)
    model = _load(weights, config_name=str(config), tokenizer_name=str(words))
    assert torch.equal(_logits(model), _logits(_load(bert)))


def test_without_config(tmp_path):
    with pytest.raises(MachineError, match="has no config.json"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        (LFS_POINTER, "Git-LFS pointer"),
        ('{"hidden_size": 32}', "has no model_type"),
    ],
)
def test_a_broken_config(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(MachineError, match=message):
        read_config(tmp_path)


def test_a_config_with_the_keys_of_bert_alone_is_bert(bert, tmp_path):
    folder = _with_config(bert, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    keys = Path(__file__).parents[2] / "bert_base_cased_config.json"
    bare = {name: config[name] for name in json.loads(keys.read_text()) if name in config and name != "model_type"}
    (folder / "config.json").write_text(json.dumps(bare))
    model = _load(folder)
    assert any("no model_type" in note for note in model.notes)
    assert torch.equal(_logits(model), _logits(_load(bert)))


@pytest.mark.parametrize(
    "own",
    [{"architectures": ["RobertaForMaskedLM"]}, {"embedding_size": 16}, {"type_vocab_size": 1}, {"eos_token_id": 2}],
)
def test_a_relative_of_bert_without_model_type_is_refused(bert, tmp_path, own):
    folder = _with_config(bert, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config | own))
    with pytest.raises(MachineError, match="has no model_type"):
        read_config(folder)


def test_a_config_without_a_size_names_it(bert, tmp_path):
    folder = _with_config(bert, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MachineError, match="config.json has no 'hidden_size'"):
        _load(folder)


def test_a_sharded_folder(bert, tmp_path):
    stock = stock_model("bert", 2, vocab_size=len(VOCAB))
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    stock.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(_logits(_load(tmp_path)), _logits(_load(bert)))


@pytest.mark.parametrize("padding", ["packed", "longest"])
def test_pickled_weights(bert, tmp_path, padding):
    from safetensors.torch import load_file

    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save(load_file(bert / "model.safetensors"), tmp_path / "pytorch_model.bin")
    model = _load(tmp_path, padding=padding)
    assert torch.equal(_logits(model), _logits(_load(bert, padding=padding)))


@pytest.mark.parametrize("name", ["./bert-base-cased", "/no/such/folder", "a/b/c"])
def test_a_path_is_never_asked_of_the_hub(name):
    with pytest.raises(MachineError, match="no such folder"):
        model_folder(name, Arguments())


@pytest.fixture
def hub_at(monkeypatch):
    """Points the hub's client to an address of this host."""
    from huggingface_hub import constants

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def point(port: int, is_offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)

    return point


def _refusal_within_5_s(cache: Path) -> str:
    begin = time.monotonic()
    with pytest.raises(MachineError, match="give its path.*HF_ENDPOINT") as caught:
        model_folder("nobody/no-such-model", Arguments(cache_dir=str(cache)))
    assert time.monotonic() - begin < 5
    return str(caught.value)


def test_offline_fails_at_once_and_says_what_to_do(tmp_path, hub_at):
    hub_at(9, is_offline=True)
    assert "HF_HUB_OFFLINE is set" in _refusal_within_5_s(tmp_path)


@pytest.mark.parametrize(("network", "reason"), [("refused", "refused"), ("silent", "no answer|timed out")])
def test_without_a_network_it_fails_within_seconds(tmp_path, hub_at, network, reason):
    """A refused connection, and a server that accepts and never answers: the client alone waits for minutes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if network == "silent":
            server.listen(8)
        hub_at(server.getsockname()[1])
        assert re.search(reason, _refusal_within_5_s(tmp_path))


def test_a_cached_model_is_used_without_a_network(bert, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    repo = tmp_path / "models--nobody--tiny"
    shutil.copytree(bert, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    folder = model_folder("nobody/tiny", Arguments(cache_dir=str(tmp_path)))
    assert (folder / "model.safetensors").is_file()


def test_a_fresh_head_is_the_same_packed_and_padded(bert):
    heads = []
    for padding in ("packed", "longest", "max_length"):
        tensors = _load(bert, padding=padding).tensors()
        heads.append(tensors["classifier.weight"])
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])
    assert heads[0].abs().sum() > 0


@pytest.mark.parametrize("labels", [1, 2, 28])
def test_a_multi_label_classifier_says_so_itself(tmp_path, labels):
    write_model(tmp_path, labels=labels, problem_type="multi_label_classification")
    task, _ = task_of_model(tmp_path)
    assert task.is_multi_label and not task.is_regression and task.num_labels == labels
    assert task.decision.threshold == 0.5 and task.problem_type == "multi_label_classification"
    with pytest.raises(MachineError, match="multi_label_classification.*sst2 is single_label_classification"):
        _load(tmp_path, get_task("sst2"), do_train=False)
