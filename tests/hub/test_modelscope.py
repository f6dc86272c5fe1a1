"""--hub modelscope against a stand-in with the real package's signatures, which the real wheel is held to.

Nothing of the real package is imported and no address outside this machine is asked.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
import zipfile
from pathlib import Path

import loopback_hub
import pytest
from npu_wheel import fetch_wheel
from tiny_models import write_model

from bert_glue.config.arguments import Arguments
from bert_glue.config.parser import parse
from bert_glue.data.sources import load_task_data
from bert_glue.errors import DataError, MachineError, UsageError
from bert_glue.hub.client import MODEL_FILES
from bert_glue.model.folder import model_folder

PIN = "1.40.2"  # read, never installed


def snapshot_download(
    model_id=None, revision=None, cache_dir=None, user_agent=None, local_files_only=False, cookies=None,
    ignore_file_pattern=None, allow_file_pattern=None, local_dir=None, allow_patterns=None, ignore_patterns=None,
    max_workers=None, repo_id=None, repo_type=None, progress_callbacks=None, token=None, endpoint=None,
) -> str:  # fmt: skip
    """The signature of the real one; it gives what is in `shelf`."""
    asked.append({"name": model_id, **{k: v for k, v in locals().items() if v is not None and k != "model_id"}})
    if (repo_type, model_id) not in shelf or (local_files_only and not is_cached):
        raise ValueError(f"The repository {model_id} does not exist, said with {token}\nand a long explanation")
    return str(shelf[repo_type, model_id])


def get_endpoint(cn_site=True) -> str:
    return address


asked: list[dict] = []
shelf: dict[tuple[str, str], Path] = {}
is_cached = True
address = ""


@pytest.fixture
def modelscope(monkeypatch, tmp_path):
    """The stand-in as an installed package, its address a server of this machine."""
    from huggingface_hub import constants

    for name in ("modelscope", "modelscope.hub", "modelscope.hub.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, function in (("snapshot_download", snapshot_download), ("utils.utils", get_endpoint)):
        module = types.ModuleType(f"modelscope.hub.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("bert_glue.hub.modelscope.find_spec", lambda name: object())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the other hub: nobody may ask it
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked.clear()
    shelf.clear()
    with loopback_hub.serve(tmp_path / "nothing", "nobody/nothing", "0" * 40) as server:
        monkeypatch.setattr(sys.modules[__name__], "address", server.url)
        yield server


def of(tmp_path: Path, **changes) -> Arguments:
    return Arguments(hub="modelscope", cache_dir=str(tmp_path / "cache"), disable_tqdm=True, **changes)


def test_a_model_comes_from_there_without_pickles(modelscope, tmp_path):
    write_model(tmp_path / "model")
    shelf["model", "someone/tiny"] = tmp_path / "model"
    assert model_folder("someone/tiny", of(tmp_path, token="t")) == tmp_path / "model"
    (call,) = asked
    assert call["allow_patterns"] == MODEL_FILES and "*.safetensors" in MODEL_FILES and call["token"] == "t"
    assert (call["repo_type"], call["cache_dir"], call["local_files_only"]) == ("model", str(tmp_path / "cache"), False)
    assert "revision" not in call  # the default branch has another name there
    (tmp_path / "model" / "model.safetensors").unlink()
    model_folder("someone/tiny", of(tmp_path, model_revision="v2"))
    assert asked[-1]["revision"] == "v2" and asked[-1]["allow_patterns"] == ["pytorch_model*.bin"]


@pytest.mark.parametrize("name", [None, "someone/glue-copy"])
def test_a_task_s_rows_come_from_there(modelscope, tmp_path, name):
    """Under GLUE's own name, or the one that the user gives; labels by name as ever."""
    loopback_hub.make_repository(tmp_path / "glue")
    shelf["dataset", name or "nyu-mll/glue"] = tmp_path / "glue"
    data = load_task_data(of(tmp_path, task_name="mnli", dataset_name=name), frozenset({"train", "test"}))
    assert data.source == f"hub modelscope:{name or 'nyu-mll/glue'} mnli"
    assert [data.task.labels[label] for label in data.splits["train"].labels] == [
        "contradiction", "entailment", "neutral",
    ]  # fmt: skip
    assert "ax:test" in data.splits and {call["repo_type"] for call in asked} == {"dataset"}


