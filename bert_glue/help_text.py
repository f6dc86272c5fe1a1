"""The text of --help: all flags by group, fitted to the terminal."""

from __future__ import annotations

import textwrap

from bert_glue.arguments import FLAGS, Flag
from bert_glue.tasks import TASKS

_KIND_NAMES = {"int": "INT", "float": "NUMBER", "str": "TEXT"}
_LEFT = 34  # columns; a longer flag gets a line of its own
_INTRODUCTION = """\
Fine-tune, evaluate and predict GLUE tasks with BERT-family encoders.

usage: python run_glue.py [config.json|config.yaml] [--flag value | --flag=value | --no_flag] ...

A config file holds flags as keys; flags after it override it. `none` leaves a flag open.
"""
_OWN = {
    "--help, -h": "this text",
    "--version": "print the version",
    "--print_config": "print all settings as a config file, run nothing",
}


def help_text(columns: int) -> str:
    """All of --help, at most `columns` wide (but 48 at least, for the longest flag)."""
    width = max(48, min(columns, 120))
    lines = [textwrap.fill(part, width) for part in _INTRODUCTION.splitlines()]
    lines += [line for name, text in _OWN.items() for line in _entry(name, text, width)]
    group = ""
    for flag in FLAGS.values():
        if flag.group != group:
            group = flag.group
            lines += ["", group]
        lines += _entry(_usage(flag), _description(flag), width)
    lines += ["", *_wrapped(f"Tasks: {', '.join(TASKS)}", "", width)]
    return "\n".join(lines)


def _usage(flag: Flag) -> str:
    if flag.kind == "bool":
        return f"--[no_]{flag.name}"
    return f"--{flag.name} {_KIND_NAMES[flag.kind]}"


def _description(flag: Flag) -> str:
    parts = [" | ".join(flag.choices)] if flag.choices else []
    parts += [flag.range] if flag.range else []
    if flag.default is not None:
        shown = str(flag.default).lower() if flag.kind == "bool" else flag.default
        parts.append(f"default {shown}")
    return f"{flag.text} ({'; '.join(parts)})" if parts else flag.text


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


def _entry(usage: str, text: str, width: int) -> list[str]:
    """One flag: beside its description where the terminal is wide enough, else above it."""
    if width < 80:
        return [f"  {usage}", *_wrapped(text, " " * 6, width)]
    described = _wrapped(text, " " * _LEFT, width)
    head = f"  {usage}"
    if len(head) > _LEFT - 2:
        return [head, *described]
    return [head.ljust(_LEFT) + described[0].lstrip(), *described[1:]]
