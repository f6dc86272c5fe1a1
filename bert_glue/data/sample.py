"""Generates the sample: nine tasks, the diagnostic, and a tiny BERT with random weights. It is not GLUE."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bert_glue.data import sample_grammar
from bert_glue.data.sample_grammar import Draw, Grammar
from bert_glue.errors import UsageError
from bert_glue.storage.files import make_own_folder, write_json
from bert_glue.tasks import TASKS, GlueTask

SAMPLE_LABEL = "sample data, not GLUE"
Rows = tuple[tuple[list[str], ...], list[int] | list[float] | None]


class SampleTask(NamedTuple):
    """How one task is generated.

    Args:
        write: the grammar of the training split, and of all splits that `write_other` does not name.
        train_rows: the number of rows in the training split. Other splits have `other_rows`.
        shares: label -> its share of the rows. A label is a class name, or a score (the number of equal slots).
        other_rows: the number of rows in each other split.
        write_other: split -> its grammar.
    """

    write: Grammar
    train_rows: int
    shares: dict[str, int]
    other_rows: int = 200
    write_other: dict[str, Grammar] = {}


_NLI_SHARES = {"entailment": 1, "neutral": 1, "contradiction": 1}
_PAIR_SHARES = {"entailment": 1, "not_entailment": 1}
_ELSEWHERE = sample_grammar.inference_elsewhere
# The shares follow GLUE where its classes are unbalanced (acceptable sentences, paraphrases, distinct questions).
# Scores 0 and 5 are more frequent than the others: with equal shares some seeds only learn the mean (Spearman 0.46).
SAMPLE_TASKS = {
    "cola": SampleTask(sample_grammar.acceptability, 3000, {"acceptable": 3, "unacceptable": 2}),
    "sst2": SampleTask(sample_grammar.sentiment, 2000, {"positive": 1, "negative": 1}),
    "mrpc": SampleTask(sample_grammar.paraphrase, 3000, {"equivalent": 3, "not_equivalent": 2}),
    "stsb": SampleTask(sample_grammar.similarity, 3000, {"0": 3, "1": 1, "2": 1, "3": 1, "4": 1, "5": 3}),
    "qqp": SampleTask(sample_grammar.duplicate, 4000, {"duplicate": 2, "not_duplicate": 3}),
    "mnli": SampleTask(
        sample_grammar.inference,
        4000,
        _NLI_SHARES,
        write_other={"validation_mismatched": _ELSEWHERE, "test_mismatched": _ELSEWHERE},
    ),
    "qnli": SampleTask(sample_grammar.answer, 3000, _PAIR_SHARES),
    "rte": SampleTask(sample_grammar.entailment, 2000, _PAIR_SHARES),
    "wnli": SampleTask(sample_grammar.pronoun, 1500, _PAIR_SHARES, other_rows=100),
    "ax": SampleTask(sample_grammar.inference_elsewhere, 0, _NLI_SHARES),
}


def sample_rows(task: GlueTask, split: str, seed: int = 0) -> Rows:
    """One split of a generated task.

    Args:
        task: an official row of the task table.
        split: one of `task.splits`.
        seed: each seed gives different rows of the same kind.

    Returns:
        The text columns in the order of `task.columns`, and class ids in the order of `task.labels` (or numbers
        within `task.score_range` for a regression task). Test splits have None for the labels.

    Raises:
        UsageError: there is no sample of the task or split.
    """
    if task.name not in SAMPLE_TASKS or split not in task.splits:
        raise UsageError(f"--sample has no split {split!r} of task {task.name!r}; tasks: {', '.join(SAMPLE_TASKS)}")
    plan = SAMPLE_TASKS[task.name]
    draw = Draw(f"{seed}/{task.name}/{split}")
    write = plan.write_other.get(split, plan.write)
    labels = _balanced(draw, plan.shares, plan.train_rows if split == "train" else plan.other_rows)
    rows = [_with_traps(at, write(draw, label)) for at, label in enumerate(labels)]
    columns = tuple(list(column) for column in zip(*rows, strict=True))
    if split in {name for name, _ in task.test}:
        return columns, None
    return columns, [float(label) if task.is_regression else task.labels.index(label) for label in labels]


def _balanced(draw: Draw, shares: dict[str, int], rows: int) -> list[str]:
    """`rows` labels in the given shares (exact up to rounding), shuffled."""
    parts = [label for label, share in shares.items() for _ in range(share)]
    return draw.shuffled([parts[at % len(parts)] for at in range(rows)])


def _with_traps(at: int, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Adds to a few rows what readers of GLUE files often get wrong: trailing spaces, quotes, and `NA`."""
    first, *rest = texts
    if at % 50 == 7:
        first += " "
    elif at % 50 == 17:
        first = f'"{first}'
    elif at == 27:
        first = "NA"
    return first, *rest


_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "model.safetensors", "config.json")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WIDTH, _LAYERS, _HEADS, _POSITIONS = 64, 2, 4, 512


