"""Saves and restores everything that a run needs to continue bit for bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bert_glue.config.arguments import FLAGS
from bert_glue.devices.rng import random_tensors, set_random_tensors
from bert_glue.errors import CheckpointError
from bert_glue.storage import checkpoint, files
from bert_glue.storage.files import STATE_FILE
from bert_glue.storage.identity import Fact, differences, flag_facts, with_current_keys
from bert_glue.training.checkpoint_contents import check_scale, read_randoms, read_state, read_tensors
from bert_glue.training.class_weights import named
from bert_glue.training.state import Learner, TrainState


def whole_weights(state: TrainState) -> dict[str, torch.Tensor]:
    """The final weights, as `LoadedModel.tensors`: fp32 masters if they exist, and the whole embedding table."""
    learner = state.learner
    with learner.averaged():
        tensors = learner.model.tensors(learner.precision.named_masters())
        if learner.narrowed is not None:
            table = learner.model.words_name
            tensors[table] = learner.narrowed.expand(tensors[table])
    return tensors


def say_if_gone(state: TrainState) -> None:
    """Tells the user that the output folder has disappeared. The next save creates it again."""
    if not state.output_dir.is_dir():
        state.observers.log.line(
            f"note: --output_dir {state.output_dir} was deleted or moved while the run was writing there: "
            "it is created again, without the earlier checkpoints and without a lock against a second run"
        )


def save_checkpoint(state: TrainState) -> None:
    """Copy the run's state to host memory and let a thread write `checkpoint-<step>` from it.

    The same thread then deletes what `save_total_limit` no longer keeps.

    Raises:
        CheckpointError: the previous checkpoint cannot be written; earlier ones are untouched.
    """
    randoms = state.ranks.all_gather_object(random_tensors(state.ranks.device))
    state.checkpoints.saved_step = state.progress.step
    if not state.ranks.is_first:
        return
    state.checkpoints.saver.wait()  # one copy in host memory at a time
    say_if_gone(state)
    weights = whole_weights(state)
    optimizer = _optimizer_tensors(state)
    progress = json.dumps(_state(state))
    folder = state.output_dir / f"checkpoint-{state.progress.step}"
    best = state.output_dir / f"checkpoint-{state.progress.best_step}"

    def write(into: Path) -> None:
        state.learner.model.save(into, weights)
        save_file(optimizer, into / "optimizer.safetensors")
        for rank, tensors in enumerate(randoms):
            save_file(tensors, into / f"random-{rank}.safetensors")
        (into / STATE_FILE).write_text(progress, encoding="utf-8")

    def job() -> None:
        size = sum(t.numel() * t.element_size() for t in (*weights.values(), *optimizer.values()))
        checkpoint.publish(folder, write, size + len(progress) + (1 << 20))
        checkpoint.keep_newest(state.output_dir, state.args.save_total_limit, best.name, folder)

    state.checkpoints.saver.start(job)


def _state(state: TrainState) -> dict:
    """trainer_state.json: progress, loss scale, the facts that a resume must share and those that may change."""
    learner = state.learner
    return {
        **asdict(state.progress),
        "loss_scale": learner.precision.scale_state(),
        "group_steps": [group.get("step") for group in learner.optimizer.param_groups],
        "narrowed_decay": learner.narrowed.decay if learner.narrowed else 1.0,
        "average_row_decay": learner.average.row_decay if learner.average else None,
        "same": {**_must_be_same(state), **_data(state)},
        "settings": _may_change(state),
    }


_SAME = (
    Fact("model_shapes", "model"),
    Fact("frozen_weights_sha256", "weights that are not trained (--model_name_or_path)"),
    *flag_facts(("lora_alpha", "lora_dropout")),
    Fact("adapted_layers", "adapted layers (--lora_target_modules)"),
    Fact("optimizer", "optimizer"),
    *flag_facts(("amp_backend", "layerwise_lr_decay")),
    Fact("training_rows", "training rows"),
    Fact("samples_per_step", "samples a step (batch size x ranks x --gradient_accumulation_steps)"),
    *flag_facts(("seed",)),
    Fact("order_seed", "seed of the order (--data_seed)", "seed of the order"),
    Fact("epoch_multiple_of", "samples an epoch is cut to a multiple of (--dataloader_drop_last)"),
    Fact("is_grouped_by_length", "grouping by length (--train_sampling_strategy)", "grouping by length"),
    Fact("words_sha256", "data (words in use; --do_eval, --do_predict and --max_*_samples count)"),
)


# Checkpoints of earlier versions have none of these.
_DATA = (
    Fact("class_names", "class names"),
    Fact("training_tokens_sha256", "training texts (or --max_seq_length, --doc_stride or tokenizer)"),
    Fact("training_labels_sha256", "training labels"),
)


def _data(state: TrainState) -> dict[str, object]:
    """The rows that are trained on: the values of `_DATA`."""
    split, tokens = state.data.split, hashlib.sha256()
    for array in (split.table.ids, split.table.offsets, split.table.types, split.table.first):
        if array is not None:
            tokens.update(np.ascontiguousarray(array).data)
    return {
        "class_names": list(state.task.labels),
        "training_tokens_sha256": tokens.hexdigest(),
        "training_labels_sha256": hashlib.sha256(np.ascontiguousarray(split.labels).data).hexdigest(),
    }


def _check_data(state: TrainState, folder: Path, stored: dict[str, object]) -> str:
    """A line on training data that is not the checkpoint's, where `--allow_changed_data` accepts it; "" if it is.

    Raises:
        CheckpointError: it is not, and the flag is not given.
    """
    then = with_current_keys(_DATA, stored)
    now = {name: value for name, value in _data(state).items() if name in then}
    other = differences(_DATA, then, now)
    if other and not state.args.allow_changed_data:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: it was made with other data, {other}; give the same data, or "
            "--allow_changed_data to train on with this"
        )
    return f"resumed with other data than the checkpoint's: {other}" if other else ""


def _must_be_same(state: TrainState) -> dict[str, object]:
    """The facts that a resumed run must share with the first one: the values of `_SAME`."""
    learner, sampler = state.learner, state.data.sampler
    words = learner.narrowed.rows.numpy().tobytes() if learner.narrowed else b""
    shapes: dict[str, list[int]] = {}
    for group in learner.precision.groups:
        shapes |= {name: list(shape) for name, shape in zip(group.names, group.shapes, strict=True)}
    if learner.narrowed:
        shapes.pop("words.weight")
    frozen = learner.model.frozen_hash
    return {
        "model_shapes": shapes,
        **({"frozen_weights_sha256": frozen} if frozen else {}),
        **(learner.model.adapter.settings if learner.model.adapter else {}),
        "optimizer": type(learner.optimizer).__name__,
        "amp_backend": learner.precision.plan.backend,
        "layerwise_lr_decay": state.args.layerwise_lr_decay,
        "training_rows": sampler.rows,
        "samples_per_step": sampler.step_size,
        "seed": state.args.seed,
        "order_seed": sampler.seed,
        "epoch_multiple_of": sampler.unit,
        "is_grouped_by_length": sampler.lengths is not None,
        "words_sha256": hashlib.sha256(words).hexdigest(),
    }


_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "ema_decay", "rdrop_alpha", "fgm_epsilon", "label_smoothing_factor", "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "per_device_train_batch_size", "gradient_accumulation_steps", "eval_strategy", "eval_steps",
    "metric_name", "metric_for_best_model", "greater_is_better", "early_stopping_patience", "early_stopping_threshold",
    "torch_compile_backend", "torch_compile_mode", "cuda_graph", "tf32",
)  # fmt: skip


_LONGEST_SETTING = 100  # characters


_MAY_CHANGE = (
    *flag_facts(_SETTINGS),
    Fact("class_weights", "--class_weights"),
    Fact("total_steps", "steps in all"),
    Fact("world_size", "ranks"),
    Fact("precision", "precision"),
    Fact("device", "device"),
    Fact("product_library", "library of fp32 products"),
)


def _may_change(state: TrainState) -> dict[str, object]:
    """The values of `_MAY_CHANGE`: where one differs, a resumed run gives another result than one left alone."""
    return {
        **{name: getattr(state.args, name) for name in _SETTINGS},
        "class_weights": named(state.task, state.data.class_weights),
        "total_steps": state.data.total_steps,
        "world_size": state.ranks.world_size,
        "precision": state.learner.precision.plan.name,
        "device": state.ranks.device.name,
        "product_library": state.ranks.device.product_library,
    }


def _optimizer_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Flat buffers and the optimizer's tensors, on the host."""
    learner = state.learner
    tensors = {f"parameters.{n}": m.detach().cpu().clone() for n, m in enumerate(learner.precision.masters)}
    for number, of_parameter in learner.optimizer.state_dict()["state"].items():
        for name, value in of_parameter.items():
            value = value if torch.is_tensor(value) else torch.tensor(value)
            tensors[f"state.{number}.{name}"] = value.detach().cpu().contiguous().clone()
    return tensors | (learner.average.tensors() if learner.average else {})


