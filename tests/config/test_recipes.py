"""Recipes: every file parses, agrees with the task table, and gives way to flags."""

from __future__ import annotations

import json

import pytest

from bert_glue.config.arguments import Arguments
from bert_glue.config.files import FOLDER, recipe_names
from bert_glue.config.metric_checks import metric_names
from bert_glue.config.parser import parse
from bert_glue.errors import UsageError
from bert_glue.tasks import TASKS, TRAINABLE

NEEDED = ["--model_name_or_path", "m", "--output_dir", "o", "--do_train"]


def settings(recipe: str, task: str, *flags: str) -> Arguments:
    return parse([*NEEDED, "--task_name", task, "--recipe", recipe, *flags])


@pytest.mark.parametrize("recipe", ["reference", "reference_8p", "stable"])
@pytest.mark.parametrize("task", TRAINABLE)
def test_every_recipe_of_every_task_is_what_its_file_says(recipe, task):
    written = json.loads((FOLDER / recipe / f"{task}.json").read_text())
    args = settings(recipe, task)
    assert {name: getattr(args, name) for name in written} == written
    default = Arguments()
    same = [name for name in written if written[name] == getattr(default, name)]
    assert set(same) <= {
        "max_seq_length",
        "lr_scheduler_type",
        "num_train_epochs",
        "loss_scale",
    }  # stated although default
    assert not args.notices


@pytest.mark.parametrize("task", TRAINABLE)
def test_the_reference_is_as_published(task):
    one, eight = settings("reference", task), settings("reference_8p", task)
    assert one.num_train_epochs == TASKS[task].published[1].epochs
    assert eight.num_train_epochs == TASKS[task].published[3].epochs
    for args in (one, eight):
        assert (args.per_device_train_batch_size, args.learning_rate, args.max_seq_length) == (32, 2e-5, 128)
        assert (args.fp16, args.fp16_opt_level, args.loss_scale) == (True, "O2", "1024.0")
        assert args.dataloader_drop_last and args.warmup_steps == 0
    assert (one.skip_steps, eight.skip_steps) == (0, 5)


@pytest.mark.parametrize("task", TRAINABLE)
def test_the_stable_recipe_warms_up_and_keeps_the_best(task):
    args = settings("stable", task)
    assert args.warmup_steps == 0.1 and args.load_best_model_at_end
    assert args.metric_for_best_model in metric_names(TASKS[task])
    assert args.metric_for_best_model == TASKS[task].headline


def test_flags_and_config_files_override_a_recipe(tmp_path):
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"learning_rate": 1e-5, "seed": 3}))
    args = parse([str(config), *NEEDED, "--task_name", "rte", "--recipe", "stable", "--num_train_epochs", "2"])
    assert (args.learning_rate, args.seed, args.num_train_epochs) == (1e-5, 3, 2.0)
    assert args.warmup_steps == 0.1  # the recipe's


def test_a_recipe_may_be_a_file(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("learning_rate: 3e-5\n")
    assert settings(str(own), "rte").learning_rate == 3e-5


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--task_name", "rte", "--recipe", "stabel"], "Did you mean stable? Choices: reference, reference_8p, stable"),
        (["--train_file", "a.csv", "--recipe", "stable"], "--recipe stable needs --task_name"),
        (["--task_name", "rte", "--recipe", "absent.json"], "absent.json"),
        (["--task_name", "rtee", "--recipe", "stable"], "unknown task 'rtee'"),
    ],
)
def test_a_wrong_recipe_is_one_line(flags, line):
    with pytest.raises(UsageError, match=line.replace("?", r"\?")) as error:
        parse([*NEEDED, *flags])
    assert len(str(error.value).splitlines()) == 1


def test_a_wrong_key_of_a_recipe_names_the_file(tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"lerning_rate": 1}')
    with pytest.raises(UsageError, match=r"own\.json: lerning_rate: unknown flag\. Did you mean --learning_rate"):
        settings(str(own), "rte")


def test_recipes_are_found_by_folder():
    assert {"reference", "reference_8p", "stable"} <= set(recipe_names())
