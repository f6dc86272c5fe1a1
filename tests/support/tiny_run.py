"""A BERT of two narrow layers, a few dozen rows with a signal, and a run built from them in process."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from bert_glue.config.arguments import Arguments
from bert_glue.data.sources import load_task_data
from bert_glue.devices.distributed import DistributedContext
from bert_glue.devices.rng import seed_generators
from bert_glue.evaluation.evaluator import Evaluator
from bert_glue.model.loading import load_model
from bert_glue.pipeline import run as pipeline
from bert_glue.pipeline.inputs import needed_data, tokenize_splits, weights_of_classes
from bert_glue.precision.plan import plan_precision
from bert_glue.training.console import ConsoleLog, StopSignals, Trackers
from bert_glue.training.embedding_rows import narrow
from bert_glue.training.setup import build_collator, fine_tune, make_precision
from bert_glue.training.state import TrainState

REPOSITORY = Path(__file__).parents[2]
# More threads than these tiny products can use only make the tests wait for each other.
torch.set_num_threads(1)

SUBJECTS = ["dog", "cat", "bird", "horse", "fish", "child", "farmer", "singer"]
VERBS = ["runs", "sleeps", "sings", "waits", "eats", "falls", "returns", "rests"]
FILLERS = ["today", "here", "again", "slowly", "at", "noon", "near", "the", "old", "mill"]
UNUSED = [f"unused{n}" for n in range(12)]  # rows of the embedding table that no text reads
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *SUBJECTS, *VERBS, *FILLERS, *UNUSED]
WIDTH, LAYERS, INNER = 16, 2, 24


def bert_tensors(seed: int = 0, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Weights of a BERT encoder with pooler, without a classifier."""
    draw, tensors = np.random.default_rng(seed), {}

    def put(name: str, *shape: int) -> None:
        tensors[f"bert.{name}"] = (draw.standard_normal(shape) * 0.2).astype(np.float32)

    def linear(name: str, outputs: int, inputs: int) -> None:
        put(f"{name}.weight", outputs, inputs)
        tensors[f"bert.{name}.bias"] = np.zeros(outputs, np.float32)

    def norm(name: str) -> None:
        tensors[f"bert.{name}.LayerNorm.weight"] = np.ones(width, np.float32)
        tensors[f"bert.{name}.LayerNorm.bias"] = np.zeros(width, np.float32)

    for name, rows in (("word", len(VOCABULARY)), ("position", 40), ("token_type", 2)):
        put(f"embeddings.{name}_embeddings.weight", rows, width)
    norm("embeddings")
    for at in range(LAYERS):
        for part in ("query", "key", "value"):
            linear(f"encoder.layer.{at}.attention.self.{part}", width, width)
        linear(f"encoder.layer.{at}.attention.output.dense", width, width)
        norm(f"encoder.layer.{at}.attention.output")
        linear(f"encoder.layer.{at}.intermediate.dense", INNER, width)
        linear(f"encoder.layer.{at}.output.dense", width, INNER)
        norm(f"encoder.layer.{at}.output")
    linear("pooler.dense", width, width)
    return tensors


def make_model(folder: Path, dropout: float = 0.0, width: int = WIDTH, changes: dict | None = None) -> Path:
    """A model folder; `changes` replaces tensors by name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": len(VOCABULARY), "hidden_size": width,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": INNER,
        "max_position_embeddings": 40, "type_vocab_size": 2, "hidden_act": "gelu", "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout, "pad_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 40}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    save_file({**bert_tensors(width=width), **(changes or {})}, folder / "model.safetensors", {"format": "pt"})
    return folder


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of sentences of 3 to 12 words; `yes` if both tell the same subject."""
    draw, found = random.Random(seed), []
    for at in range(count):
        first, other = draw.sample(SUBJECTS, 2)
        second = first if at % 2 else other
        ends = [" ".join(draw.choices(FILLERS, k=draw.randrange(8))) for _ in range(2)]
        texts = [f"a {who} {draw.choice(VERBS)} {end}".strip() for who, end in zip((first, second), ends, strict=True)]
        found.append({"sentence1": texts[0], "sentence2": texts[1], "label": "yes" if at % 2 else "no"})
    return found


