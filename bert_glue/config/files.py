"""Flags from files: .json and .yaml config files, and the recipes of `--recipe`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import FLAGS
from bert_glue.config.values import shown
from bert_glue.errors import UsageError, did_you_mean
from bert_glue.storage.files import read_plain_text
from bert_glue.tasks import TASKS, get_task

# One setting for all nine tasks, at batch 32 with linear decay. Worst of seeds 1-3 on validation: mrpc F1 0.90,
# stsb Spearman 0.91, rte accuracy 0.86, cola Matthews 0.95, qqp F1 0.96, others >= 0.99; 8-31 s of CPU each.
# At 1e-3, mrpc with 4000 rows stayed at the majority class for one of three seeds.
SAMPLE_RECIPE = {"learning_rate": 5e-4, "num_train_epochs": 10.0}
_LARGEST_CONFIG, _MOST_KEYS = 256 << 10, 1000  # bytes; YAML of that size takes up to six seconds
CONFIG_SUFFIXES = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Entry:
    """One key of a config file; `where` is file and line where the format knows it."""

    where: str
    key: str
    value: Any


def read_config(path: str) -> list[Entry]:
    """All keys of a config file, in order, including repeated ones.

    Raises:
        UsageError: the file cannot be read, or it is not an object of flags.
    """
    try:
        text = read_plain_text(Path(path), _LARGEST_CONFIG, "utf-8-sig")
        entries = _read_json(path, text) if path.endswith(".json") else _read_yaml(path, text)
        if len(entries) > _MOST_KEYS:
            raise ValueError(f"{len(entries)} keys, where there are {len(FLAGS)} flags")
        return entries
    except OSError as error:
        raise UsageError(f"config file {shown(path)}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        # Not UTF-8, NUL in the name, broken syntax, a number of 5,000 digits, nesting without end.
        raise UsageError(f"config file {shown(path)}: {' '.join(str(error).split())}") from None


def value_text(entry: Entry) -> str | None:
    """The value as it would be typed after the flag; None for null.

    Raises:
        ValueError: the value has the wrong type for the flag, e.g. a text instead of a number.
    """
    value, flag = entry.value, FLAGS.get(entry.key)
    if value is None:
        if flag is not None and not flag.optional:
            raise ValueError(f"null is not {_a(flag.kind)}")
        return None
    if isinstance(value, list) and flag is not None and flag.many and all(isinstance(v, str) for v in value):
        return ",".join(value)
    if isinstance(value, (list, dict)) or (flag is not None and not _fits(value, flag.kind)):
        found = json.dumps(value) if not isinstance(value, str) else value
        raise ValueError(f"{shown(found)} is not {_a(flag.kind) if flag else 'a single value'}")
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _a(kind: str) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}[kind]


def _fits(value: Any, kind: str) -> bool:
    if isinstance(value, YamlText):
        return True
    if isinstance(value, bool):
        return kind == "bool"
    # `device: 0` and `loss_scale: 1024.0` are texts that look like numbers.
    return kind == "str" or not isinstance(value, str)


class _Object(list):
    """The pairs of a JSON object. A dict would silently lose the first value of a key that is given twice."""


class YamlText(str):
    """A scalar as written in the file; YAML itself would read `no` as false and 2e-5 as a text."""


def _read_json(path: str, text: str) -> list[Entry]:
    document = json.loads(text, object_pairs_hook=_Object)
    if not isinstance(document, _Object):
        raise ValueError('not an object of flags, such as {"learning_rate": 2e-5}')
    return [Entry(path, key, value) for key, value in document]


def _read_yaml(path: str, text: str) -> list[Entry]:
    import yaml  # comes with transformers; its import takes 60 ms, so only for YAML files

    try:
        # The file is composed but never constructed, so no tag in it can create an object.
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(error) from None
    if document is None:
        return []
    if not isinstance(document, yaml.MappingNode):
        raise ValueError("not a mapping of flags, such as learning_rate: 2e-5")
    return [
        Entry(f"{path}:{key.start_mark.line + 1}", str(key.value), _yaml_value(node)) for key, node in document.value
    ]


def _yaml_value(node: Any) -> Any:
    if isinstance(node.value, list):
        # One level only: nested anchors could grow without limit.
        return [YamlText(item.value) if _is_scalar(item) else None for item in node.value]
    is_null = node.tag == "tag:yaml.org,2002:null"
    return None if is_null else YamlText(node.value)


def _is_scalar(item: Any) -> bool:
    return isinstance(getattr(item, "value", None), str)


_HERE = Path(__file__).resolve().parents[1]
# In a checkout they are beside the package; once installed, inside it.
FOLDER = next((f for f in (_HERE.parent / "configs", _HERE / "configs") if (f / "stable").is_dir()), _HERE / "configs")


def recipe_names() -> list[str]:
    """The recipes that come with the program."""
    return sorted(path.name for path in FOLDER.glob("*") if any(file.stem in TASKS for file in path.glob("*.json")))


def recipe_file(recipe: str, task_name: str | None) -> str:
    """The config file to which `--recipe` refers.

    Args:
        recipe: a name of `recipe_names`, or the path of a config file.
        task_name: the task for which settings are needed.

    Raises:
        UsageError: the recipe or task does not exist, or a named recipe was given without a task.
    """
    if recipe.lower().endswith(CONFIG_SUFFIXES):
        return recipe
    if recipe not in recipe_names():
        raise UsageError(f"--recipe: {did_you_mean('recipe', recipe, recipe_names())}, or a .json or .yaml file")
    if task_name is None:
        raise UsageError(f"--recipe {recipe} needs --task_name, because settings differ by task")
    task = get_task(task_name).name
    known = sorted(path.stem for path in (FOLDER / recipe).glob("*.json"))
    if task not in known:
        raise UsageError(f"--recipe {recipe} has no settings for task {task}. Tasks: {', '.join(known)}")
    return str(FOLDER / recipe / f"{task}.json")


def without_effect_of(names: Iterable[str], chosen: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    """Settings of a recipe that the user's other settings override.

    Args:
        names: flags that the recipe sets.
        chosen: flags that the user set, including `recipe`.

    Returns:
        The settings to leave out, and lines about them: fp16 if `--bf16` is given, and with `--sample` the learning
        rate and epochs of a named recipe, which suit GLUE and not the generated rows.
    """
    unused = {"fp16", "loss_scale"} if chosen.get("bf16") else set()
    for_glue: set[str] = set()
    if chosen.get("sample") and chosen["recipe"] in recipe_names():
        for_glue = SAMPLE_RECIPE.keys() & set(names) - chosen.keys()
    lines = [
        f"--recipe {chosen['recipe']}: its {' and '.join(sorted(for_glue))} are for GLUE and not used with --sample"
    ]
    return unused | for_glue, lines if for_glue else []
