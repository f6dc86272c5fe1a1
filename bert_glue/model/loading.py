"""Loads `--model_name_or_path`: builds the module for its logits from the files of its folder.

Packed and padded models are saved in the same format, which transformers and its pipelines read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import Collator, TokenSplit
from bert_glue.data.splits import Split
from bert_glue.data.tokenization import TextTokenizer
from bert_glue.errors import MachineError, UsageError, first_line
from bert_glue.model.adapters import choose_trained
from bert_glue.model.bounds import check_size
from bert_glue.model.classifier import LoadedModel, PaddedClassifier, code_files, notes_on_code, why_own_code
from bert_glue.model.description import notes_on_calibration, read_description
from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.families import FAMILIES, weight_names, why_not_packed
from bert_glue.model.folder import (
    check_problem_type,
    guessed_type,
    kind_notes,
    model_folder,
    notes_on_quantization,
    read_config,
)
from bert_glue.model.weights import initialise, load_packed, packed_tensors, read_tensors, reinitialise, weight_files
from bert_glue.tasks import GlueTask


def load_model(args: Arguments, task: GlueTask) -> LoadedModel:
    """Loads the model with a head for `task`, on the host, in fp32, with the weights frozen that the flags name."""
    model = _load(args, task)
    folder = model_folder(args.model_name_or_path, args)
    model.description = read_description(folder)
    model.notes += model.notes_on_description(folder)
    if not args.do_train:
        model.notes += notes_on_calibration(folder)
    model.code = code_files(folder) if args.trust_remote_code and why_own_code(model.config) else []
    if model.word_rows is not None and model.tokenizer.size > model.word_rows:
        raise MachineError(
            f"the tokenizer in {model.tokenizer.folder} has {model.tokenizer.size} ids, but the model's word embedding "
            f"has {model.word_rows} rows; use the tokenizer of this model"
        )
    choose_trained(args, model)
    return model


def _load(args: Arguments, task: GlueTask) -> LoadedModel:
    folder = model_folder(args.model_name_or_path, args)
    config_folder = model_folder(args.config_name, args, "--config_name") if args.config_name else folder
    tokenizer_folder = model_folder(args.tokenizer_name, args, "--tokenizer_name") if args.tokenizer_name else folder
    config = read_config(config_folder)
    family = FAMILIES.get(config.get("model_type", ""))
    flags = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    for flag, key in zip(flags, family.dropout_keys if family else flags, strict=True):
        if getattr(args, flag) is not None:
            config[key] = getattr(args, flag)
    if not args.do_train:
        check_problem_type(config, task, config_folder, args.problem_type)
    said = kind_notes(config, args, task) + notes_on_quantization(config)
    stored_labels, earlier = _stored_labels(config), _earlier_task(config, args, task)
    config = _with_labels(config, task)
    reason = why_not_packed(config) if not args.trust_remote_code else why_own_code(config) or why_not_packed(config)
    can_pack = reason is None
    if can_pack and args.padding not in ("auto", "packed"):
        reason = f"--padding {args.padding}"
    elif reason is not None and args.padding == "packed":
        raise MachineError(f"--padding packed: this model cannot run packed ({reason}); use --padding auto")
    tokenizer = _tokenizer(tokenizer_folder, config, args)
    if args.reinit_layers and not can_pack:
        raise UsageError(f"--reinit_layers {args.reinit_layers} needs a model that can run packed: {reason}")
    notes = guessed_type(config_folder) + said + tokenizer.notes + notes_on_code(config, args.trust_remote_code)
    files = weight_files(folder, args.allow_pickle_weights)
    check_size(config, files, config_folder / "config.json")
    packed: PackedClassifier | None = None
    if can_pack:
        packed, fresh, packed_notes = _packed(folder, config, args, stored_labels, task, earlier)
        if reason is None:
            return LoadedModel(packed, tokenizer, config, True, notes=notes + packed_notes, files=files, fresh=fresh)
    config.setdefault("pad_token_id", tokenizer.pad_id)
    module, stock_fresh, stock_notes = _stock(folder, config, args, stored_labels, task, earlier)
    if module.stock.config.pad_token_id is None and tokenizer.pad_id is not None:
        config["pad_token_id"] = module.stock.config.pad_token_id = tokenizer.pad_id
    if packed is not None:
        # A padded run for comparison starts with the weights of the packed run, including a new head.
        module.stock.load_state_dict(packed_tensors(packed, family), strict=False)
        return LoadedModel(module, tokenizer, config, False, reason, notes + packed_notes, files, fresh)
    model = LoadedModel(module, tokenizer, config, False, reason, notes + stock_notes, files, stock_fresh)
    unknown = (tokenizer.input_names & module.accepted) - {"input_ids", "token_type_ids", "attention_mask"}
    if unknown:
        raise MachineError(
            f"the model needs the inputs {', '.join(sorted(unknown))} besides tokens; such models are not supported"
        )
    # With --pad_to_max_length the padding counts as part of the model, as in Hugging Face's run_glue.py.
    if args.padding != "max_length" and _depends_on_padding(model):
        model.depends_on_padding = True
        model.notes.append("padding changes the predictions of this model: only texts of equal length share a batch")
    return model


def _tokenizer(folder: Path, config: dict, args: Arguments) -> TextTokenizer:
    """The tokenizer of `folder`. The model's `config` replaces a missing config.json."""
    own = read_config(folder) if (folder / "config.json").is_file() else config
    rows = {"word_rows": config.get("vocab_size"), "type_rows": config.get("type_vocab_size") or None}
    return TextTokenizer(folder, own, args.trust_remote_code, **rows)


