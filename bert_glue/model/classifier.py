"""A loaded model with everything that belongs to it, and the padded classifier for encoders that cannot be packed."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from bert_glue.data.tokenization import TextTokenizer
from bert_glue.model.description import FILE, write_description
from bert_glue.model.families import FAMILIES, why_not_packed
from bert_glue.model.layers import Adapter, plain_names
from bert_glue.model.shape import EncoderShape
from bert_glue.model.weights import load_packed, packed_tensors
from bert_glue.storage.files import file_hash, is_inside, open_plain


class PaddedClassifier(nn.Module):
    """transformers' own classifier with the interface of the packed one; its dropout is torch's."""

    def __init__(self, stock: nn.Module):
        super().__init__()
        self.stock = stock
        # FNet, for one, takes no attention_mask.
        self.accepted = frozenset(inspect.signature(stock.forward).parameters)
        self.compiled: Callable | None = None  # the compiled `stock.forward` with --torch_compile

    def forward(self, dropout_masks=None, **inputs: torch.Tensor) -> torch.Tensor:
        """`[batch, seq_len]` inputs -> logits `[batch, labels]`."""
        # Outside training and evaluation, hooks read the model's inner values; a compiled forward calls no hooks.
        is_usual = self.training or not torch.is_grad_enabled()
        run = self.compiled if self.compiled and is_usual else self.stock
        return run(**{name: value for name, value in inputs.items() if name in self.accepted}).logits


@dataclass
class LoadedModel:
    """A classifier with all that belongs to it.

    Args:
        module: PackedClassifier or PaddedClassifier; called with a batch's inputs.
        tokenizer: the tokenizer in the same folder.
        config: config.json with the labels of this task.
        is_packed: whether `module` is a PackedClassifier.
        why_padded: reason for a padded run, for the log; "" if packed.
        notes: lines for the log (a new head, reordered labels).
        files: the files with the loaded weights.
        fresh: names of weights, such as the head's, that are not in the checkpoint and start at random.
        frozen: parameters that are not trained, as loaded, on the host, by name.
        adapter: the LoRA adapters in `module`; None without LoRA.
        trained: text for the results that says which weights are trained.
        description: content of the file beside the weights (see description.py); in a training run, its future content.
        depends_on_padding: whether padding changes the module's answers.
        code: Python files of the folder that `--trust_remote_code` lets the model run.
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
    description: dict = field(default_factory=dict)
    depends_on_padding: bool = False
    code: list[Path] = field(default_factory=list)

    @cached_property
    def file_hashes(self) -> dict[Path, str]:
        """SHA-256 of each file with the loaded weights. Costs a second or so for each 1.5 GB, once."""
        return {path: file_hash(path) for path in self.files}

    def notes_on_description(self, folder: Path) -> list[str]:
        """A line where the file beside the weights in `folder` was written with other ones.

        This is only a note: weights that another program has saved again, for example in another dtype, are valid.
        """
        stored, weights = self.description.get("weights_sha256"), folder / "model.safetensors"
        if stored is None or weights not in self.files or self.file_hashes[weights] == stored:
            return []
        return [
            f"{folder / FILE} was written with other weights than model.safetensors: its length, columns and "
            "threshold are used all the same; if they are of another model, remove it and give the flags"
        ]

    @cached_property
    def frozen_hash(self) -> str:
        """SHA-256 of the weights that are not trained; "" if all are trained."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.frozen.items()):
            found.update(name.encode() + tensor.numpy().tobytes())
        return found.hexdigest() if self.frozen else ""

    @property
    def passes(self) -> int:
        """Products of a training step in forward passes: forward, gradients of inputs, gradients of weights."""
        if not self.frozen:
            return 3
        return 1 if self.adapter is None else 2

    @property
    def shape(self) -> EncoderShape | None:
        """Sizes of the encoder and its head; None for a family that cannot be packed."""
        if why_not_packed(self.config) is not None:
            return None
        return FAMILIES[self.config["model_type"]].shape(self.config, len(self.config["id2label"]))

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        config = self.module.shape if self.is_packed else self.module.stock.config
        return config.pad_token_id or 0

    @property
    def word_rows(self) -> int | None:
        """The number of rows of the word embedding. None without one."""
        if self.is_packed:
            return self.module.words.num_embeddings
        try:
            return getattr(self.module.stock.get_input_embeddings(), "num_embeddings", None)
        except (NotImplementedError, AttributeError):
            return None

    @property
    def words_name(self) -> str:
        """Name of a packed model's table of words in transformers."""
        return f"{FAMILIES[self.config['model_type']].outside['words']}.weight"

    @property
    def position_limit(self) -> int:
        """Longest sequence that the position table allows, in tokens."""
        if self.is_packed:
            return self.module.shape.positions - self.module.shape.position_offset
        # RoBERTa and its relatives count positions from the padding id + 1.
        offsets = (
            part.padding_idx + 1
            for name, part in self.module.named_modules()
            if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None
        )
        return self.config.get("max_position_embeddings", 1 << 30) - next(offsets, 0)

    def row_limit(self, max_seq_length: int) -> int:
        """Tokens a row is cut to."""
        return min(max_seq_length, self.position_limit)

    def tensors(self, masters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Copies of the weights on the host, under the names of transformers; adapters under the names of peft.

        Args:
            masters: replace parameters of the module, by name.
        """
        values = {**self.frozen, **(masters or {})}
        if self.is_packed:
            return packed_tensors(self.module, FAMILIES[self.config["model_type"]], values)
        # The comparison is by identity, because one parameter may have two names.
        owner = {id(p): values[name] for name, p in self.module.named_parameters() if name in values}
        stock = self.module.stock.state_dict(keep_vars=True)
        return plain_names({name: owner.get(id(p), p).detach().cpu().clone() for name, p in stock.items()})

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore what `tensors` returned."""
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
        # transformers loads with this dtype; the dtype of the base model could round the trained weights.
        config["dtype"] = dtype = _stored_dtype(tensors)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save(folder)
        for file in self.code:  # without it nothing could load the folder
            with open_plain(file) as source, (folder / file.name).open("xb") as target:
                shutil.copyfileobj(source, target)
        write_description(folder, self.description, dtype)


def why_own_code(config: dict) -> str | None:
    """Why a model with its own code cannot run packed. None if it has no classifier of its own."""
    classes = config.get("auto_map")
    has_classifier = isinstance(classes, dict) and "AutoModelForSequenceClassification" in classes
    return "its own code is what answers" if has_classifier else None


def notes_on_code(config: dict, is_trusted: bool) -> list[str]:
    """A line where a model brings code that is not run."""
    if is_trusted or why_own_code(config) is None:
        return []
    kind = config.get("model_type")
    return [
        f"config.json names code of its own (auto_map), which is not run: read as {kind}; --trust_remote_code runs it"
    ]


def code_files(folder: Path) -> list[Path]:
    """Python files of a model folder. A link that leads out of it, or out of the hub's cache, is not its code."""
    return [file for file in sorted(folder.glob("*.py")) if file.is_file() and is_inside(file, folder)]


def _stored_dtype(tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the widest floating-point dtype among `tensors`, such as float32."""
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return str(max(kinds, key=lambda kind: torch.finfo(kind).bits)).removeprefix("torch.")
