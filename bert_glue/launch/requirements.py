"""Lists missing packages and versions outside the tested ranges, without importing any package.

    python -m bert_glue.launch.requirements requirements.txt           -> packages that are missing or cannot work
    python -m bert_glue.launch.requirements --specs requirements.txt   -> what pip must install, one spec per line
    python -m bert_glue.launch.requirements --command requirements.txt -> the same as one command

The first form exits with 0 (nothing is missing), 1 (something is missing), or 3 (something is missing, and the
installed torch must stay).

`requirements.txt` is the set that the tests use. Ascend images, conda environments and clusters have their own set,
whose torch matches their driver. Any version in `RANGES` is therefore accepted, a version outside is used with a
warning, and only a version that cannot work is refused. docs/stacks.md lists the measured sets.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bert_glue.devices.npu_versions import installed_version
from bert_glue.errors import MachineError


class Range(NamedTuple):
    """The tested versions of one package, from `oldest` to `newest`, both included.

    A `newest` of one number means the whole series: (5,) is every 5.x. `works_from` is the oldest version that can
    work at all (None if no version is known to fail), and `reason` names what older ones lack.
    """

    oldest: tuple[int, ...]
    newest: tuple[int, ...]
    works_from: tuple[int, ...] | None = None
    reason: str = ""

    def __str__(self) -> str:
        series = ".x" if len(self.newest) == 1 else ""
        return f"{_text(self.oldest)} to {_text(self.newest)}{series}"


# pyproject.toml states the lower ends for pip. A test compares the two.
RANGES = {
    "torch": Range((2, 6), (2, 14), (2, 4), "older ones lack torch.library.custom_op"),
    "transformers": Range((4, 44), (5,)),
    "datasets": Range((3, 0), (5,)),
    "accelerate": Range((1, 0), (1,)),
    "huggingface_hub": Range((0, 26), (2,)),
}
PYTHON = Range((3, 10), (3, 13), (3, 10), "older ones lack syntax that is used here")
STACK = {"python": PYTHON, **RANGES}
TESTED_SET_FROM = (3, 11)  # Python; requirements.txt has no versions for 3.10
SEE = "docs/stacks.md lists what runs"
# Built for one driver or one torch, so never replaced here.
_KEPT = ("torch", "torch_npu")


class Gap(NamedTuple):
    """A package that is missing, or whose version cannot work."""

    name: str
    installed: str | None
    needs: str

    def __str__(self) -> str:
        return f"{self.name} {self.installed} (needs {self.needs})" if self.installed else self.name


def pins(file: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of each `name==version` line. Follows `-r other.txt`, and skips other lines as optional."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from pins(file.parent / line[3:].strip())
        elif match := re.match(r"([\w.-]+)==([\w.+]+)", line):
            yield match[1], match[2]


def gap(name: str) -> Gap | None:
    """The problem with the installed version of a package. None if it can work."""
    installed, known = _version(name), STACK.get(name)
    if installed is None:
        return Gap(name, None, "")
    if known and known.works_from and _numbers(installed)[:2] < known.works_from:
        return Gap(name, installed, f"{_text(known.works_from)}: {known.reason}")
    return None


def gaps(files: list[Path]) -> list[Gap]:
    """Every package of `files`, and Python itself, that is missing or cannot work."""
    named = ("python", *(name for file in files for name, _ in pins(file)))
    return [*filter(None, map(gap, named))]


def _version(name: str) -> str | None:
    """The version of a package or of this Python. None if it is not installed."""
    return _text(sys.version_info[:2]) if name == "python" else installed_version(name)


def refuse_unusable() -> None:
    """Refuses packages that are too old before they are imported, because they would fail with a traceback.

    Raises:
        MachineError: an installed version cannot work.
    """
    for found in filter(None, map(gap, STACK)):
        if found.installed:
            raise MachineError(
                f"{found.name} {found.installed} is too old: this program needs {found.needs}; see docs/stacks.md"
            )


def stack_warnings() -> list[str]:
    """One line for each installed version outside its tested range. The run goes on."""
    return [
        f"{name} {version} is outside the tested range {known}; the run continues"
        for name, known in STACK.items()
        if (version := _version(name)) and not is_tested(version, known)
    ]


def is_tested(version: str, known: Range) -> bool:
    """Whether a version is in the tested range."""
    numbers = _numbers(version)
    return known.oldest <= numbers[:2] and numbers[: len(known.newest)] <= known.newest


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def specs(files: list[Path]) -> list[str]:
    """The specs that pip must install so that nothing is missing. [] if nothing is.

    They name only missing packages, in any version of their range. An installed torch is pinned to its version, so
    that pip does not replace it for the sake of a new package.

    Raises:
        MachineError: Python or the installed torch is too old, and these are never replaced here.
    """
    missing = gaps(files)
    kept = _kept()
    for found in missing:
        if found.name in kept or found.name == "python":
            raise MachineError(f"{found}: use an environment with a newer version", SEE)
    return [_spec(found.name) for found in missing] + [f"{name}=={kept[name]}" for name in kept if missing]


def _kept() -> dict[str, str]:
    """The versions of the installed packages that are never replaced."""
    return {name: version for name in _KEPT if (version := installed_version(name))}


def _spec(name: str) -> str:
    return f"{name}>={_text(RANGES[name].oldest)}" if name in RANGES else name


def command(files: list[Path]) -> str:
    """One command that installs what is missing, for a message. Without a torch it installs the tested set.

    Raises:
        MachineError: as in `specs`.
    """
    wanted = specs(files)
    if not _kept() and sys.version_info >= TESTED_SET_FROM:
        wanted = [word for file in files for word in ("-r", str(file))]
    return shlex.join([sys.executable, "-m", "pip", "install", *wanted])


def main(argv: list[str]) -> int:
    """Prints what is missing, or what to install.

    Args:
        argv: the requirements files, and `--specs`, `--command` or neither.

    Returns:
        The exit code: 0 if nothing is missing or the remedy was printed, 1 if something is missing, 3 if something is
        missing and the installed torch must stay, 4 if there is no remedy.
    """
    files = [Path(name) for name in argv if not name.startswith("--")]
    try:
        if "--specs" in argv:
            print(*specs(files), sep="\n")
            return 0
        if "--command" in argv:
            print(command(files))
            return 0
    except MachineError as error:
        print(error)
        return error.exit_code
    missing = gaps(files)
    if not missing:
        return 0
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    print(", ".join(map(str, missing[:4])) + more)
    return 3 if _kept() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
