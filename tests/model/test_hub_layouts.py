"""Weights and vocabularies as repositories of the hub have them, read on both paths and fetched from a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import loopback_hub
import pytest
import torch
from family_folders import write_folder
from safetensors.torch import load_file
from tiny_models import VOCAB, write_model

from bert_glue.config.arguments import Arguments
from bert_glue.errors import MachineError
from bert_glue.model.loading import load_model
from bert_glue.tasks import get_task, own_task

MRPC = get_task("mrpc")


def _stored(folder: Path, **flags) -> dict[str, torch.Tensor]:
    return load_model(Arguments(model_name_or_path=str(folder), **flags), MRPC).tensors()


def _old_names(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


LAYOUTS = {
    "a pickle": lambda tensors: tensors,
    "wrapped for DDP": lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
    "old names of norms": lambda tensors: {_old_names(name): value for name, value in tensors.items()},
    "half precision": lambda tensors: {name: value.half() for name, value in tensors.items()},
    "heads of pre-training too": lambda tensors: {**tensors, "cls.predictions.bias": torch.ones(9)},
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("padding", ["packed", "longest"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_are_read_on_both_paths(tmp_path, layout, padding, shards):
    write_model(tmp_path)
    expected = _stored(tmp_path)
    tensors = layout(load_file(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{at % shards + 1:05}-of-{shards:05}.bin" for at, name in enumerate(tensors)}
        for file in set(places.values()):
            torch.save({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file)
        index = {"metadata": {}, "weight_map": places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = _stored(tmp_path, padding=padding)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3)


def test_a_vocabulary_with_more_words_than_the_model_is_refused(tmp_path):
    write_model(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"later": len(VOCAB), "latest": len(VOCAB) + 1}))
    with pytest.raises(
        MachineError, match=f"has {len(VOCAB) + 2} ids, but the model's word embedding has {len(VOCAB)}"
    ):
        _stored(tmp_path)


def test_a_tokenizer_of_another_family_is_named_in_the_saved_folder(tmp_path):
    """--tokenizer_name: the saved config.json no longer names the class of the vocabulary."""
    from transformers import AutoTokenizer

    write_model(tmp_path / "model", vocab_size=400)
    write_folder("roberta", tmp_path / "other", bare=True)
    flags = {"model_name_or_path": str(tmp_path / "model"), "tokenizer_name": str(tmp_path / "other")}
    load_model(Arguments(**flags), MRPC).save(tmp_path / "saved")
    text = "river stones under the lamp"
    expected = AutoTokenizer.from_pretrained(tmp_path / "other")(text)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text)["input_ids"] == expected["input_ids"]


@pytest.fixture
def hub(tmp_path):
    """Serves the folders in `tmp_path / "models"` as someone/NAME to a program of their own."""

    def fetch(name: str) -> tuple[Path, set[str]]:
        models = {f"someone/{path.name}": path for path in (tmp_path / "models").iterdir()}
        program = "import sys; from bert_glue.config.arguments import Arguments\n"
        program += "from bert_glue.model.folder import model_folder; print(model_folder(sys.argv[1], Arguments()))"
        with loopback_hub.serve(tmp_path, "nobody/nothing", "0" * 40, models) as server:
            own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
            outer = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
            done = subprocess.run(
                [sys.executable, "-c", program, f"someone/{name}"], cwd=Path(__file__).parents[2], text=True,
                env={**outer, **own, "NO_PROXY": "*", "no_proxy": "*"}, capture_output=True, check=True,
            )  # fmt: skip
        folder = Path(done.stdout.splitlines()[-1])
        return folder, {path.name for path in folder.iterdir()}

    return fetch


def test_the_hub_gives_a_pickle_and_a_sentencepiece_file_where_it_has_nothing_else(tmp_path, hub):
    folder = tmp_path / "models" / "old"
    write_folder("deberta-v2", folder, bare=True)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "tf_model.h5").write_bytes(b"of another framework")
    fetched, names = hub("old")
    assert names == {"config.json", "spm.model", "pytorch_model.bin"}
    task = own_task("own", ("text",), ("low", "middle", "high"))
    assert load_model(Arguments(model_name_or_path=str(fetched)), task).fresh == []


def test_the_hub_s_pickle_stays_there_where_safetensors_are(tmp_path, hub):
    folder = tmp_path / "models" / "new"
    write_model(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin" not in hub("new")[1]
