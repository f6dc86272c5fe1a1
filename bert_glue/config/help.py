"""The text of --help: the flags that most people use, all of them, one group, or one flag.

The text of a flag is in `arguments`; here is only which flags are common and how the lines are laid out.
"""

from __future__ import annotations

import textwrap

from bert_glue.config.arguments import FLAGS, Flag
from bert_glue.config.suggestions import suggested_flag
from bert_glue.errors import UsageError, did_you_mean
from bert_glue.tasks import TASKS

# The flags of --help without a topic, in the order of FLAGS.
COMMON = frozenset((
    "model_name_or_path", "lora_rank",
    "task_name", "data_path", "sample", "dataset_name", "train_file", "validation_file", "test_file",
    "text_column_names", "label_column_name", "validation_split_percentage", "max_seq_length",
    "do_train", "do_eval", "do_predict", "output_dir", "recipe", "seed", "resume_from_checkpoint", "report_to",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs", "warmup_steps",
    "eval_strategy", "load_best_model_at_end", "early_stopping_patience",
    "fp16", "bf16", "device",
))  # fmt: skip
EVERYTHING = "all"
_KIND_NAMES = {"int": "INT", "float": "NUMBER", "str": "TEXT"}
_LEFT = 34  # columns; a longer flag gets its own line
_NO_BREAK = "\u00a0"  # a space inside a range
_INTRODUCTION = """\
Fine-tune, evaluate and predict GLUE tasks and your own data with BERT-family encoders.

usage: python run_glue.py [settings.json|settings.yaml] [--flag value | --flag=value | --no_flag] ...
"""
_CONFIG = "A config file has flags as keys. Flags after it override it. The value `none` leaves a flag unset."
_OWN = {
    "--help, -h [TOPIC]": "the common flags; TOPIC: all, a group or a flag",
    "--version": "print the version",
    "--print_config": "print all settings as a config file and run nothing",
}


def topics() -> dict[str, str]:
    """The name of each group on the command line, its first word -> its title."""
    return {title.split()[0].lower(): title for title in dict.fromkeys(flag.group for flag in FLAGS.values())}


def help_text(topic: str, columns: int) -> str:
    """The text of `--help TOPIC`, at most `columns` wide (at least 48, for the longest flag).

    Args:
        topic: "" for the common flags, "all", a key of `topics`, or the name of a flag.

    Raises:
        UsageError: there is no such topic.
    """
    width = max(48, min(columns, 120))
    shown = _flags_on(topic)
    if len(shown) == 1:
        return "\n".join(_entry(_usage(shown[0]), _description(shown[0]), width))
    lines: list[str] = []
    if topic in ("", EVERYTHING):
        lines += [textwrap.fill(part, width) for part in (*_INTRODUCTION.splitlines(), _CONFIG, "")]
        lines += [line for name, text in _OWN.items() for line in _entry(name, text, width)]
    group = ""
    for flag in shown:
        if flag.group != group:
            group = flag.group
            lines += ["", group] if lines else [group]
        lines += _entry(_usage(flag), _description(flag), width)
    if topic in ("", EVERYTHING):
        lines += ["", *_wrapped(f"Tasks: {', '.join(TASKS)}", "", width)]
    if not topic:
        more = f"{len(FLAGS) - len(shown)} more flags: --help all, or --help GROUP with one of: {', '.join(topics())}"
        lines += _wrapped(more, "", width)
    return "\n".join(lines)


def _flags_on(topic: str) -> list[Flag]:
    """The flags that the help on a topic shows."""
    if not topic:
        return [flag for flag in FLAGS.values() if flag.name in COMMON]
    name = topic.lower().lstrip("-").replace("-", "_")
    if name == EVERYTHING:
        return [*FLAGS.values()]
    if title := topics().get(name.split()[0] if name.strip() else ""):
        return [flag for flag in FLAGS.values() if flag.group == title]
    if found := FLAGS.get(name) or FLAGS.get(suggested_flag(name)):
        return [found]
    raise UsageError(f"--help: {did_you_mean('topic', topic, [EVERYTHING, *topics()])}, or the name of a flag")


def _usage(flag: Flag) -> str:
    if flag.kind == "bool":
        return f"--[no_]{flag.name}"
    return f"--{flag.name} {_KIND_NAMES[flag.kind]}"


def _description(flag: Flag) -> str:
    parts = [" | ".join(flag.choices)] if flag.choices else []
    if flag.range:
        parts.append(flag.range.replace(" ", _NO_BREAK))
    if flag.default is not None:
        shown = str(flag.default).lower() if flag.kind == "bool" else flag.default
        parts.append(f"default {shown}")
    return f"{flag.text} ({'; '.join(parts)})" if parts else flag.text


def _wrapped(text: str, indent: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _entry(usage: str, text: str, width: int) -> list[str]:
    """One flag, beside its description if the terminal is wide enough, else above it."""
    if width < 80:
        return [f"  {usage}", *_wrapped(text, " " * 6, width)]
    described = _wrapped(text, " " * _LEFT, width)
    head = f"  {usage}"
    if len(head) > _LEFT - 2:
        return [head, *described]
    return [head.ljust(_LEFT) + described[0].lstrip(), *described[1:]]