@torch.no_grad()
def _depends_on_padding(model: LoadedModel) -> bool:
    """True if padding changes the logits of a text, because convolutions and Fourier transforms read the padding.

    Raises:
        MachineError: the model cannot run a padded batch.
    """
    probe = Split("probe", (["a b c d e f g h", "a b c d e f g h " * 2],), None, "")
    split = TokenSplit("probe", model.tokenizer.encode(probe, min(40, model.position_limit)), None)
    device = next(model.module.parameters()).device
    collate = Collator("longest", 40, model.pad_id, model.tokenizer.gives_types, device, model.tokenizer.pads_left)
    try:
        alone, padded = (model.module(**collate(split, rows).inputs)[0] for rows in (np.array([0]), np.array([0, 1])))
    except Exception as error:  # models of transformers raise many types
        way_out = "in run_glue.py --pad_to_max_length pads all texts to one length"
        if model.module.stock.config.pad_token_id is None:
            way_out = "name a padding token (pad_token) in tokenizer_config.json"
        why = f"the model cannot run texts of different lengths in one batch: {first_line(error)}"
        raise MachineError(f"{why}; {way_out}") from error
    # A different order of summation changes a logit by about 1e-6.
    return bool((alone - padded).abs().max() > 1e-5 * alone.abs().max())


def _packed(
    folder: Path, config: dict, args: Arguments, stored_labels: list[str], task: GlueTask, earlier: str
) -> tuple[PackedClassifier, list[str], list[str]]:
    """The packed module with the weights of a checkpoint, the names of new weights, and notes. Completes `config`."""
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
    notes = (
        [_fresh_note(fresh, earlier)]
        if fresh
        else _reorder_head(module.head_output, stored_labels, task, args.do_train)
    )
    if args.reinit_layers:
        notes.append(reinitialise(module, args.reinit_layers, deviation))
    return module, fresh, notes


def _earlier_task(config: dict, args: Arguments, task: GlueTask) -> str:
    """The name of another task for which the checkpoint was fine-tuned, whose head is dropped. "" if there is none."""
    earlier = str(config.get("finetuning_task") or "").lower()
    return earlier if args.do_train and earlier != task.name else ""


def _fresh_note(fresh: list[str], earlier: str) -> str:
    why = f" (the checkpoint's head is for {earlier})" if earlier else ""
    return f"initialised at random, because not in the checkpoint: {', '.join(fresh)}{why}"


