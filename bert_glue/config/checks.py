"""Checks of combinations of flags, with every problem in one error."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bert_glue.config.arguments import FLAGS, Arguments
from bert_glue.config.data_checks import WORK, data_problems, named_task, task_problems
from bert_glue.config.metric_checks import expectation_problems, metric_problems
from bert_glue.config.values import is_hub_name, read_number, read_steps, shown
from bert_glue.errors import Problem

STEPS_OR_SHARE = ("logging_steps", "eval_steps", "save_steps")


def find_problems(args: Arguments) -> list[Problem]:
    """All conflicts between flags, in the order of the help. Reads no file."""
    checks = (_required, data_problems, task_problems, _padding, _batch, _schedule, _evaluation)
    checks += (metric_problems, expectation_problems)
    checks += (technique_problems, _precision, compiled_problems, recorded_problems, _trackers, _profile)
    checks += (tokenizer_problems, trained_problems, weight_problems, calibration_problems, upload_problems)
    return [problem for check in checks for problem in check(args)]


def _required(args: Arguments) -> Iterator[Problem]:
    if not args.model_name_or_path and not args.sample:
        yield Problem(
            ("model_name_or_path", "sample"),
            "--model_name_or_path is required: give a folder or a hub name (only --sample makes its own model)",
        )
    if not args.output_dir:
        yield Problem(("output_dir",), "--output_dir is required: give the folder for model and results")
    if not any(getattr(args, work) for work in WORK):
        yield Problem(WORK, "nothing to do: give one or more of --do_train, --do_eval, --do_predict")


def _padding(args: Arguments) -> Iterator[Problem]:
    if args.pad_to_max_length and args.padding not in ("auto", "max_length"):
        yield Problem(
            ("pad_to_max_length", "padding"),
            f"--pad_to_max_length contradicts --padding {args.padding}; give only one",
        )


def _batch(args: Arguments) -> Iterator[Problem]:
    if args.global_batch_size is not None and args.gradient_accumulation_steps != 1:
        yield Problem(
            ("global_batch_size", "gradient_accumulation_steps"),
            f"--global_batch_size {args.global_batch_size} sets the accumulation itself;"
            f" leave out --gradient_accumulation_steps {args.gradient_accumulation_steps}",
        )


def _schedule(args: Arguments) -> Iterator[Problem]:
    for name in STEPS_OR_SHARE:
        value = getattr(args, name)
        if value is not None and value > 1 and not float(value).is_integer():
            yield Problem(
                (name,),
                f"--{name} {value}: a value above 1 must be a whole number; below 1 it is a fraction of all steps",
            )
    if args.warmup_steps >= 1 and not float(args.warmup_steps).is_integer():
        yield Problem(
            ("warmup_steps",),
            f"--warmup_steps {args.warmup_steps}: a value above 1 must be a whole number;"
            " below 1 it is a fraction of all steps",
        )


def _is_multiple(whole: float, part: float) -> bool:
    """Whether `whole` steps are a multiple of `part` steps, both as numbers or both as fractions."""
    times = whole / part
    return (whole < 1) == (part < 1) and abs(times - round(times)) < 1e-6 * times and round(times) > 0


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
            f"--load_best_model_at_end needs both strategies to be steps or both to be epoch, not {strategies}",
        )
    elif args.eval_strategy == "steps" and not _is_multiple(args.save_steps, args.eval_steps or args.logging_steps):
        # The best model must have been evaluated when it was saved.
        yield Problem(
            ("load_best_model_at_end", "save_steps", "eval_steps", "logging_steps"),
            f"--load_best_model_at_end: --save_steps {args.save_steps} must be a multiple of"
            f" --eval_steps {args.eval_steps or args.logging_steps}",
        )


def _precision(args: Arguments) -> Iterator[Problem]:
    if args.fp16 and args.bf16:
        yield Problem(("fp16", "bf16"), "--fp16 and --bf16 are two precisions; give only one")
    if args.bf16 and args.amp_backend == "apex":
        yield Problem(
            ("bf16", "amp_backend"),
            "--amp_backend apex does not support --bf16; give --fp16, or leave out --amp_backend apex",
        )
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
        yield Problem(
            ("profile_steps", "do_train"), "--profile_steps needs --do_train, because it traces training steps"
        )
    elif 0 < args.max_steps < first:
        yield Problem(
            ("profile_steps", "max_steps"),
            f"--profile_steps {args.profile_steps}: --max_steps {args.max_steps} ends the run before that",
        )


def _trackers(args: Arguments) -> Iterator[Problem]:
    chosen = re.split(",", args.report_to or "")
    if "none" in chosen and len(chosen) > 1:
        yield Problem(("report_to",), f"--report_to {args.report_to}: none cannot be combined with a tracker")


_COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def compiled_problems(args: Arguments) -> Iterator[Problem]:
    """Flags that cannot be combined with `--torch_compile`."""
    if args.torch_compile_mode and args.torch_compile_backend not in (None, "inductor"):
        text = (
            f"--torch_compile_mode {args.torch_compile_mode} belongs to inductor, not to {args.torch_compile_backend}"
        )
        yield Problem(("torch_compile_mode", "torch_compile_backend"), f"{text}; give only one")
    if args.amp_backend == "apex":
        for name in _COMPILE:
            if getattr(args, name):
                yield Problem((name, "amp_backend"), f"--{name} works only with --amp_backend native")


def recording_conflicts(args: Arguments) -> dict[str, str]:
    """The flags in use that a recorded step cannot have, with the reason."""
    reasons = {
        "gradient_checkpointing": "it reads the generator's state on the host during a pass",
        "fgm_epsilon": "it needs lengths on the host during a pass",
    }
    found = {name: reason for name, reason in reasons.items() if getattr(args, name)}
    if args.doc_stride is not None and args.doc_stride >= 0:
        found["doc_stride"] = "each batch has another number of windows"
    if args.amp_backend == "apex":
        found["amp_backend"] = "only the native levels are recorded"
    return found


def recorded_problems(args: Arguments) -> Iterator[Problem]:
    """Flags that cannot be combined with `--cuda_graph`."""
    if not args.cuda_graph:
        return
    for name, reason in recording_conflicts(args).items():
        given = f"--{name}" if getattr(args, name) is True else f"--{name} {getattr(args, name)}"
        yield Problem((name, "cuda_graph"), f"--cuda_graph with {given}: {reason}; give only one")


# Each is off at its default.
_TECHNIQUES = ("layerwise_lr_decay", "reinit_layers", "ema_decay", "rdrop_alpha", "fgm_epsilon")


def techniques_in_use(args: Arguments) -> list[str]:
    """The techniques that are switched on."""
    return [name for name in _TECHNIQUES if getattr(args, name) != FLAGS[name].default]


def technique_problems(args: Arguments) -> Iterator[Problem]:
    """Techniques that cannot be combined."""
    names = techniques_in_use(args)
    if {"rdrop_alpha", "fgm_epsilon"} <= set(names):
        text = "--rdrop_alpha and --fgm_epsilon both run each batch twice; give only one"
        yield Problem(("rdrop_alpha", "fgm_epsilon"), text)
    partly = "freeze_encoder" if args.freeze_encoder else None
    if args.lora_rank is not None:
        partly = "lora_rank"
    for name in names:
        if partly and name in ("reinit_layers", "fgm_epsilon", "layerwise_lr_decay"):
            text = f"--{name} is for training the whole model, but --{partly} trains a part of it; give only one"
            yield Problem((name, partly), text)
        if args.amp_backend == "apex" and name in ("layerwise_lr_decay", "ema_decay", "fgm_epsilon"):
            yield Problem((name, "amp_backend"), f"--{name} works only with --amp_backend native")
        if name == "reinit_layers" and not args.do_train:
            yield Problem(
                ("reinit_layers", "do_train"), "--reinit_layers needs --do_train, because new layers must be trained"
            )


def tokenizer_problems(args: Arguments) -> Iterator[Problem]:
    """`--use_fast_tokenizer`: transformers 5 no longer has two tokenizers for one model."""
    if not args.use_fast_tokenizer:
        yield Problem(
            ("use_fast_tokenizer",),
            "--use_fast_tokenizer False: transformers 5 has only one tokenizer for each model, in Rust or in Python, "
            "and it is used here; leave the flag out",
        )


def trained_problems(args: Arguments) -> Iterator[Problem]:
    """Flags that choose the weights to train."""
    for name in ("lora_rank", "freeze_encoder"):
        if getattr(args, name) and not args.do_train:
            yield Problem(
                (name, "do_train"), f"--{name} needs --do_train; in a saved model the adapters are already merged"
            )
    if args.lora_rank is not None and args.freeze_encoder:
        yield Problem(
            ("lora_rank", "freeze_encoder"),
            "--freeze_encoder trains only the head, but --lora_rank also trains adapters; give only one",
        )
    for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
        if args.lora_rank is None and getattr(args, name):
            yield Problem((name, "lora_rank"), f"--{name} needs --lora_rank")


def weight_problems(args: Arguments) -> Iterator[Problem]:
    """Problems with `--class_weights` for tasks without classes. For own data this is checked after reading it."""
    task = named_task(args)
    if args.class_weights and (args.do_regression or (task and task.is_regression)):
        yield Problem(
            ("class_weights", "do_regression", "task_name"),
            f"--class_weights {shown(args.class_weights)}: a regression has no classes; leave the flag out",
        )


def calibration_problems(args: Arguments) -> Iterator[Problem]:
    """Problems with `--calibrate`: missing flags, and a threshold that is also given as a flag."""
    if not args.calibrate:
        return
    task = named_task(args)
    if not args.do_train or not (args.do_eval or args.eval_strategy != "no"):
        yield Problem(
            ("calibrate", "do_train", "do_eval"),
            "--calibrate needs --do_train and --do_eval: it is chosen for new weights, on the validation split",
        )
    if args.do_regression or (task and task.is_regression):
        yield Problem(
            ("calibrate", "do_regression", "task_name"), "--calibrate: scores of a regression have no probabilities"
        )
    if args.label_threshold is not None:
        yield Problem(
            ("calibrate", "label_threshold"), "--calibrate chooses the threshold, --label_threshold gives it: give one"
        )


def upload_problems(args: Arguments) -> Iterator[Problem]:
    """Flags of an upload to the hub."""
    if args.push_to_hub and not args.do_train:
        yield Problem(
            ("push_to_hub", "do_train"), "--push_to_hub needs --do_train, because it uploads the trained model"
        )
    if args.push_to_hub and args.hub != "huggingface":
        yield Problem(("push_to_hub", "hub"), f"--push_to_hub uploads to Hugging Face's hub, not to --hub {args.hub}")
    if args.hub_model_id and not is_hub_name(args.hub_model_id):
        yield Problem(("hub_model_id",), f"--hub_model_id {shown(args.hub_model_id)} is not NAME or OWNER/NAME")
