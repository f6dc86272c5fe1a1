"""Finds by itself every name of torch_npu and torch.npu that Python sources use, and how it is called."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Use:
    """One use of a name of torch_npu.

    Args:
        where: file:line.
        name: dotted, `torch.npu` spelt `torch_npu.npu`.
        call: the call, if it is called.
    """

    where: str
    name: str
    call: ast.Call | None = None


class Sources:
    """Several files read together: functions that give out torch_npu or its parts are known in all of them."""

    def __init__(self, files: dict[str, str]):
        self.trees = {name: ast.parse(text) for name, text in files.items()}
        self.providers: dict[str, str] = {}  # function -> what it returns
        before = None
        while before != self.providers:
            before = dict(self.providers)
            for tree in self.trees.values():
                for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
                    self._learn(function)

    @classmethod
    def of_folder(cls, folder: Path) -> Sources:
        return cls({str(file.relative_to(folder.parent)): file.read_text() for file in sorted(folder.rglob("*.py"))})

    def _learn(self, function: ast.FunctionDef) -> None:
        names = self._names(function)
        for statement in ast.walk(function):
            if isinstance(statement, ast.Return) and statement.value is not None:
                value = statement.value
                for part in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                    if path := self.path(part, names):
                        self.providers[function.name] = path

    def _names(self, tree: ast.AST) -> dict[str, str]:
        """Source text of variables and attributes that hold torch_npu or a part of it."""
        names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "torch_npu":
                        names[alias.asname or "torch_npu"] = alias.name if alias.asname else "torch_npu"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_npu":
                names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts, strict=True))
                    for left, right in pairs:
                        if path := self.path(right, names):
                            names[ast.unparse(left)] = path
        return names

    def path(self, node: ast.AST, names: dict[str, str]) -> str | None:
        """The dotted name of torch_npu that an expression is; None for any other expression."""
        if isinstance(node, ast.Name | ast.Attribute) and (known := names.get(ast.unparse(node))):
            return known
        if isinstance(node, ast.Attribute):
            if ast.unparse(node) == "torch.npu":
                return "torch_npu.npu"
            base = self.path(node.value, names)
            return f"{base}.{node.attr}" if base else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in self.providers:
                return self.providers[node.func.id]
            if node.func.id == "getattr":
                owner, attribute = node.args[:2]
                if ast.unparse(owner) == "torch" and not isinstance(attribute, ast.Constant):
                    return "torch_npu.npu"  # getattr(torch, kind)
        return None

    def uses(self) -> Iterator[Use]:
        """Every use, once a place."""
        for file, tree in self.trees.items():
            names = self._names(tree)
            inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
            for node in ast.walk(tree):
                where = f"{file}:{getattr(node, 'lineno', 0)}"
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_npu":
                    yield from (Use(where, f"{node.module}.{alias.name}") for alias in node.names)
                elif isinstance(node, ast.Name | ast.Attribute) and id(node) not in inner:
                    path = self.path(node, names)
                    if path and "." in path and isinstance(getattr(node, "ctx", None), ast.Load):
                        yield Use(where, path, calls.get(id(node)))
                elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                    base = self.path(node.args[0], names)
                    attribute = node.args[1]
                    if base and isinstance(attribute, ast.Constant) and len(node.args) == 2:
                        yield Use(where, f"{base}.{attribute.value}")