def _stored_labels(config: dict) -> list[str]:
    """The label names of a checkpoint in class order. [] if they are only LABEL_n."""
    named = config.get("id2label") or {}
    labels = [str(named[key]) for key in sorted(named, key=int)]
    return [] if labels == _unnamed(len(labels)) else labels


# Of a config.json; the weights are computed and saved as they lie there, not quantized.
_REPLACED = ("id2label", "label2id", "num_labels", "quantization_config")


def _with_labels(config: dict, task: GlueTask) -> dict:
    kept = {key: value for key, value in config.items() if key not in _REPLACED}
    labels = task.labels or ("score",)
    kept["id2label"] = {str(number): label for number, label in enumerate(labels)}
    kept["label2id"] = {label: number for number, label in enumerate(labels)}
    kept["problem_type"] = task.problem_type
    kept["finetuning_task"] = task.name
    return kept


@torch.no_grad()
def _reorder_head(head: nn.Linear, stored: list[str], task: GlueTask, is_trained: bool) -> list[str]:
    """Permutes the outputs of a stored head to the label order of the task, by name. Returns log lines.

    Raises:
        MachineError: the names do not match and the head is not trained, so its predictions would be wrong.
    """
    wanted = list(task.labels)
    if task.is_regression or stored == wanted:
        return []
    if not stored:
        guess = f"the model has no names for its classes; that they are {wanted} in this order is a guess"
        return [] if is_trained or set(wanted) == set(_unnamed(len(wanted))) else [guess]
    have = stored if sorted(stored) == sorted(wanted) else [label.casefold() for label in stored]
    names = wanted if have is stored else [label.casefold() for label in wanted]
    if sorted(have) != sorted(names) or len(set(have)) < len(have):
        if not is_trained:
            raise MachineError(
                f"the model's classes {stored} differ from those of {task.name}, {wanted}; train a head (--do_train)"
            )
        return [f"the checkpoint's labels {stored} differ from the task's {wanted}; their order is kept"]
    order = [have.index(name) for name in names]
    if order == sorted(order):
        return []
    head.weight.copy_(head.weight[order])
    head.bias.copy_(head.bias[order])
    return [f"the checkpoint's labels {stored} were reordered by name to {wanted}"]


def _unnamed(count: int) -> list[str]:
    """The default names of transformers for classes without names."""
    return [f"LABEL_{number}" for number in range(count)]


def _stock(
    folder: Path, config: dict, args: Arguments, stored_labels: list[str], task: GlueTask, earlier: str
) -> tuple[PaddedClassifier, list[str], list[str]]:
    """The module of transformers, for padded runs and other encoders, the names of new weights, and notes."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForSequenceClassification

    files = weight_files(folder, args.allow_pickle_weights)
    # A class whose code is in the folder needs the folder, so transformers reads the weights itself.
    has_own_code = args.trust_remote_code and why_own_code(config) is not None
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
            **{"dtype" if hasattr(settings, "dtype") else "torch_dtype": torch.float32},  # renamed in transformers 4.56
            **({"trust_remote_code": True} if has_own_code else {"state_dict": tensors}),
        )
    except Exception as error:
        raise MachineError(f"transformers cannot load {folder}: {first_line(error)}") from error
    if args.gradient_checkpointing:
        stock.gradient_checkpointing_enable()
    fresh = sorted({*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])})
    # transformers initialises any missing weight at random. That is only right for a head.
    encoder = [name for name in fresh if name.startswith(f"{stock.base_model_prefix}.") and "pooler" not in name]
    if encoder:
        raise MachineError(f"the weights do not fit config.json: {', '.join(encoder[:5])} missing or of another shape")
    heads = [part for part in stock.modules() if isinstance(part, nn.Linear) and part.out_features == task.num_labels]
    if earlier and not fresh and heads:
        initialise(heads[-1], config.get("initializer_range", 0.02))
        fresh = [name for name, part in stock.named_modules() if part is heads[-1]]
    if fresh:
        return PaddedClassifier(stock), fresh, [_fresh_note(fresh, earlier)]
    return PaddedClassifier(stock), [], _reorder_head(heads[-1], stored_labels, task, args.do_train) if heads else []
