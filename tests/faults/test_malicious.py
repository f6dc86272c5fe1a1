"""Pickles in every place where a file is read, and archives: none is executed, nothing is written outside."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_run import REPOSITORY, arguments, changed, fit, make_model

from bert_glue.data.tokenization import TextTokenizer, tokenize
from bert_glue.errors import CheckpointError, UserError
from bert_glue.model.loading import load_model
from bert_glue.storage import checkpoint


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path, how: str):
        self.marker, self.how = str(marker), how

    def __reduce__(self):
        return {
            "system": (os.system, (f"touch {self.marker}",)),
            "open": (open, (self.marker, "w")),
            "exec": (exec, (f"open({self.marker!r}, 'w')",)),
            "getattr": (getattr(os, "mknod"), (self.marker,)),  # noqa: B009
        }[self.how]


def bombs(marker: Path) -> dict[str, bytes]:
    """Malicious contents: plain pickles of several protocols, torch's archive, and zips and tars with ways out."""
    found = {}
    for how in ("system", "open", "exec", "getattr"):
        found[f"pickle {how}"] = pickle.dumps(Evil(marker, how))
        found[f"pickle 0 {how}"] = pickle.dumps(Evil(marker, how), protocol=0)
        stream = io.BytesIO()
        torch.save({"weight": Evil(marker, how)}, stream)
        found[f"torch {how}"] = stream.getvalue()
        stream = io.BytesIO()
        torch.save({"weight": Evil(marker, how)}, stream, _use_new_zipfile_serialization=False)
        found[f"old torch {how}"] = stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"../../../..{marker}", "out")
        archive.writestr("bomb", bytes(50 << 20))
    found["zip with .. and a bomb"] = stream.getvalue()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        archive.addfile(link)
        out = tarfile.TarInfo(f"link{marker}")
        archive.addfile(out, io.BytesIO())
    found["tar with a link out"] = stream.getvalue()
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    found["safetensors of four terabytes"] = len(header).to_bytes(8, "little") + header
    found["safetensors with an endless header"] = (1 << 62).to_bytes(8, "little") + b"{"
    return found


NAMES = list(bombs(Path("/nowhere")))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Settings of a run with one checkpoint."""
    args = arguments(tmp_path_factory.mktemp("saved"), max_steps=2, save_strategy="steps", save_steps=2)
    fit(args)
    return args


def signed(folder: Path) -> None:
    """Make the manifest fit, as someone who means harm can."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != checkpoint.MANIFEST
    }
    (folder / checkpoint.MANIFEST).write_text(checkpoint._manifest_text(files, time.time()))


def everywhere(places: list) -> list:
    """Each content in each place; in the short form each content in one of them, taken in turn."""
    return [
        pytest.param(name, place, marks=() if at % len(places) == turn else pytest.mark.slow)
        for at, name in enumerate(NAMES)
        for turn, place in enumerate(places)
    ]


STATE_FILES = ["optimizer.safetensors", "random-0.safetensors", "trainer_state.json"]


@pytest.mark.parametrize(("name", "place"), everywhere(STATE_FILES))
def test_in_a_checkpoint_whose_manifest_fits(saved, tmp_path, name, place):
    marker = tmp_path / "executed"
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(Path(saved.output_dir) / "checkpoint-2", folder)
    (folder / place).write_bytes(bombs(marker)[name])
    (folder / "optimizer.pt").write_bytes(bombs(marker)[name])  # as other programs name it: never looked at
    signed(folder)
    with pytest.raises(CheckpointError, match="not what this program writes") as caught:
        fit(changed(saved, resume_from_checkpoint=str(folder)))
    assert caught.value.exit_code == 6
    assert not marker.exists()


WEIGHT_FILES = [(file, allowed) for file in ("pytorch_model.bin", "model.safetensors") for allowed in (True, False)]


@pytest.mark.parametrize(("name", "place"), everywhere(WEIGHT_FILES))
def test_as_weights(saved, tmp_path, name, place):
    file, allowed = place
    marker = tmp_path / "executed"
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / file).write_bytes(bombs(marker)[name])
    args = changed(saved, model_name_or_path=str(model), allow_pickle_weights=allowed)
    from bert_glue.data.sources import load_task_data

    task = load_task_data(args, frozenset({"train"})).task
    with pytest.raises(UserError) as caught:
        load_model(args, task)
    assert caught.value.exit_code == 4 and file in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", NAMES)
def test_in_the_token_cache(saved, tmp_path, monkeypatch, name):
    """Also where the cache's own manifest is made to fit."""
    from bert_glue.data.sources import load_task_data

    monkeypatch.setenv("BERT_GLUE_CACHE", str(tmp_path / "cache"))
    marker = tmp_path / "executed"
    tokenizer = TextTokenizer(Path(saved.model_name_or_path))
    split = load_task_data(saved, frozenset({"train"})).splits["train"]
    expected, _ = tokenize(tokenizer, split, 32)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    (folder / "ids.npy").write_bytes(bombs(marker)[name])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["ids"] = hashlib.blake2b((folder / "ids.npy").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    table, how = tokenize(tokenizer, split, 32)
    assert how == "made" and table.ids.tolist() == expected.ids.tolist()
    assert not marker.exists()


def test_links_in_place_of_a_checkpoints_files(saved, tmp_path):
    """A link is read where its content has the hash, and never written or deleted through."""
    outside = tmp_path / "outside.safetensors"
    folder = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(Path(saved.output_dir) / "checkpoint-2", folder)
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)
    assert checkpoint.verify(folder) == ""
    before = outside.read_bytes()
    fit(changed(saved, output_dir=str(tmp_path / "out")))  # writes checkpoint-2 again
    assert not (folder / "model.safetensors").is_symlink() and outside.read_bytes() == before
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside)
    checkpoint.remove(folder)
    assert outside.read_bytes() == before


def test_the_program_opens_no_archives():
    """Nothing is unpacked anywhere: there is no code that could (submission.py writes a zip)."""
    openers = {"tarfile", "gzip", "bz2", "lzma", "zlib"}
    found = []
    for file in [*(REPOSITORY / "bert_glue").glob("*.py"), REPOSITORY / "run_glue.py"]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found += [f"{file.name}: {name}" for name in names if name.split(".")[0] in openers]
            if isinstance(node, ast.Attribute) and node.attr in ("unpack_archive", "extractall", "extract"):
                found.append(f"{file.name}: {node.attr}")
    assert not found
