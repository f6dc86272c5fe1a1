"""Turns argv into `Arguments`, with every problem in one error. Imports no torch.

It does not use argparse, which stops at the first problem, or transformers.HfArgumentParser, whose import takes
a second. Grammar: [config.json|config.yaml] (--flag [value] | --flag=value | --no_flag)...
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass, field
from typing import Any

from bert_glue import __version__
from bert_glue.config.arguments import FLAGS, Arguments, Flag
from bert_glue.config.checks import find_problems
from bert_glue.config.files import CONFIG_SUFFIXES, Entry, read_config, recipe_file, value_text, without_effect_of
from bert_glue.config.help import help_text
from bert_glue.config.legacy import LEGACY_FLAGS, LEGACY_VALUES, Legacy, switches_off
from bert_glue.config.resolve import resolve
from bert_glue.config.suggestions import suggested_flag
from bert_glue.config.values import flag_value, shown
from bert_glue.errors import UsageError, print_lines


def parse(argv: list[str]) -> Arguments:
    """The settings of a command line, `sys.argv[1:]`. Reads only the config file and the recipe.

    Returns:
        Resolved settings. `notices` are lines to print about renamed flags and flags without effect.

    Raises:
        UsageError: all problems, one per line, each with the flag, its value and the accepted values.
    """
    settings = _Settings()
    leading, flags = _split(argv)
    if leading:
        settings.read_leading_words(leading)
    for words in [words for written, words in flags if _flag_name(written) == "repeat"][-1:]:
        settings.read_run(words[:1], leading)
    for written, words in flags:
        settings.read_flag(written, words)
    if settings.values.get("recipe"):
        settings.read_recipe()
    settings.notices += [
        f"{origin} is ignored in a file, because it lets a model run code; "
        f"to trust this model, give --{name} on the command line"
        for name, origin in settings.untrusted.items()
        if not settings.values.get(name)
    ]
    args = Arguments(**settings.values, notices=tuple(settings.notices))
    for problem in find_problems(args):
        if not settings.reported.intersection(problem.flags):
            settings.problems.append(problem.text)
    if settings.problems:
        raise UsageError("\n".join(settings.problems))
    return resolve(args, frozenset(settings.values))


def main_parse(argv: list[str]) -> Arguments | None:
    """`parse`, or None after printing the output of --help, --version or --print_config.

    Raises:
        UsageError: see `parse`; or there is no help on what follows --help.
    """
    asked = {_flag_name(word) for word in argv if word.startswith("--")}
    if "-h" in argv or "help" in asked:
        print(help_text(_help_topic(argv), shutil.get_terminal_size().columns))
    elif "version" in asked:
        print(__version__)
    elif "print_config" in asked:
        rest = [word for word in argv if not (word.startswith("--") and _flag_name(word) == "print_config")]
        args = parse(rest)
        print_lines(*args.notices, file=sys.stderr)
        print(json.dumps(as_config(args), indent=2))
    else:
        return parse(argv)
    return None


def _help_topic(argv: list[str]) -> str:
    """What follows --help or -h: a group, a flag or `all`; "" if nothing does."""
    _, flags = _split(["--help" if word == "-h" else word for word in argv])
    return next((words[0] for written, words in flags if _flag_name(written) == "help" and words), "")


def as_config(args: Arguments) -> dict[str, Any]:
    """Every flag and its value, for a config file; secrets are null."""
    return {name: None if flag.secret else getattr(args, name) for name, flag in FLAGS.items()}


def _flag_name(word: str) -> str:
    return word[2:].partition("=")[0].replace("-", "_")


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The words before the first flag, and each flag as written, with the words after it."""
    before: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and word != "--":
            name, equals, value = word.partition("=")
            flags.append((name, [value] if equals else []))
        else:
            (flags[-1][1] if flags else before).append(word)
    return before, flags


def _find(name: str) -> tuple[Flag | Legacy | None, str, bool]:
    """The flag of a name, the name without `no_`, and whether it had `no_`."""
    known: dict[str, Flag | Legacy] = {**LEGACY_FLAGS, **FLAGS}
    if name in known:
        return known[name], name, False
    base = name.removeprefix("no_")
    found = known.get(base)
    is_switch = isinstance(found, Legacy) or (found is not None and found.kind == "bool")
    return (found, base, True) if base != name and is_switch else (None, name, False)


def _word_limits(found: Flag | Legacy, is_negated: bool) -> tuple[int, int]:
    """The smallest and the largest number of words that `found` takes."""
    if is_negated:
        return 0, 0
    if isinstance(found, Legacy):
        is_renamed = found.flag is not None and found.value is str
        return _word_limits(FLAGS[found.flag], False) if is_renamed else (0, found.most_words)
    return int(found.kind != "bool"), 1000 if found.many else 1


def _unknown(origin: str, name: str) -> tuple[str, str]:
    """The problem for an unknown flag, and the flag that was probably meant ("" if none)."""
    meant = suggested_flag(name)
    hint = f"Did you mean --{meant}?" if meant else "--help all lists all flags."
    return f"{origin}: unknown flag. {hint}", meant


def _stray(word: str, origin: str = "") -> str:
    if word.lower().endswith(CONFIG_SUFFIXES):
        return f"unexpected {shown(word)}: only one config file is accepted, before all flags"
    after = f" after {origin}" if origin else ""
    return f"unexpected {shown(word)}{after}: flags begin with --"