def test_another_data_set_comes_from_there(modelscope, tmp_path):
    loopback_hub.make_repository(tmp_path / "glue")
    shelf["dataset", "someone/pairs"] = tmp_path / "glue"
    data = load_task_data(of(tmp_path, dataset_name="someone/pairs", dataset_config_name="mrpc"), frozenset({"train"}))
    assert data.source.startswith("someone/pairs") and len(data.splits["train"]) == 4


def test_what_is_not_there_is_one_line_and_the_other_hub_is_not_asked(modelscope, tmp_path):
    with pytest.raises(MachineError) as refused:
        model_folder("someone/none", of(tmp_path, token="ms-secret"))
    line = str(refused.value)
    assert "ModelScope http://127.0.0.1" in line and "does not exist" in line and "long explanation" not in line
    assert "ms-secret" not in line
    with pytest.raises(DataError, match="dataset nyu-mll/glue.*failed"):
        load_task_data(of(tmp_path, task_name="mrpc"), frozenset({"train"}))


def test_offline_its_cache_is_used_or_one_line_says_why(modelscope, tmp_path, monkeypatch):
    from huggingface_hub import constants

    write_model(tmp_path / "model")
    shelf["model", "someone/tiny"] = tmp_path / "model"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_folder("someone/tiny", of(tmp_path)) == tmp_path / "model" and asked[0]["local_files_only"]
    assert not modelscope.asked
    monkeypatch.setattr(sys.modules[__name__], "is_cached", False)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set.*no copy"):
        model_folder("someone/tiny", of(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sys.modules[__name__], "address", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="is not used .*refused.*no copy"):
        model_folder("someone/tiny", of(tmp_path))


def test_without_the_package_one_line_and_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bert_glue.hub.modelscope.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="pip install modelscope"):
        model_folder("someone/tiny", of(tmp_path))


def test_flags(tmp_path):
    base = ["--output_dir", "out", "--do_train", "--model_name_or_path", "a/b", "--hub"]
    assert parse([*base, "modelscope", "--task_name", "rte", "--dataset_name", "x/glue"]).dataset_name == "x/glue"
    for flags, says in (
        (["modelscop", "--task_name", "rte"], "Did you mean modelscope?"),
        (["huggingface", "--task_name", "rte", "--dataset_name", "x/y"], "two data sets"),
        (["modelscope", "--task_name", "rte", "--push_to_hub"], "not to --hub modelscope"),
    ):
        with pytest.raises(UsageError) as refused:
            parse([*base, *flags])
        assert says in str(refused.value)


# The real package


def _real(wheel: zipfile.ZipFile, file: str, name: str) -> list[tuple[str, object]]:
    """Parameters of a function as its source has them: (name, default)."""
    tree = ast.parse(wheel.read(file))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    defaults = [ast.literal_eval(default) for default in found.args.defaults]
    names = [argument.arg for argument in found.args.args]
    return list(zip(names, [inspect.Parameter.empty] * (len(names) - len(defaults)) + defaults, strict=True))


def test_the_stand_in_has_the_real_signatures(pytestconfig):
    with zipfile.ZipFile(fetch_wheel(Path(pytestconfig.cache.mkdir("modelscope_wheel")), "modelscope", PIN)) as wheel:
        for function, file in (
            (snapshot_download, "modelscope/hub/snapshot_download.py"),
            (get_endpoint, "modelscope/hub/utils/utils.py"),
        ):
            ours = [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
            assert ours == _real(wheel, file, function.__name__)
