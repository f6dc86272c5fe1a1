"""What one flag alone cannot know: which flags go together, and values that follow from others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePath

from bert_glue import result_keys as keys
from bert_glue.arguments import Arguments
from bert_glue.errors import Problem, UsageError, did_you_mean
from bert_glue.expectations import read_expectations
from bert_glue.flag_values import read_number, read_steps, shown
from bert_glue.step_checks import compiled_problems, recorded_problems
from bert_glue.tasks import GlueTask, get_task, own_task
from bert_glue.technique_checks import technique_problems, techniques_without_effect
from bert_glue.weight_checks import tokenizer_problems, trained_problems, upload_notices, upload_problems

DATA_FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_FILES = ("train_file", "validation_file", "test_file")
_WORK = ("do_train", "do_eval", "do_predict")


def find_problems(args: Arguments) -> list[Problem]:
    """Everything wrong between flags, in the order of the help. Reads no file."""
    checks = (_required, _data, _task, _padding, _batch, _schedule, _evaluation, _metric, _expect)
    checks += (technique_problems, _precision, compiled_problems, recorded_problems, _trackers, _profile)
    checks += (tokenizer_problems, trained_problems, upload_problems)
    return [problem for check in checks for problem in check(args)]


def resolve(args: Arguments, given: frozenset[str]) -> Arguments:
    """`args` with the values that follow from others; expects `find_problems` to be empty.

    Args:
        given: flags set by the user: with `--sample` the tiny BERT's recipe fills in the others.

    The task's name is its row's, `--pad_to_max_length` becomes `padding`, `--eval_strategy` implies
    `--do_eval`, a backend or mode of torch.compile implies `--torch_compile`, `eval_steps` follows
    `logging_steps`, and `metric_for_best_model` loses its `eval_` prefix.
    """
    evaluates = args.eval_strategy != "no"
    compiles = bool(args.torch_compile or args.torch_compile_backend or args.torch_compile_mode)
    by_steps = args.eval_strategy == "steps"
    metric = args.metric_for_best_model
    recipe = {}
    if args.sample and not args.model_name_or_path:
        from bert_glue.sample import SAMPLE_RECIPE

        recipe = {name: value for name, value in SAMPLE_RECIPE.items() if name not in given}
    return replace(
        args,
        **recipe,
        notices=(*args.notices, *_without_effect(args, given), *upload_notices(args)),
        task_name=get_task(args.task_name).name if args.task_name else None,
        torch_compile=compiles,
        torch_compile_backend=(args.torch_compile_backend or "inductor") if compiles else None,
        padding="max_length" if args.pad_to_max_length else args.padding,
        do_eval=args.do_eval or (args.do_train and evaluates),
        eval_steps=args.eval_steps or (args.logging_steps if by_steps else None),
        metric_for_best_model=keys.without_eval(metric) if metric else None,
    )


def _without_effect(args: Arguments, given: frozenset[str]) -> Iterator[str]:
    """Precision flags that this run does not use, one line each."""
    yield from techniques_without_effect(args)
    if args.cuda_graph and not args.do_train:
        yield "--cuda_graph has no effect without --do_train"
    is_low = (args.fp16 or args.bf16) and args.fp16_opt_level != "O0"
    if "fp16_opt_level" in given and not (args.fp16 or args.bf16) and args.fp16_opt_level != "O0":
        yield f"--fp16_opt_level {args.fp16_opt_level} has no effect without --fp16 or --bf16: fp32 is trained"
    if args.loss_scale is not None and not (is_low and args.fp16):
        why = "bf16 has the range of fp32" if is_low else "fp32 needs none"
        yield f"--loss_scale {args.loss_scale} has no effect: {why}"
    if args.amp_backend == "apex" and not (args.fp16 or args.bf16):
        yield "--amp_backend apex has no effect without --fp16: fp32 is trained natively"


def _required(args: Arguments) -> Iterator[Problem]:
    if not args.model_name_or_path and not args.sample:
        yield Problem(
            ("model_name_or_path", "sample"),
            "--model_name_or_path is required: a folder or a hub name (only --sample makes its own model)",
        )
    if not args.output_dir:
        yield Problem(("output_dir",), "--output_dir is required: the folder for model and results")
    if not any(getattr(args, work) for work in _WORK):
        yield Problem(_WORK, "nothing to do: give one or more of --do_train, --do_eval, --do_predict")


def _data(args: Arguments) -> Iterator[Problem]:
    files = [name for name in _FILES if getattr(args, name)]
    origins = [name for name in ("data_path", "sample", "dataset_name") if getattr(args, name)] + files[:1]
    everything = ("task_name", "data_path", "sample", "dataset_name", *_FILES)
    if len(origins) > 1:
        given = " and ".join(f"--{name}" for name in origins)
        yield Problem(tuple(origins), f"{given} are two sources of data: give one")
    elif not origins and not args.task_name:
        yield Problem(
            everything,
            "no data: give --task_name, alone (hub) or with --data_path or --sample,"
            " or --dataset_name, or --train_file, --validation_file and --test_file",
        )
    for name in ("data_path", "sample"):
        if getattr(args, name) and not args.task_name:
            yield Problem((name, "task_name"), f"--{name} needs --task_name: which task is it")
    if args.dataset_name and args.task_name and args.hub == "huggingface":
        yield Problem(("dataset_name", "task_name"), "--dataset_name and --task_name are two data sets: give one")
    if args.dataset_config_name and not args.dataset_name:
        yield Problem(("dataset_config_name", "dataset_name"), "--dataset_config_name needs --dataset_name")
    yield from _files(args, files)


def _files(args: Arguments, files: list[str]) -> Iterator[Problem]:
    for name in files:
        if PurePath(getattr(args, name)).suffix.lower() not in DATA_FILE_SUFFIXES:
            known = ", ".join(DATA_FILE_SUFFIXES)
            yield Problem((name,), f"--{name} {shown(getattr(args, name))}: unknown extension. Choices: {known}")
    for work, name in zip(_WORK, _FILES, strict=True):
        if files and getattr(args, work) and name not in files:
            yield Problem((work, name), f"--{work} needs --{name}, as other files are given")


def _task_of(args: Arguments) -> GlueTask | None:
    """The row of `--task_name`; None for own data and for a name that is no task."""
    try:
        return get_task(args.task_name) if args.task_name else None
    except UsageError:
        return None


def _task(args: Arguments) -> Iterator[Problem]:
    if args.task_name is None:
        return
    try:
        task = get_task(args.task_name)
    except UsageError as error:
        yield Problem(("task_name",), str(error))
        return
    other = f"; use a model of {task.predicted_with}" if task.predicted_with else ""
    if args.do_train and "train" not in task.splits:
        yield Problem(("do_train", "task_name"), f"--do_train: {task.name} has no training data{other}")
    if args.do_eval and not task.evaluation:
        yield Problem(("do_eval", "task_name"), f"--do_eval: {task.name} has no labelled data{other}")


def _padding(args: Arguments) -> Iterator[Problem]:
    if args.pad_to_max_length and args.padding not in ("auto", "max_length"):
        yield Problem(
            ("pad_to_max_length", "padding"),
            f"--pad_to_max_length contradicts --padding {args.padding}: give one",
        )


def _batch(args: Arguments) -> Iterator[Problem]:
    if args.global_batch_size is not None and args.gradient_accumulation_steps != 1:
        yield Problem(
            ("global_batch_size", "gradient_accumulation_steps"),
            f"--global_batch_size {args.global_batch_size} sets the accumulation itself:"
            f" leave --gradient_accumulation_steps {args.gradient_accumulation_steps} out",
        )


def _schedule(args: Arguments) -> Iterator[Problem]:
    if args.warmup_steps >= 1 and not float(args.warmup_steps).is_integer():
        yield Problem(
            ("warmup_steps",),
            f"--warmup_steps {args.warmup_steps}: whole from 1 on; below 1 it is a share of all steps",
        )


def _evaluation(args: Arguments) -> Iterator[Problem]:
    strategies = f"--eval_strategy {args.eval_strategy}, --save_strategy {args.save_strategy}"
    if args.early_stopping_patience and args.eval_strategy == "no":
        yield Problem(
            ("early_stopping_patience", "eval_strategy"),
            f"--early_stopping_patience {args.early_stopping_patience} needs --eval_strategy steps or epoch",
        )
    if not args.load_best_model_at_end:
        return
    if args.eval_strategy == "no" or args.eval_strategy != args.save_strategy:
        yield Problem(
            ("load_best_model_at_end", "eval_strategy", "save_strategy"),
            f"--load_best_model_at_end needs both strategies to be steps, or both epoch; here {strategies}",
        )
    elif args.eval_strategy == "steps" and args.save_steps % (args.eval_steps or args.logging_steps):
        # The best model must have been evaluated when it was saved.
        yield Problem(
            ("load_best_model_at_end", "save_steps", "eval_steps", "logging_steps"),
            f"--load_best_model_at_end: --save_steps {args.save_steps} must be a multiple of"
            f" --eval_steps {args.eval_steps or args.logging_steps}",
        )


def metric_names(task: GlueTask | None) -> list[str]:
    """Names for `--metric_for_best_model`; None stands for own data, whose kind is not known yet."""
    rows = [task] if task else [own_task("own", (), ("0", "1")), own_task("own", (), ())]
    names = [keys.LOSS]
    for row in rows:
        combined = ("combined_score",) if len(row.metrics) > 1 else ()
        suffixes = [split.key_suffix for split in row.evaluation]
        names += [metric + suffix for suffix in suffixes for metric in (*row.metrics, *combined)]
        names += [keys.LOSS + suffix for suffix in suffixes if suffix]
    return list(dict.fromkeys(names))


def _metric(args: Arguments) -> Iterator[Problem]:
    if args.metric_for_best_model is None:
        return
    known, given = metric_names(_task_of(args)), keys.without_eval(args.metric_for_best_model)
    if given not in known:
        yield Problem(
            ("metric_for_best_model", "task_name"),
            f"--metric_for_best_model: {did_you_mean('metric', given, known)}",
        )


def _expect(args: Arguments) -> Iterator[Problem]:
    if args.expect is None:
        return
    task = _task_of(args)
    try:
        bounds = read_expectations(args.expect, task.name if task else None, metric_names(task))
    except ValueError as error:
        yield Problem(("expect", "task_name"), f"--expect: {error}")
        return
    evaluates = args.do_eval or (args.do_train and args.eval_strategy != "no")
    for bound in bounds:
        if keys.is_of_evaluation(bound.key) and not evaluates:
            yield Problem(("expect", "do_eval"), f"--expect {bound.text} needs --do_eval")
        if keys.is_of_training(bound.key) and not args.do_train:
            yield Problem(("expect", "do_train"), f"--expect {bound.text} needs --do_train")


def _precision(args: Arguments) -> Iterator[Problem]:
    if args.fp16 and args.bf16:
        yield Problem(("fp16", "bf16"), "--fp16 and --bf16 are two precisions: give one")
    if args.bf16 and args.amp_backend == "apex":
        yield Problem(("bf16", "amp_backend"), "--amp_backend apex knows no bf16: give --fp16, or leave apex out")
    if args.loss_scale not in (None, "dynamic") and not _is_positive(args.loss_scale):
        yield Problem(("loss_scale",), f"--loss_scale {shown(args.loss_scale)} is not a positive number or dynamic")


def _is_positive(text: str) -> bool:
    try:
        return read_number(text) > 0
    except ValueError:
        return False


def _profile(args: Arguments) -> Iterator[Problem]:
    if args.profile_steps is None:
        return
    try:
        first, _ = read_steps(args.profile_steps)
    except ValueError as error:
        yield Problem(("profile_steps",), f"--profile_steps {error}")
        return
    if not args.do_train:
        yield Problem(("profile_steps", "do_train"), "--profile_steps needs --do_train: training steps are traced")
    elif 0 < args.max_steps < first:
        yield Problem(
            ("profile_steps", "max_steps"),
            f"--profile_steps {args.profile_steps}: --max_steps {args.max_steps} ends before",
        )


def _trackers(args: Arguments) -> Iterator[Problem]:
    chosen = re.split(",", args.report_to or "")
    if "none" in chosen and len(chosen) > 1:
        yield Problem(("report_to",), f"--report_to {args.report_to}: none goes alone")