def make_tiny_bert(folder: Path) -> None:
    """Writes a two-layer BERT encoder with random weights and the vocabulary of the sample, without torch.

    The bytes are the same on every machine. A folder that already has all files stays unchanged. Several processes
    may call this at once, because each complete file appears by one rename. It takes about 1 s of CPU time, mostly to
    generate the sample for its vocabulary.

    Args:
        folder: receives config.json, model.safetensors, vocab.txt, tokenizer.json and tokenizer_config.json.
    """
    folder = Path(folder)
    if all((folder / name).is_file() for name in _FILES):
        return
    make_own_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as making:
        _write_tokenizer(Path(making), _vocabulary())
        _write_encoder(Path(making), len(_vocabulary()))
        for name in _FILES:
            (Path(making) / name).chmod(0o644)  # safetensors writes 0600
            os.replace(Path(making) / name, folder / name)


@cache
def _vocabulary() -> tuple[str, ...]:
    """Special tokens, characters (so that any ASCII text can be encoded), and the words of the sample."""
    from tokenizers import BertWordPieceTokenizer

    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    spelling = (*_SPECIAL, *characters, *(f"##{c}" for c in characters))
    chunks: set[str] = set()
    for task in TASKS.values():
        for split in task.splits:
            for column in sample_rows(task, split)[0]:
                chunks.update(chunk for text in column for chunk in text.split())
    # The normalizer of the library splits the words, so that each word becomes one token. It takes seconds on
    # the full texts, but only 10 ms on their distinct words.
    rules = BertWordPieceTokenizer(lowercase=True)
    pieces = rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(" ".join(chunks)))
    return spelling + tuple(sorted({piece for piece, _ in pieces} - set(spelling)))


def _write_tokenizer(folder: Path, words: tuple[str, ...]) -> None:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json. Token ids are the positions in `words`."""
    from tokenizers import BertWordPieceTokenizer

    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8", newline="\n")
    tokenizer = BertWordPieceTokenizer({word: at for at, word in enumerate(words)}, lowercase=True)
    # Python writes the file: on a full disk the writer of the library raises a bare Exception.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8", newline="\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": _POSITIONS,
            **{f"{word[1:-1].lower()}_token": word for word in _SPECIAL},
        },
    )


def _write_encoder(folder: Path, vocabulary: int) -> None:
    """Writes config.json and model.safetensors of an encoder with a pooler and without a classifier."""
    from safetensors.numpy import save_file

    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "intermediate_size": 2 * _WIDTH,
        "max_position_embeddings": _POSITIONS,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "pad_token_id": 0,
    }
    write_json(folder / "config.json", config)
    save_file(_encoder_weights(vocabulary), folder / "model.safetensors", metadata={"format": "pt"})


def _encoder_weights(vocabulary: int) -> dict:
    """Random weights, name -> float32 array.

    A short training of a tiny model does not discover that equal words matter, so the initial weights encode it.
    Query and key weights are the same matrix, so each token first attends to its own copies (compare Trockman and
    Kolter 2023, "Mimetic initialization"). The token type embeddings are large, so a copy in the other sentence
    differs from one in the same sentence. Uniform attention in the second layer gave worse scores.
    """
    import numpy as np

    bits = np.random.PCG64(2018)

    def uniform(*shape: int, std: float) -> np.ndarray:
        # numpy guarantees the sequence of raw bits across versions, but not that of its distributions.
        unit = (bits.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
        return (unit * 12**0.5 * std).astype(np.float32).reshape(shape)

    weights = {}

    def linear(name: str, outputs: int, inputs: int, std: float) -> None:
        weights[f"bert.{name}.weight"] = uniform(outputs, inputs, std=std)
        weights[f"bert.{name}.bias"] = np.zeros(outputs, np.float32)

    def norm(name: str) -> None:
        weights[f"bert.{name}.LayerNorm.weight"] = np.ones(_WIDTH, np.float32)
        weights[f"bert.{name}.LayerNorm.bias"] = np.zeros(_WIDTH, np.float32)

    for name, rows, std in (
        ("word", vocabulary, 0.1),
        ("position", _POSITIONS, 0.01),
        ("token_type", 2, 0.1),
    ):
        weights[f"bert.embeddings.{name}_embeddings.weight"] = uniform(rows, _WIDTH, std=std)
    norm("embeddings")
    keep = _WIDTH**-0.5
    for at in range(_LAYERS):
        layer = f"encoder.layer.{at}"
        linear(f"{layer}.attention.self.query", _WIDTH, _WIDTH, 0.1)
        linear(f"{layer}.attention.self.key", _WIDTH, _WIDTH, 0.1)
        weights[f"bert.{layer}.attention.self.key.weight"] = weights[f"bert.{layer}.attention.self.query.weight"].copy()
        linear(f"{layer}.attention.self.value", _WIDTH, _WIDTH, keep)
        linear(f"{layer}.attention.output.dense", _WIDTH, _WIDTH, keep)
        norm(f"{layer}.attention.output")
        linear(f"{layer}.intermediate.dense", 2 * _WIDTH, _WIDTH, keep)
        linear(f"{layer}.output.dense", _WIDTH, 2 * _WIDTH, keep / 8**0.5)
        norm(f"{layer}.output")
    linear("pooler.dense", _WIDTH, _WIDTH, keep)
    return weights
