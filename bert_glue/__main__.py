"""`bert-glue COMMAND ...`, the installed command for `python -m bert_glue.<module>` and run_glue.py.

Each command is imported when it is called, so help and usage errors stay fast.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from bert_glue import __version__
from bert_glue.errors import UsageError, did_you_mean, exit_code_of, run_program


class Command(NamedTuple):
    """One command.

    Args:
        module: has `main(argv) -> exit code`.
        before: flags to put before the user's.
    """

    module: str
    text: str
    before: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("run_glue", "fine-tune: run_glue.py with --do_train", ("--do_train",)),
    "eval": Command("run_glue", "evaluate: run_glue.py with --do_eval", ("--do_eval",)),
    "predict": Command("bert_glue.predict.__main__", "label a file or a stream"),
    "sweep": Command("bert_glue.sweep.__main__", "train tasks x seeds, one run per device"),
    "submit": Command("bert_glue.submission", "make the leaderboard's archive from finished runs"),
    "soup": Command("bert_glue.soup", "make one model with the mean of several runs' weights"),
    "check": Command("bert_glue.check", "compare finished runs with a baseline, or make a baseline of them"),
    "report": Command("bert_glue.report.__main__", "write report.html for one run or for many"),
    "export": Command("bert_glue.export", "export ONNX, with the command for an Ascend OM model"),
    "doctor": Command("bert_glue.doctor.__main__", "show what this machine can run and what to fix"),
}


# Another name -> the command: the module of `submit` is bert_glue.submission.
ALIASES = {"submission": "submit"}


def usage() -> str:
    """The text of `bert-glue --help`."""
    also = {command: f" (also: {name})" for name, command in ALIASES.items()}
    lines = [f"  {name:<9}{command.text}{also.get(name, '')}" for name, command in COMMANDS.items()]
    last = "For completion in bash: source <(bert-glue completion)"
    return "\n".join(["usage: bert-glue COMMAND ...   (COMMAND --help lists its flags)", "", *lines, "", last])


def completion() -> str:
    """The completion script for bash: `source <(bert-glue completion)`. The flags come from run_glue.py's own list."""
    from bert_glue.config.arguments import FLAGS

    flags = " ".join(f"--{name}" for name in FLAGS)
    return (
        "_bert_glue() {\n"
        '  local word=${COMP_WORDS[COMP_CWORD]} words=""\n'
        f'  if ((COMP_CWORD == 1)); then words="{" ".join((*COMMANDS, *ALIASES))}"\n'
        f'  elif [[ ${{COMP_WORDS[1]}} == train || ${{COMP_WORDS[1]}} == eval ]]; then words="{flags}"; fi\n'
        '  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")\n'
        "}\n"
        "complete -o default -F _bert_glue bert-glue"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit code of the command; 2 if the command does not exist."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ""
    if name in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name in ("--version", "completion"):
        print(__version__ if name == "--version" else completion())
        return 0
    command = COMMANDS.get(ALIASES.get(name, name))
    if command is None:

        def refuse() -> int:
            raise UsageError(did_you_mean("command", name, [*COMMANDS, *ALIASES]))

        return exit_code_of(refuse)
    run: Callable[[list[str]], int] = import_module(command.module).main
    return run([*_config_first(argv[1:], command.before)])


def _config_first(argv: list[str], before: tuple[str, ...]) -> list[str]:
    """The user's words with our flags added. A config file must stay first."""
    from bert_glue.config.files import CONFIG_SUFFIXES

    has_config = bool(before and argv and argv[0].lower().endswith(CONFIG_SUFFIXES))
    return [*argv[:has_config], *before, *argv[has_config:]]


def program() -> None:
    """The installed command."""
    run_program(main)


if __name__ == "__main__":
    program()
