"""Weight files: which are read, which are refused, and the errors if they do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import LFS_POINTER, packed_like, stock_model
from torch.torch_version import TorchVersion

from bert_glue.errors import MachineError
from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.families import FAMILIES
from bert_glue.model.weights import initialise, load_packed, packed_tensors, read_tensors, weight_files
from bert_glue.storage.files import check_not_lfs_pointer

BERT = FAMILIES["bert"]


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in stock_model("bert").state_dict().items()}


def _module(labels: int = 3) -> PackedClassifier:
    return PackedClassifier(BERT.shape(stock_model("bert").config.to_dict(), labels))


def test_a_pointer_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text(LFS_POINTER)
    with pytest.raises(MachineError, match=r"model.safetensors is a Git-LFS pointer.*git lfs pull"):
        weight_files(tmp_path, False)


@pytest.mark.parametrize(("version", "is_allowed"), [("2.13.0", False), ("2.6.0+cu124", False), ("2.5.1", True)])
def test_pickles_are_read(tmp_path, stored, monkeypatch, version, is_allowed):
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    torch.save(stored, tmp_path / "pytorch_model.bin")
    tensors = read_tensors(weight_files(tmp_path, is_allowed))
    assert set(tensors) == set(stored) and all(torch.equal(tensors[n], stored[n]) for n in stored)


def test_an_old_torch_reads_pickles_only_where_that_is_allowed(tmp_path, stored, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    torch.save(stored, tmp_path / "pytorch_model.bin")
    with pytest.raises(MachineError, match="--allow_pickle_weights"):
        weight_files(tmp_path, False)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_prefix_of_a_wrapped_model_is_taken_off(tmp_path, stored, suffix):
    wrapped = {f"module.{name}": value for name, value in stored.items()}
    if suffix == "bin":
        torch.save(wrapped, tmp_path / "pytorch_model.bin")
    else:
        save_file(wrapped, tmp_path / "model.safetensors")
    assert read_tensors(weight_files(tmp_path, False)).keys() == stored.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "epoch": 3}, r"holds more than tensors \(state_dict, epoch\)"),
        ([torch.ones(2)], "holds a list"),
    ],
)
def test_a_pickle_of_something_else_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(MachineError, match=message):
        read_tensors(weight_files(tmp_path, False))


def test_weights_of_other_frameworks_are_named(tmp_path):
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(MachineError, match="tf_model.h5 must be converted to PyTorch"):
        weight_files(tmp_path, False)


def test_a_pickle_that_runs_code_is_refused_even_when_allowed(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"x": _Evil(str(marker))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MachineError, match="cannot be read"):
        read_tensors(weight_files(tmp_path, True))
    assert not marker.exists()


class _Evil:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_safetensors_come_before_pickles(tmp_path, stored):
    torch.save({}, tmp_path / "pytorch_model.bin")
    save_file(stored, tmp_path / "model.safetensors")
    assert [f.name for f in weight_files(tmp_path, True)] == ["model.safetensors"]


def _shard(folder, stored) -> list[str]:
    names = sorted(stored)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in parts.items():
        save_file({name: stored[name] for name in members}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, members in parts.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(parts)


def test_shards(tmp_path, stored):
    files = _shard(tmp_path, stored)
    found = weight_files(tmp_path, False)
    assert [f.name for f in found] == files
    assert set(read_tensors(found)) == set(stored)
    (tmp_path / files[1]).unlink()
    with pytest.raises(MachineError, match=f"{files[1]} is missing"):
        weight_files(tmp_path, False)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(MachineError, match="model.safetensors.index.json"):
        weight_files(tmp_path, False)


def test_no_weights(tmp_path):
    with pytest.raises(MachineError, match="has no model.safetensors"):
        weight_files(tmp_path, True)


def test_a_damaged_file_is_named(tmp_path, stored):
    path = tmp_path / "model.safetensors"
    save_file(stored, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MachineError, match=f"{path} cannot be read"):
        read_tensors([path])


def test_missing_encoder_weights_are_named(stored):
    gone = "bert.encoder.layer.1.attention.self.key.weight"
    with pytest.raises(MachineError, match=f"{gone} is missing"):
        load_packed(_module(), BERT, {n: v for n, v in stored.items() if n != gone}, resize_head=False)


def test_many_problems_are_counted(stored):
    with pytest.raises(MachineError, match=r"\(and \d+ more\)") as caught:
        load_packed(_module(), BERT, {n: v for n, v in stored.items() if "layer" not in n}, resize_head=False)
    assert str(caught.value).count("is missing") == 5


def test_encoder_weights_of_another_shape_are_never_replaced(stored):
    name = "bert.embeddings.word_embeddings.weight"
    with pytest.raises(MachineError, match=rf"{name} has shape \[119, 32\], needed is \[120, 32\]"):
        load_packed(_module(), BERT, {**stored, name: stored[name][:-1]}, resize_head=True)


def test_a_head_of_another_size_needs_consent(stored):
    with pytest.raises(MachineError, match="classifier.weight.*--ignore_mismatched_sizes"):
        load_packed(_module(labels=2), BERT, stored, resize_head=False)
    module = _module(labels=2)
    before = module.head_output.weight.clone()
    assert load_packed(module, BERT, stored, resize_head=True) == ["head_output.weight", "head_output.bias"]
    assert torch.equal(module.head_output.weight, before)
    assert torch.equal(module.words.weight, stored["bert.embeddings.word_embeddings.weight"])


def test_a_bare_encoder_and_tensorflows_names(stored):
    old = {}
    for name, value in stored.items():
        if name.startswith("bert."):
            name = name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            old[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
    module = _module()
    fresh = load_packed(module, BERT, {**old, "embeddings.position_ids": torch.arange(512)}, resize_head=False)
    assert fresh == ["head_output.weight", "head_output.bias"]
    back = packed_tensors(module, BERT)
    assert all(torch.equal(back[n], v) for n, v in stored.items() if n.startswith("bert."))


def test_half_precision_files_are_read_as_fp32(stored):
    module = _module()
    load_packed(module, BERT, {n: v.half() for n, v in stored.items()}, resize_head=False)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module.words.weight, stored["bert.embeddings.word_embeddings.weight"].half().float())


def test_tensors_are_copies_with_the_stored_names(stored):
    module = packed_like(stock_model("bert"))
    tensors = packed_tensors(module, BERT)
    assert set(tensors) == set(stored) and all(torch.equal(tensors[n], stored[n]) for n in stored)
    with torch.no_grad():
        module.words.weight.zero_()
    assert tensors["bert.embeddings.word_embeddings.weight"].abs().sum() > 0


def test_start_of_a_new_model():
    module = _module()
    torch.manual_seed(0)
    initialise(module, 0.02)
    assert abs(module.words.weight.std().item() - 0.02) < 0.002
    assert module.layers[0].qkv.bias.abs().max() == 0 and (module.layers[0].output_norm.weight == 1).all()


def test_a_file_that_may_not_be_read_is_said_in_one_line(tmp_path):
    """Root reads everything, so a loop of links stands for the refusal."""
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(MachineError, match="model.safetensors cannot be read: "):
        check_not_lfs_pointer(tmp_path / "model.safetensors")