def _three_files(folder: Path, suffix: str, counts: tuple[int, ...], write: Callable[[Path, int, int], None]) -> dict:
    """Training, validation and test file, each by `write(path, rows, seed)`; returns the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = {}
    for seed, (part, count) in enumerate(zip(("train", "validation", "test"), counts, strict=True)):
        path = folder / f"{part}{suffix}"
        write(path, count, seed)
        flags[f"{part}_file"] = str(path)
    return flags


def _write_csv(path: Path, count: int, seed: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["sentence1", "sentence2", "label"])
        writer.writeheader()
        writer.writerows(rows(count, seed))


def make_data(folder: Path, train: int = 29, validation: int = 13, test: int = 5) -> dict[str, str]:
    """Three csv files; returns the flags that name them."""
    return _three_files(folder, ".csv", (train, validation, test), _write_csv)


def label_sets(count: int, seed: int) -> list[dict]:
    """Texts that name up to three subjects; the labels are the subjects."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        named = draw.sample(SUBJECTS[:3], draw.randrange(4))
        words = [*named, *draw.choices(FILLERS, k=draw.randrange(2, 8))]
        draw.shuffle(words)
        found.append({"text": " ".join(words), "label": sorted(named)})
    return found


def _write_label_sets(path: Path, count: int, seed: int) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in label_sets(count, seed)))


def make_label_sets(folder: Path, train: int = 61, validation: int = 23, test: int = 9) -> dict[str, str]:
    """Three jsonl files of `label_sets`; returns the flags that name them."""
    return _three_files(folder, ".jsonl", (train, validation, test), _write_label_sets)


def arguments(folder: Path, **changes) -> Arguments:
    """Settings of a short run on the CPU; model and data are created in `folder` if they are missing."""
    if "model_name_or_path" not in changes and not changes.get("sample"):
        model = folder / "model"
        changes["model_name_or_path"] = str(model if model.is_dir() else make_model(model))
    if not {"train_file", "sample", "data_path"} & set(changes):
        changes |= make_data(folder / "data")
    settings = {
        "do_train": True, "output_dir": str(folder / "out"), "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 5e-3, "num_train_epochs": 2.0,
        "max_seq_length": 32,
    }  # fmt: skip
    return Arguments(**{**settings, **changes})


def fit(args: Arguments, log: ConsoleLog | None = None, signals: StopSignals | None = None) -> TrainState:
    """Everything up to the trained model, without result files."""
    log = log or ConsoleLog(False, False)
    signals = signals or StopSignals(is_watching=False)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    ranks = DistributedContext(args)
    data = load_task_data(args, needed_data(args))
    seed_generators(args.seed)
    model = load_model(args, data.task)
    splits = tokenize_splits(args, data, model, log)
    narrowed = narrow(args, model, splits)
    precision = make_precision(args, plan_precision(args, ranks.device), model.module, ranks)
    collate = build_collator(args, model, ranks, narrowed)
    evaluator = Evaluator(model.module, collate, args.per_device_eval_batch_size, ranks, precision)
    pipeline._compile(args, model, evaluator, splits, log)
    return fine_tune(
        args, data.task, splits, model=model, evaluator=evaluator, narrowed=narrowed, log=log,
        trackers=Trackers(args, is_first=False), signals=signals, class_weights=weights_of_classes(args, data),
    )  # fmt: skip


def losses(run: TrainState) -> list[float]:
    """Logged losses."""
    return [entry["loss"] for entry in run.progress.history if "loss" in entry]


def results_of(args: Arguments, name: str = "all_results.json") -> dict:
    """A results file, which must be strict JSON."""

    def refuse(word: str):
        raise AssertionError(f"{name} is not JSON: {word}")

    return json.loads((Path(args.output_dir) / name).read_text(), parse_constant=refuse)


def flags_of(args: Arguments) -> list[str]:
    """`args` as a command line."""
    default, words = Arguments(), []
    for name, value in vars(args).items():
        if value != getattr(default, name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def start(args: Arguments, *more: str, **environment: str) -> subprocess.Popen:
    """run_glue.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "run_glue.py"), *flags_of(args), *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def run_on_two_ranks(args: Arguments, seconds: float = 240.0) -> None:
    """The run on two gloo ranks of this host, by torchrun; it must succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(REPOSITORY / "run_glue.py"), *flags_of(args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=seconds, cwd=REPOSITORY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def changed(args: Arguments, **changes) -> Arguments:
    """`args` with other values."""
    return replace(args, **changes)
