"""Rules about the tree itself: what may not appear, and how long things may be."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bert_glue.tasks import TASKS
from tools import public_addresses

REPOSITORY = Path(__file__).parents[1]
DEVICE_NAMES = {"npu", "cuda", "cpu", "mps"}
DEVICE_ROOMS = ("bert_glue/devices/", "bert_glue/model/attention.py")
LONGEST_FUNCTION = {"loop.py": 80}  # the loop reads better in one piece
LONGEST_MODULE = {"tasks.py": 450}  # a table of rows
OPTIONAL_PACKAGES = {
    "torch_npu", "apex", "amp_C", "flash_attn",  # devices
    "huggingface_hub",  # comes with transformers
    "markupsafe",  # comes with Jinja2
    "pyarrow", "pandas",  # come with datasets
    "onnx", "onnxruntime",  # export
    "peft", "modelscope",  # --lora_rank, --hub
    "tensorboard", "tensorboardX", "wandb", "mlflow", "swanlab", "trackio", "optuna",  # trackers, search
    "ray", "submitit",  # sweep --executor
}  # fmt: skip
DISTRIBUTIONS = {"google": "protobuf", "sklearn": "scikit-learn", "yaml": "PyYAML", "jinja2": "Jinja2"}


@cache
def tree() -> tuple[Path, ...]:
    """Files that are or will be committed."""
    return tuple(public_addresses.tree(REPOSITORY))


def relative(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


def program() -> list[Path]:
    """Python files of the product, without tests."""
    return [
        file
        for file in tree()
        if file.suffix == ".py" and (relative(file).startswith("bert_glue/") or file.name == "run_glue.py")
    ]


def texts() -> Iterator[tuple[str, str]]:
    """(relative name, text) of every text file."""
    for file in tree():
        try:
            yield relative(file), file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def nodes(files: list[Path], *kinds: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """(file:line, node) of every node of the given kinds."""
    for file in files:
        for node in ast.walk(parsed(file)):
            if isinstance(node, kinds):
                yield f"{relative(file)}:{getattr(node, 'lineno', 0)}", node


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def strings_in(node: ast.AST) -> set[str]:
    constants = (child for child in ast.walk(node) if isinstance(child, ast.Constant))
    return {constant.value for constant in constants if isinstance(constant.value, str)}


# Who may know what


def test_a_task_is_known_by_its_name_in_one_place() -> None:
    files = [file for file in program() if file.name != "tasks.py"]
    found = [where for where, node in nodes(files, ast.Compare, ast.MatchValue) if strings_in(node) & set(TASKS)]
    assert not found, "put what differs into the task's row"


def device_literals(module: ast.Module) -> Iterator[int]:
    """Lines that name a device. `map_location=` names where a file is loaded, not the training device."""
    allowed = {
        id(node.value) for node in ast.walk(module) if isinstance(node, ast.keyword) and node.arg == "map_location"
    }
    for node in ast.walk(module):
        is_name = isinstance(node, ast.Constant) and node.value in DEVICE_NAMES and id(node) not in allowed
        is_attribute = (
            isinstance(node, ast.Attribute)
            and node.attr in DEVICE_NAMES - {"cpu"}  # tensor.cpu() copies to the host
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        )
        if is_name or is_attribute:
            yield node.lineno


def test_a_device_is_known_by_its_name_in_two_rooms() -> None:
    files = [file for file in program() if not relative(file).startswith(DEVICE_ROOMS)]
    assert not [f"{relative(file)}:{line}" for file in files for line in device_literals(parsed(file))]


def test_the_device_rule_sees_what_it_should() -> None:
    bad = 'if kind == "npu":\n    torch.cuda.synchronize()\nx = {"cpu": 1}\n'
    good = 'torch.load(f, map_location="cpu", weights_only=True)\ny = x.cpu()\nz = "on cpu we fall back"\n'
    assert sorted(device_literals(ast.parse(bad))) == [1, 2, 3]
    assert not list(device_literals(ast.parse(good)))


def test_imports_are_pinned_or_optional() -> None:
    pinned = {line.split("==")[0] for line in (REPOSITORY / "requirements.txt").read_text().splitlines()}
    found = {}
    for where, node in nodes(program(), ast.Import, ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        for name in (name.split(".")[0] for name in names):
            if name not in sys.stdlib_module_names | OPTIONAL_PACKAGES | {"bert_glue", ""}:
                found[where] = DISTRIBUTIONS.get(name, name)
    assert not {where: name for where, name in found.items() if name not in pinned}


# What may not appear


def test_certificates_are_always_verified() -> None:
    off = ("verify", "verify_ssl", "ssl")
    files = [file for file in tree() if file.suffix == ".py"]
    found = [
        where
        for where, node in nodes(files, ast.keyword)
        if node.arg in off and isinstance(node.value, ast.Constant) and node.value.value is False
    ]
    assert not found
    switches = re.compile(
        r"CERT_NONE|_create_unverified|PYTHONHTTPSVERIFY|no-check-certificate|curl\s+-\w*k|trusted-host"
    )
    assert not [name for name, text in texts() if name != "tests/test_tree.py" and switches.search(text)]


def test_nothing_is_unpickled() -> None:
    """torch.load only with weights_only, numpy only without allow_pickle, the pickle modules never."""
    found = []
    for where, node in nodes(program(), ast.Call):
        call = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if re.fullmatch(r"(pickle|dill|cloudpickle|joblib|shelve)\.(loads?|Unpickler|open)", call):
            found.append(where)
        if call == "torch.load" and given.get("weights_only") != "True":
            found.append(where)
        if given.get("allow_pickle") == "True":
            found.append(where)
    assert not found


def test_no_workplace_and_no_registry_is_named() -> None:
    # In halves, so that this file does not name them itself.
    halves = (
        ("/work/", "main"),
        ("/work/", "shared"),
        ("/tmp", "/w/"),
        ("pypi", ".org"),
        ("python", "hosted"),
    )
    places = [first + second for first, second in halves]
    mirrors = re.compile("index-" + r"url|mirrors?\.\w+\.\w+/py" + "pi")
    found = [f"{name}: {place}" for name, text in texts() for place in places if place in text and name != "LICENSE"]
    assert not found
    assert not [name for name, text in texts() if mirrors.search(text)]


def test_no_unfinished_notes_and_no_emojis() -> None:
    note = re.compile(r"\b(" + "TO" + "DO|FIX" + r"ME|XX" + r"X)\b")
    emoji = re.compile("[\U0001f300-\U0001faff\u2705\u274c\u26a0\u2728]")
    assert not [name for name, text in texts() if note.search(text) or emoji.search(text)]


# How long things may be


def test_functions_are_short() -> None:
    found = []
    for where, node in nodes(program(), ast.FunctionDef, ast.AsyncFunctionDef):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > LONGEST_FUNCTION.get(where.split(":")[0].rsplit("/", 1)[-1], 60):
            found.append(f"{where} {node.name}: {lines} lines")
    assert not found


def test_modules_are_short() -> None:
    lengths = {relative(file): len(file.read_text(encoding="utf-8").splitlines()) for file in program()}
    assert not {name: n for name, n in lengths.items() if n > LONGEST_MODULE.get(name.rsplit("/", 1)[-1], 400)}


def test_public_functions_are_typed_and_modules_documented() -> None:
    found = [relative(file) for file in program() if file.read_text() and not ast.get_docstring(parsed(file))]
    for where, node in nodes(program(), ast.FunctionDef):
        hook = node.name.startswith("_") or node.name in ("forward", "backward")  # torch.autograd.Function
        if not hook and node.returns is None and not is_nested(node, where):
            found.append(f"{where} {node.name}: no return type")
    assert not found


def is_nested(function: ast.FunctionDef, where: str) -> bool:
    module = parsed(REPOSITORY / where.rsplit(":", 1)[0])
    owners = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node is not function)
    return any(function in ast.walk(owner) for owner in owners)


# Shell


def test_shell_scripts_pass_shellcheck() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    tool = str(beside) if beside.exists() else shutil.which("shellcheck")
    if tool is None:
        pytest.skip("no shellcheck here")
    scripts = [relative(file) for file in tree() if file.suffix == ".sh" or relative(file) == ".ci/run"]
    done = subprocess.run([tool, "-x", *scripts], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_started_scripts_stop_at_the_first_failure() -> None:
    started = [file for file in tree() if file.suffix == ".sh" and file.stat().st_mode & 0o100]
    assert started
    assert not [relative(file) for file in started if "\nset -euo pipefail\n" not in file.read_text()]
