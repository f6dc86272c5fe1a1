"""Which pinned requirements the python that runs this lacks; a look at metadata, nothing is imported.

    python -m bert_glue.doctor.requirements requirements.txt [requirements/dev.txt]

Prints what is missing and exits with 0 (nothing), 1 (something) or 3 (something, in an environment that
has torch_npu: it must not be exchanged for one without).

A compatible version is enough, because NPU and conda environments pin their own: torch from 2.6 (the
first with every operator we call), transformers, datasets and accelerate of the pinned minor version
(their interfaces change between minors), anything else in any version.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from bert_glue.devices.npu_versions import installed_version

_SAME_MINOR = {"transformers", "datasets", "accelerate"}
_AT_LEAST = {"torch": (2, 6)}
_PYTHON = (3, 11)


def pins(file: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of each `name==version` line; `-r other.txt` is followed, other lines are optional."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from pins(file.parent / line[3:].strip())
        elif match := re.match(r"([\w.-]+)==([\w.+]+)", line):
            yield match[1], match[2]


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def problem(name: str, pinned: str) -> str | None:
    """What is wrong with the installed version of a package, e.g. "torch 2.1.0 (needs 2.6)"; None if fine."""
    installed = installed_version(name)
    if installed is None:
        return name
    if name in _SAME_MINOR and _minor(installed) != _minor(pinned):
        return f"{name} {installed} (needs {'.'.join(map(str, _minor(pinned)))})"
    least = _AT_LEAST.get(name)
    if least and _minor(installed) < least:
        return f"{name} {installed} (needs {'.'.join(map(str, least))})"
    return None


def lacking(files: list[Path]) -> list[str]:
    """Every problem of this python with the pins in `files`."""
    if sys.version_info < _PYTHON:
        return [f"python {sys.version_info[0]}.{sys.version_info[1]} (needs 3.11)"]
    found = (problem(name, pinned) for file in files for name, pinned in pins(file))
    return [text for text in found if text]


def main(argv: list[str]) -> int:
    """Print what this python lacks.

    Args:
        argv: requirements files.

    Returns:
        0 if nothing is missing, 1 if something is, 3 if the environment has torch_npu besides.
    """
    missing = lacking([Path(name) for name in argv])
    if not missing:
        return 0
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    print(", ".join(missing[:4]) + more)
    return 3 if installed_version("torch_npu") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
