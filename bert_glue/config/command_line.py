"""The command lines of all commands but `run_glue.py`: argparse, with the suggestions and errors of `parser`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from bert_glue.config.arguments import FLAGS
from bert_glue.config.suggestions import suggested_flag, suggested_option
from bert_glue.config.values import is_placeholder, placeholder_problem, shown
from bert_glue.errors import UsageError, exit_code_of

_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # a value, as argparse has it


class CommandParser(argparse.ArgumentParser):
    """argparse without abbreviations: an unknown flag gets the suggestion of what it means, as in `run_glue.py`.

    Every error is printed as `error: ...` lines and ends the process with exit code 2.

    Args:
        same: flag of `run_glue.py` -> what is the same in this command, where it has another name: an option, or the
            name of an argument without a flag.
        passes_on: the command takes flags of `run_glue.py` behind `--`.
        settings: of `argparse.ArgumentParser`.
    """

    def __init__(self, *, same: Mapping[str, str] | None = None, passes_on: bool = False, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        self.same, self.passes_on = same or {}, passes_on

    def add_problem_type(self) -> None:
        """`--problem_type`, of the commands that read a finished model."""
        self.add_argument(
            "--problem_type",
            choices=FLAGS["problem_type"].choices,
            help="problem type of a model whose config.json has none; default: one label per row, or a score",
        )

    def parse_args(self, args: list[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:  # type: ignore[override]
        """The options of `args`; all unknown flags are one error, and so are all placeholders of a template."""
        words = [self._respelt(word) for word in args]
        if not {"-h", "--help"} & set(words):
            self._refuse([self._unknown(word) for word in words if self._is_unknown(word)])
        options = super().parse_args(words, namespace)
        self._refuse([self._placeholder(action, text) for action in self._actions for text in _texts(action, options)])
        return options

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with code 2."""

        def refuse() -> int:
            raise UsageError(message)

        raise SystemExit(exit_code_of(refuse))

    def _refuse(self, problems: list[str]) -> None:
        if found := [problem for problem in problems if problem]:
            self.error("\n".join(found))

    def _respelt(self, word: str) -> str:
        """A flag with its dashes as underscores, where the command has that one: --output-dir."""
        name, equals, value = word.partition("=")
        known = "--" + name[2:].replace("-", "_")
        return known + equals + value if name.startswith("--") and known in self._option_string_actions else word

    def _is_unknown(self, word: str) -> bool:
        name = word.partition("=")[0]
        is_flag = name.startswith("-") and name not in ("-", "--") and " " not in name
        return is_flag and not _NEGATIVE_NUMBER.fullmatch(word) and name not in self._option_string_actions

    def _unknown(self, word: str) -> str:
        written = word.partition("=")[0]
        if not written.startswith("--"):
            return f"unexpected {shown(written)}: flags begin with --"
        name = written[2:].replace("-", "_")
        options = [known[2:] for known in self._option_string_actions if known.startswith("--")]
        meant, elsewhere = suggested_option(name, options, self.same), suggested_flag(name)
        hint = "--help lists all flags."
        if meant:
            hint = f"Did you mean --{meant}?" if meant in options else f"{meant} is given without a flag."
        elif elsewhere in FLAGS:
            place = "; such flags go behind --." if self.passes_on else ", not of this command."
            hint = f"--{elsewhere} is a flag of run_glue.py{place}"
        return f"{shown(written)[1:-1]}: unknown flag. {hint}"

    @staticmethod
    def _placeholder(action: argparse.Action, text: str) -> str:
        flag = FLAGS.get(action.dest)
        if (flag and (flag.many or flag.verbatim)) or not is_placeholder(text):
            return ""
        name = action.option_strings[0] if action.option_strings else action.metavar
        return f"{name}: {placeholder_problem(shown(text), action.help)}"


def _texts(action: argparse.Action, options: argparse.Namespace) -> list[str]:
    """The values of an argument, as text."""
    value = getattr(options, action.dest, None)
    values = value if isinstance(value, list) else [value]
    return [str(one) for one in values if one is not None and not isinstance(one, bool | int | float | list)]
