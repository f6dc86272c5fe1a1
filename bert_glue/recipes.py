"""`--recipe`: the settings of a task by name, from `configs/<recipe>/<task>.json`; docs/recipes.md has the sources."""

from __future__ import annotations

from pathlib import Path

from bert_glue.config_file import CONFIG_SUFFIXES
from bert_glue.errors import UsageError, did_you_mean
from bert_glue.tasks import get_task

_ROOM = Path(__file__).resolve().parent
# In a checkout beside the package, installed within it.
FOLDER = next((f for f in (_ROOM.parent / "configs", _ROOM / "configs") if (f / "stable").is_dir()), _ROOM / "configs")


def recipe_names() -> list[str]:
    """Recipes that come with the program."""
    return sorted(path.name for path in FOLDER.glob("*") if any(path.glob("*.json")))


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
