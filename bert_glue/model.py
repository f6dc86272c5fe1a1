"""From `--model_name_or_path` to a module that maps batches to logits, and back to a folder.

The folder written works with transformers (`pipeline("text-classification")` included), whichever
path the model was trained on.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from bert_glue.adapters import Adapter, choose_trained, plain_names
from bert_glue.arguments import Arguments
from bert_glue.errors import MachineError, UsageError, first_line
from bert_glue.families import FAMILIES, weight_names, why_not_packed
from bert_glue.layerwise import reinitialise
from bert_glue.model_bounds import check_size
from bert_glue.model_folder import guessed_type, model_folder, read_config
from bert_glue.packed import EncoderShape, PackedClassifier
from bert_glue.tasks import GlueTask
from bert_glue.text_tokens import TextTokenizer
from bert_glue.weights import (
    initialise,
    load_packed,
    packed_tensors,
    read_tensors,
    weight_files,
)


class PaddedClassifier(nn.Module):
    """transformers' own classifier behind the interface of the packed one; its dropout is torch's."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.stock = stock
        # FNet, for one, takes no attention_mask.
        self.accepted = frozenset(inspect.signature(stock.forward).parameters)
        self.compiled: Callable | None = None  # `stock.forward`, where --torch_compile asks for it

    def forward(self, noise=None, **inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, seq_len]` inputs -> logits `[batch, labels]`."""
        # What is neither training nor evaluation looks into the model by hooks, which a compiled one does not call.
        is_usual = self.training or not torch.is_grad_enabled()
        run = self.compiled if self.compiled and is_usual else self.stock
        return run(**{name: value for name, value in inputs.items() if name in self.accepted}).logits


@dataclass
class LoadedModel:
    """A classifier with all that belongs to it.

    Args:
        module: PackedClassifier or PaddedClassifier; called with a batch's inputs.
        tokenizer: of the same folder.
        config: config.json with this task's labels.
        is_packed: which of the two.
        why_padded: reason of a padded run, for the log; "" if packed.
        notes: lines for the log (head started anew, labels reordered).
        files: the weights it was loaded from.
        fresh: weights, such as the head's, that were not in the checkpoint and start at random.
        frozen: parameters that are not trained, as they were loaded, on the host, by name.
        adapter: LoRA, which `module` then holds; None without.
        trained: what is trained, for results.
    """

    module: nn.Module
    tokenizer: TextTokenizer
    config: dict
    is_packed: bool
    why_padded: str = ""
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    adapter: Adapter | None = None
    trained: str = "all"

    @cached_property
    def frozen_hash(self) -> str:
        """SHA-256 of what is not trained; "" if all is."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.frozen.items()):
            found.update(name.encode() + tensor.numpy().tobytes())
        return found.hexdigest() if self.frozen else ""

    @property
    def passes(self) -> int:
        """Times an encoder's forward products are computed in a training step: forward, to inputs, to weights."""
        return 3 if not self.frozen else 1 if self.adapter is None else 2

    @property
    def shape(self) -> EncoderShape | None:
        """Sizes of the encoder and its head; None for a family that cannot be packed."""
        if why_not_packed(self.config) is not None:
            return None
        return FAMILIES[self.config["model_type"]].shape(self.config, len(self.config["id2label"]))

    @property
    def position_limit(self) -> int:
        """Longest sequence the position table allows, tokens."""
        if self.is_packed:
            return self.module.shape.positions - self.module.shape.position_offset
        # RoBERTa and its kin count positions from behind the padding id.
        offsets = (
            part.padding_idx + 1
            for name, part in self.module.named_modules()
            if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None
        )
        return self.config.get("max_position_embeddings", 1 << 30) - next(offsets, 0)

    def tensors(self, masters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Copies of the weights under transformers' names, on the host; an adapter's under peft's beside them.

        Args:
            masters: instead of parameters of the module, by name.
        """
        values = {**self.frozen, **(masters or {})}
        if self.is_packed:
            return packed_tensors(self.module, FAMILIES[self.config["model_type"]], values)
        # By identity: one parameter may be stored under two names.
        owner = {id(p): values[name] for name, p in self.module.named_parameters() if name in values}
        stock = self.module.stock.state_dict(keep_vars=True)
        return plain_names({name: owner.get(id(p), p).detach().cpu().clone() for name, p in stock.items()})

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        if self.is_packed:
            load_packed(self.module, FAMILIES[self.config["model_type"]], tensors, resize_head=False)
        else:
            self.module.stock.load_state_dict(tensors)

    def save(self, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Write config.json, model.safetensors and the tokenizer's files into `folder`; LoRA is merged."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = tensors or self.tensors()
        if self.adapter is not None:
            tensors = self.adapter.merged(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {name: value for name, value in self.config.items() if name != "torch_dtype"}
        # transformers loads with this dtype: the base model's would round the trained weights.
        config["dtype"] = _stored_dtype(tensors)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save(folder)


def _stored_dtype(tensors: Mapping[str, torch.Tensor]) -> str:
    """Name of the widest floating-point type among `tensors`, such as float32."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return str(max(kinds, key=lambda kind: torch.finfo(kind).bits)).removeprefix("torch.")


def load_model(args: Arguments, task: GlueTask) -> LoadedModel:
    """The model of `--model_name_or_path` with a head for `task`, on the host, in fp32, frozen as the flags say."""
    model = _load(args, task)
    choose_trained(args, model)
    return model


def _load(args: Arguments, task: GlueTask) -> LoadedModel:
    folder = model_folder(args.model_name_or_path, args)
    config_folder = model_folder(args.config_name, args) if args.config_name else folder
    tokenizer_folder = model_folder(args.tokenizer_name, args) if args.tokenizer_name else folder
    config = read_config(config_folder)
    family = FAMILIES.get(config.get("model_type", ""))
    flags = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    for flag, key in zip(flags, family.dropout_keys if family else flags, strict=True):
        if getattr(args, flag) is not None:
            config[key] = getattr(args, flag)
    stored_labels, earlier = _stored_labels(config), _earlier_task(config, args, task)
    config = _with_labels(config, task)
    reason = why_not_packed(config)
    if reason is None and args.padding not in ("auto", "packed"):
        reason = f"--padding {args.padding}"
    elif reason is not None and args.padding == "packed":
        raise MachineError(f"--padding packed: this model cannot run packed, {reason}")
    tokenizer = TextTokenizer(tokenizer_folder, family.uses_types if family else True, args.trust_remote_code)
    can_pack = why_not_packed(config) is None
    if args.reinit_layers and not can_pack:
        raise UsageError(f"--reinit_layers {args.reinit_layers}: not for this model: {reason}")
    notes, files = guessed_type(config_folder), weight_files(folder, args.allow_pickle_weights)
    check_size(config, files, config_folder / "config.json")
    tokenizer.id_limit = config.get("vocab_size")
    packed: PackedClassifier | None = None
    if can_pack:
        packed, fresh, packed_notes = _packed(folder, config, args, stored_labels, task, earlier)
        if reason is None:
            return LoadedModel(packed, tokenizer, config, True, notes=notes + packed_notes, files=files, fresh=fresh)
    module, stock_fresh, stock_notes = _stock(folder, config, args, stored_labels, task, earlier)
    if packed is None:
        notes, fresh = notes + stock_notes, stock_fresh
    else:
        notes = notes + packed_notes
        # A padded run for comparison starts from the packed run's weights, a fresh head included.
        module.stock.load_state_dict(packed_tensors(packed, family), strict=False)
    return LoadedModel(module, tokenizer, config, False, reason, notes, files, fresh)


def _packed(
    folder: Path, config: dict, args: Arguments, stored_labels: list[str], task: GlueTask, earlier: str
) -> tuple[PackedClassifier, list[str], list[str]]:
    """Our own module with a checkpoint's weights, the names of fresh ones, notes; fixes `config`'s architecture."""
    family = FAMILIES[config["model_type"]]
    config["architectures"] = [family.architecture]
    try:
        shape = family.shape(config, task.num_labels)
    except KeyError as error:
        raise MachineError(f"{folder / 'config.json'} has no {error}") from error
    module = PackedClassifier(shape, args.gradient_checkpointing)
    deviation = config.get("initializer_range", 0.02)
    initialise(module, deviation)
    tensors = read_tensors(weight_files(folder, args.allow_pickle_weights))
    if earlier:
        for name in ("head_output.weight", "head_output.bias"):
            tensors.pop(weight_names(family, shape)[name], None)
    fresh = load_packed(module, family, tensors, args.ignore_mismatched_sizes)
    notes = [_fresh_note(fresh, earlier)] if fresh else _reorder_head(module.head_output, stored_labels, task)
    if args.reinit_layers:
        notes.append(reinitialise(module, args.reinit_layers, deviation))
    return module, fresh, notes


def _earlier_task(config: dict, args: Arguments, task: GlueTask) -> str:
    """The other task that a checkpoint to be trained on was fine-tuned for, "" if none: its head is of no use."""
    earlier = str(config.get("finetuning_task") or "").lower()
    return earlier if args.do_train and earlier != task.name else ""


def _fresh_note(fresh: list[str], earlier: str) -> str:
    why = f" (the checkpoint's head is for {earlier})" if earlier else ""
    return f"started anew, not in the checkpoint: {', '.join(fresh)}{why}"


def _stored_labels(config: dict) -> list[str]:
    """Label names a checkpoint brings, in class order; [] where they are only LABEL_n."""
    named = config.get("id2label") or {}
    labels = [str(named[key]) for key in sorted(named, key=int)]
    return [] if any(label.startswith("LABEL_") for label in labels) else labels


def _with_labels(config: dict, task: GlueTask) -> dict:
    kept = {key: value for key, value in config.items() if key not in ("id2label", "label2id", "num_labels")}
    labels = task.labels or ("score",)
    kept["id2label"] = {str(number): label for number, label in enumerate(labels)}
    kept["label2id"] = {label: number for number, label in enumerate(labels)}
    kept["problem_type"] = "regression" if task.is_regression else "single_label_classification"
    kept["finetuning_task"] = task.name
    return kept


@torch.no_grad()
def _reorder_head(head: nn.Linear, stored: list[str], task: GlueTask) -> list[str]:
    """Permute a stored head's outputs to the task's label order, by name."""
    wanted, have = list(task.labels), [label.lower() for label in stored]
    if not stored or have == wanted or task.is_regression:
        return []
    if sorted(have) != sorted(wanted):
        return [f"the checkpoint's labels {stored} are not the task's {wanted}; used in their stored order"]
    order = [have.index(label) for label in wanted]
    head.weight.copy_(head.weight[order])
    head.bias.copy_(head.bias[order])
    return [f"the checkpoint's labels {stored} were reordered by name to {wanted}"]


def _stock(
    folder: Path, config: dict, args: Arguments, stored_labels: list[str], task: GlueTask, earlier: str
) -> tuple[PaddedClassifier, list[str], list[str]]:
    """transformers' own module, for padded runs and encoders that cannot be packed; names of fresh weights, notes."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForSequenceClassification

    files = weight_files(folder, args.allow_pickle_weights)
    # A class that comes with the folder is found through the folder; transformers then reads the weights itself.
    has_own_code = args.trust_remote_code and "auto_map" in config
    tensors = None if has_own_code else read_tensors(files)
    try:
        settings = AutoConfig.for_model(**config)
        known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(settings), None)
        if known is None and not has_own_code:
            raise ValueError(f"it has no classifier for model_type {config['model_type']!r}")
        model_class = AutoModelForSequenceClassification if has_own_code else known
        stock, report = model_class.from_pretrained(
            folder if has_own_code else None,
            output_loading_info=True,
            config=settings,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes or bool(earlier),
            dtype=torch.float32,
            **({"trust_remote_code": True} if has_own_code else {"state_dict": tensors}),
        )
    except Exception as error:
        raise MachineError(f"transformers cannot load {folder}: {first_line(error)}") from error
    if args.gradient_checkpointing:
        stock.gradient_checkpointing_enable()
    fresh = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    # transformers starts any missing weight at random and goes on; only a head may start so.
    encoder = [name for name in fresh if name.startswith(f"{stock.base_model_prefix}.") and "pooler" not in name]
    if encoder:
        raise MachineError(f"the weights do not fit config.json: {', '.join(encoder[:5])} missing or of another shape")
    heads = [part for part in stock.modules() if isinstance(part, nn.Linear) and part.out_features == task.num_labels]
    if earlier and not fresh and heads:
        initialise(heads[-1], config.get("initializer_range", 0.02))
        fresh = [name for name, part in stock.named_modules() if part is heads[-1]]
    if fresh:
        return PaddedClassifier(stock), fresh, [_fresh_note(fresh, earlier)]
    return PaddedClassifier(stock), [], _reorder_head(heads[-1], stored_labels, task) if heads else []