def choose(state: TrainState, wanted: str) -> tuple[Path | None, list[str], str]:
    """The checkpoint that `--resume_from_checkpoint` means, for one rank to find and all to use.

    Returns:
        Its folder, or None for a new start; lines for the log; and why it cannot be used, "" if it can.
    """
    with files.plain_errors(state.output_dir):
        checkpoint.finish_interrupted(state.output_dir)
    if wanted.lower() not in ("auto", "true"):
        reason = checkpoint.verify(Path(wanted))
        return Path(wanted), [], f"--resume_from_checkpoint {wanted}: {reason}" if reason else ""
    folder, rejected = checkpoint.newest_sound(state.output_dir)
    if folder is None:
        rejected.append(f"there is no valid checkpoint in {state.output_dir}: training starts from the beginning")
    return folder, rejected, ""


def resume(state: TrainState, folder: Path) -> list[str]:
    """Continue from a checkpoint that verifies, bit for bit if nothing was changed.

    Returns:
        Lines on what was changed.

    Raises:
        CheckpointError: it belongs to other data, another model or other batch sizes, or another program wrote it.
    """
    try:
        return _resume(state, folder)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"--resume_from_checkpoint {folder}: not what this program writes ({type(error).__name__}: {error})"
        ) from error


def _resume(state: TrainState, folder: Path) -> list[str]:
    stored = read_state(folder)
    other = differences(_SAME, with_current_keys(_SAME, stored["same"]), _must_be_same(state))
    if other:
        raise CheckpointError(f"--resume_from_checkpoint {folder}: it was made with another {other}")
    other_data = _check_data(state, folder, stored["same"])
    # A flag that came after the checkpoint had its default.
    defaults = {name: FLAGS[name].default for name in (*_SETTINGS, "class_weights")}
    now = _may_change(state)
    # Checkpoints of earlier versions do not name the library.
    defaults["product_library"] = now["product_library"]
    then = defaults | with_current_keys(_MAY_CHANGE, stored["settings"])
    learner = state.learner
    tensors = read_tensors(state, folder)
    _load_optimizer(learner, tensors)
    for group, step in zip(learner.optimizer.param_groups, stored["group_steps"], strict=True):
        if step is not None:  # apex's FusedAdam counts steps there
            group["step"] = step
    if then["precision"] == now["precision"]:
        check_scale(stored["loss_scale"], learner.precision.scale_state())
        learner.precision.load_scale_state(stored["loss_scale"])
    if learner.narrowed:
        learner.narrowed.decay = stored["narrowed_decay"]
    if learner.average and then["ema_decay"]:
        learner.average.load(tensors, stored["average_row_decay"])
    elif learner.average:
        learner.average.restart()
    state.progress.restore(stored)
    state.checkpoints.saved_step = state.progress.step
    # Of a rank there was not: its generators stay as --seed set them.
    randoms = folder / f"random-{state.ranks.rank}.safetensors"
    if randoms.is_file():
        set_random_tensors(read_randoms(state, randoms), state.ranks.device)
    changes = [
        f"{f.label} {_cut(now[f.key])} (was {_cut(then[f.key])})" for f in _MAY_CHANGE if then[f.key] != now[f.key]
    ]
    if other_data:
        state.progress.changes.append(f"after step {state.progress.step}: {other_data}")
    if not changes:
        return [other_data] if other_data else []
    state.progress.changes.append(f"after step {state.progress.step}: {', '.join(changes)}")
    told = f"resumed with other settings, so not bit for bit: {', '.join(changes)}"
    return [told, other_data] if other_data else [told]


def _cut(value: object) -> str:
    """A setting for a line: the weights of a thousand classes are not read."""
    text = str(value)
    return text if len(text) <= _LONGEST_SETTING else f"{text[:_LONGEST_SETTING]}..."


@torch.no_grad()
def _load_optimizer(learner: Learner, tensors: dict[str, torch.Tensor]) -> None:
    learner.precision.load_masters([tensors[f"parameters.{n}"] for n in range(len(learner.precision.masters))])
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, number, *rest = name.split(".", 2)
        if kind == "state":
            if value.dim() == 0 and not value.is_floating_point():
                value = value.item()  # a count that was a python number: torch_npu's fused AdamW, Adafactor
            states.setdefault(int(number), {})[rest[0]] = value
    learner.optimizer.load_state_dict({**learner.optimizer.state_dict(), "state": states})
