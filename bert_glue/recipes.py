"""`--recipe`: the settings of a task by name, from `configs/<recipe>/<task>.json`; docs/recipes.md has the sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bert_glue.config_file import CONFIG_SUFFIXES
from bert_glue.errors import UsageError, did_you_mean
from bert_glue.tasks import TASKS, get_task

_ROOM = Path(__file__).resolve().parent
# In a checkout beside the package, installed within it.
FOLDER = next((f for f in (_ROOM.parent / "configs", _ROOM / "configs") if (f / "stable").is_dir()), _ROOM / "configs")


def recipe_names() -> list[str]:
    """Recipes that come with the program."""
    return sorted(path.name for path in FOLDER.glob("*") if any(file.stem in TASKS for file in path.glob("*.json")))


def recipe_file(recipe: str, task_name: str | None) -> str:
    """The config file that `--recipe` means.

    Args:
        recipe: a name of `recipe_names`, or the path of a config file.
        task_name: whose settings are asked for.

    Raises:
        UsageError: no such recipe or task, or a named recipe without a task.
    """
    if recipe.lower().endswith(CONFIG_SUFFIXES):
        return recipe
    if recipe not in recipe_names():
        raise UsageError(f"--recipe: {did_you_mean('recipe', recipe, recipe_names())}, or a .json or .yaml file")
    if task_name is None:
        raise UsageError(f"--recipe {recipe} needs --task_name: settings differ by task")
    task = get_task(task_name).name
    known = sorted(path.stem for path in (FOLDER / recipe).glob("*.json"))
    if task not in known:
        raise UsageError(f"--recipe {recipe}: there is none for task {task}. Tasks: {', '.join(known)}")
    return str(FOLDER / recipe / f"{task}.json")


def without_effect_of(names: Iterable[str], chosen: Mapping[str, Any]) -> tuple[set[str], list[str]]:
    """Settings of a recipe that what the user chose leaves no room for.

    Args:
        names: that the recipe sets.
        chosen: what the user set, `recipe` among it.

    Returns:
        Those to leave out: fp16 beside `--bf16`; with `--sample` the rate and epochs of a named recipe, which
        are for GLUE and teach generated rows nothing. And lines about them.
    """
    from bert_glue.sample import SAMPLE_RECIPE

    unused = {"fp16", "loss_scale"} if chosen.get("bf16") else set()
    for_glue: set[str] = set()
    if chosen.get("sample") and chosen["recipe"] in recipe_names():
        for_glue = SAMPLE_RECIPE.keys() & set(names) - chosen.keys()
    lines = [f"--recipe {chosen['recipe']}: its {' and '.join(sorted(for_glue))} are for GLUE, not for --sample"]
    return unused | for_glue, lines if for_glue else []