@dataclass
class _Settings:
    """What has been read so far.

    `given` are the flags of the source being read. `reported` are the flags with a problem. `untrusted` are flags that
    a file sets although only the command line may set them, with their place.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)
    untrusted: dict[str, str] = field(default_factory=dict)
    in_config: bool = False

    def read_leading_words(self, words: list[str]) -> None:
        """Takes what is before the first flag: at most one config file, which flags override."""
        is_config = words[0].lower().endswith(CONFIG_SUFFIXES)
        self.problems += [_stray(word) for word in words[int(is_config) :]]
        if not is_config:
            return
        try:
            entries = read_config(words[0])
        except UsageError as error:
            self.problems.append(str(error))
            self.reported.update(FLAGS)  # the content of the file is unknown, so report no flag as missing
            return
        self._read_entries(entries)

    def read_run(self, words: list[str], leading: list[str]) -> None:
        """Takes the settings of the run whose run.json is given by --repeat; flags override them."""
        from bert_glue.config.repeat import read_run, settings_of

        if leading:
            self.problems.append(f"{shown(leading[0])} and --repeat are two sets of settings; give only one")
            return
        if not words:
            return  # read_flag reports the missing value
        try:
            settings = settings_of(read_run(words[0]))
        except UsageError as error:
            self.problems.append(str(error))
            self.reported.update(FLAGS)
            return
        self._read_entries([Entry(words[0], name, value) for name, value in settings.items()])

    def _read_entries(self, entries: list[Entry]) -> None:
        self.in_config = True
        for entry in entries:
            self._read_entry(entry)
        self.in_config = False
        self.given.clear()

    def read_recipe(self) -> None:
        """Takes the settings of `--recipe`, which the command line and its config file override."""
        recipe, chosen = _Settings(in_config=True), self.values
        try:
            for entry in read_config(recipe_file(chosen["recipe"], chosen.get("task_name"))):
                recipe._read_entry(entry)
        except UsageError as error:
            self._report(str(error), "recipe")
            self.reported.add("task_name")  # an unknown task is reported as the same error
        unused, notice = without_effect_of(recipe.values.keys(), chosen)
        self.values = {**{name: value for name, value in recipe.values.items() if name not in unused}, **chosen}
        self.problems += recipe.problems
        self.notices += recipe.notices + notice
        self.reported |= recipe.reported

    def _read_entry(self, entry: Entry) -> None:
        key = entry.key if entry.key.isidentifier() and entry.key.isprintable() else shown(entry.key)
        # Escaped as in repr but not shortened, because a shortened path would lose the line number.
        origin = f"{repr(entry.where)[1:-1]}: {key}"
        try:
            text = value_text(entry)
        except ValueError as error:
            self._report(f"{origin}: {error}", entry.key)
            return
        if text is not None:
            self._apply(origin, entry.key, text)
        elif entry.key in FLAGS:
            self._set(origin, entry.key, None)
        elif entry.key not in LEGACY_FLAGS:  # an old flag without a value requests nothing
            self._report_unknown(origin, entry.key)

    def read_flag(self, written: str, words: list[str]) -> None:
        """Takes one flag and the words up to the next flag."""
        found, name, is_negated = _find(_flag_name(written))
        if found is None:
            # Its words may be its values, so they are not reported as well.
            self._report_unknown(shown(written)[1:-1], name)
            return
        least, most = _word_limits(found, is_negated)
        if least == 0 and words and re.match("-[a-zA-Z]", words[0]):
            most = 0  # `--do_train -fp16`: a flag with one dash, not a value of the switch
        for word in words[most:]:
            self._report(_stray(word, written))
        if len(words) < least:
            self._report(f"{written} needs a value: {found.text if isinstance(found, Flag) else ''}", name)
            return
        taken = words[:most] or ["false" if is_negated else "true"]
        self._apply(written, name, ",".join(taken))

    def _apply(self, origin: str, name: str, text: str) -> None:
        """Converts the text of a current or old flag and keeps the value."""
        if name in LEGACY_FLAGS:
            self._apply_legacy(origin, LEGACY_FLAGS[name], text)
        elif name in FLAGS:
            try:
                self._set(origin, name, flag_value(FLAGS[name], LEGACY_VALUES.get((name, text), text)))
            except ValueError as error:
                self._report(f"{origin}: {error}", name)
        else:
            self._report_unknown(origin, name)

    def _apply_legacy(self, origin: str, legacy: Legacy, text: str) -> None:
        if legacy.refused and not switches_off(text):
            self._report(f"{origin}: refused: {legacy.reason}")
            return
        if legacy.flag is None:
            reason = "this is always off here" if legacy.refused else legacy.reason
            self.notices.append(f"{origin} has no effect: {reason}")
            return
        try:
            new_text = legacy.value(text)
        except ValueError as error:
            self._report(f"{origin}: {error}", legacy.flag)
            return
        reason = f" ({legacy.reason})" if legacy.reason else ""
        if new_text is None:
            self.notices.append(f"{origin} {shown(text)} has no effect{reason}")
            return
        # A secret's value stays out of the log.
        value = "" if FLAGS[legacy.flag].secret else f" {shown(new_text)[1:-1]}"
        self.notices.append(f"{origin} is now --{legacy.flag}{value}{reason}")
        self._apply(origin, legacy.flag, new_text)

    def _set(self, origin: str, name: str, value: Any) -> None:
        if self.in_config and FLAGS[name].runs_code and value:
            self.untrusted[name] = origin
            return
        if name in self.given and self.in_config:
            self._report(f"{origin}: --{name} is given twice", name)
        elif name in self.given:
            self.notices.append(f"{origin}: --{name} is given twice; the last value counts")
        self.given.add(name)
        self.values[name] = value

    def _report(self, problem: str, name: str = "") -> None:
        self.problems.append(problem)
        self.reported.add(name)

    def _report_unknown(self, origin: str, name: str) -> None:
        problem, nearest = _unknown(origin, name)
        legacy = LEGACY_FLAGS.get(nearest)
        self._report(problem, (legacy.flag if legacy else nearest) or "")
