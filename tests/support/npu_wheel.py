"""The real torch_npu wheel as text: downloaded once into pytest's cache, parsed, never imported."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
PIN = re.search(r"^torch_npu==(\S+)$", (REPOSITORY / "requirements/npu.txt").read_text(), re.MULTILINE)[1]
# Read as text only, so one wheel serves every machine that runs the tests.
_PLATFORM = ("--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64")
_SECONDS = 240


def fetch_wheel(folder: Path, package: str = "torch_npu", pin: str = PIN) -> Path:
    """The wheel, from `folder` or by pip; skips the test if neither has it."""
    pattern = f"{package}-{pin}-*.whl"
    found = next(folder.glob(pattern), None)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries", "1"]
        command += ["--timeout", "15", "--disable-pip-version-check", "-q", "--dest", aside, *_PLATFORM]
        try:
            done = subprocess.run([*command, f"{package}=={pin}"], capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{package} {pin} was not downloaded within {_SECONDS} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"{package} {pin} cannot be downloaded: {last}")
        downloaded = next(Path(aside).glob(pattern))
        os.replace(downloaded, folder / downloaded.name)
    return folder / downloaded.name


@dataclass(frozen=True)
class Found:
    """What a dotted name of torch_npu is.

    Args:
        kind: module, function, class, value or operator.
        signature: of a function, a class's constructor or an operator; None for the rest.
    """

    kind: str
    signature: inspect.Signature | None = None


class Wheel:
    """Names and signatures in a wheel's Python sources and its registered operators."""

    def __init__(self, path: Path):
        self.path = path
        self._zip = zipfile.ZipFile(path)
        self._names = set(self._zip.namelist())
        self._parsed: dict[str, ast.Module | None] = {}

    @cached_property
    def metadata(self) -> str:
        """Its METADATA, the README included."""
        name = next(n for n in self._names if n.endswith(".dist-info/METADATA"))
        return self._zip.read(name).decode()

    @cached_property
    def operators(self) -> dict[str, list[str]]:
        """Schemas of the operators that its library registers, by name without overload."""
        library = self._zip.read("torch_npu/lib/libtorch_npu.so")
        schemas: dict[str, list[str]] = {}
        for match in re.finditer(rb"(?<=\0)([A-Za-z_]\w*)(?:\.\w+)?\([ -~]*\) -> [ -~]+(?=\0)", library):
            schemas.setdefault(match[1].decode(), []).append(match[0].decode())
        return schemas

    def module(self, name: str) -> ast.Module | None:
        """Source of a dotted module; None if there is none."""
        if name not in self._parsed:
            path = name.replace(".", "/")
            file = next((f for f in (f"{path}/__init__.py", f"{path}.py") if f in self._names), None)
            self._parsed[name] = ast.parse(self._zip.read(file)) if file else None
        return self._parsed[name]

    def find(self, dotted: str, seen: set[str] | None = None) -> Found | None:
        """What `dotted` names, such as `torch_npu.npu.set_device`; None if nothing."""
        if self.module(dotted) is not None:
            return Found("module")
        module, _, name = dotted.rpartition(".")
        if self.module(module) is None:
            return None
        found = self._in_module(module, name, set() if seen is None else seen)
        if found is None and module == "torch_npu" and name in self.operators:
            return Found("operator", _of_schema(self.operators[name][0]))
        return found

    def _in_module(self, module: str, name: str, seen: set[str]) -> Found | None:
        if f"{module}.{name}" in seen or self.module(module) is None:
            return None
        seen.add(f"{module}.{name}")  # their modules import each other in circles
        found = None
        for statement in _top_level(self.module(module).body):
            found = self._of_statement(statement, module, name, seen) or found
        return found

    def _of_statement(self, statement: ast.stmt, module: str, name: str, seen: set[str]) -> Found | None:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name == name:
            return self._of_definition(statement)
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            is_it = any(isinstance(t, ast.Name) and t.id == name for t in targets)
            return Found("value") if is_it else None
        if isinstance(statement, ast.ImportFrom):
            source = self._absolute(statement, module)
            for alias in statement.names:
                if alias.name == "*" and not name.startswith("_"):
                    return self._in_module(source, name, seen) if source.split(".")[0] == "torch_npu" else None
                if (alias.asname or alias.name) == name:
                    # What comes from elsewhere (torch, typing) is not theirs to check.
                    is_theirs = source.split(".")[0] == "torch_npu"
                    return self.find(f"{source}.{alias.name}", seen) if is_theirs else Found("value")
        return None

    def _absolute(self, statement: ast.ImportFrom, module: str) -> str:
        if not statement.level:
            return statement.module
        is_package = f"{module.replace('.', '/')}/__init__.py" in self._names
        parts = module.split(".")
        base = parts[: len(parts) - statement.level + is_package]
        return ".".join([*base, *([statement.module] if statement.module else [])])

    def _of_definition(self, node: ast.FunctionDef | ast.ClassDef) -> Found:
        if isinstance(node, ast.FunctionDef):
            return Found("function", _of_arguments(node.args))
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        return Found("class", _of_arguments(init.args, skips_first=True) if init else None)


def _top_level(body: list[ast.stmt]):
    """Statements that run when a module is imported, those under if and try included."""
    for statement in body:
        yield statement
        for part in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(statement, ast.If | ast.Try | ast.With):
                for inner in getattr(statement, part, []):
                    yield from _top_level(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def _of_arguments(arguments: ast.arguments, skips_first: bool = False) -> inspect.Signature:
    P = inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    found = []
    for at, argument in enumerate(plain):
        kind = P.POSITIONAL_ONLY if at < len(arguments.posonlyargs) else P.POSITIONAL_OR_KEYWORD
        found.append(P(argument.arg, kind, default=P.empty if at < required else None))
    found = found[1:] if skips_first else found
    if arguments.vararg:
        found.append(P(arguments.vararg.arg, P.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(P(argument.arg, P.KEYWORD_ONLY, default=P.empty if default is None else None))
    if arguments.kwarg:
        found.append(P(arguments.kwarg.arg, P.VAR_KEYWORD))
    return inspect.Signature(found)


def _of_schema(schema: str) -> inspect.Signature:
    P = inspect.Parameter
    found = []
    for argument in torch._C.parse_schema(schema).arguments:
        kind = P.KEYWORD_ONLY if argument.kwarg_only else P.POSITIONAL_OR_KEYWORD
        default = argument.default_value if argument.has_default_value() else P.empty
        found.append(P(argument.name, kind, default=default))
    return inspect.Signature(found)
