"""A finished model that labels tables: what it was trained on, which columns it reads, and its answers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bert_glue.arguments import Arguments
from bert_glue.batching import TokenSplit
from bert_glue.errors import DataError, DivergedError, MachineError, UsageError
from bert_glue.evaluation import Evaluator, softmax
from bert_glue.labelled_output import Columns
from bert_glue.launch_results import read_json_object
from bert_glue.model import LoadedModel, load_model
from bert_glue.model_folder import read_config
from bert_glue.own_data import text_columns
from bert_glue.precision import InferencePrecision
from bert_glue.precision_plan import plan_precision
from bert_glue.ranks import Ranks
from bert_glue.splits import make_split
from bert_glue.tables import Table
from bert_glue.tasks import TASKS, GlueTask, own_task
from bert_glue.training_setup import assembler


@dataclass(frozen=True)
class Labeller:
    """A model that labels tables.

    Args:
        task: as it was trained; `columns` are this input's, in the order the model reads them.
        limit: tokens a row is cut to.
        others: whose answers are averaged with its own (an ensemble): probabilities, or scores.
    """

    task: GlueTask
    model: LoadedModel
    evaluator: Evaluator
    limit: int
    others: tuple[Labeller, ...] = ()

    def answers(self, table: Table) -> np.ndarray:
        """Probabilities `[rows, labels]`, or scores `[rows, 1]`, of this model alone, float64.

        Raises:
            DataError: a text is missing or is no text (file:line).
            DivergedError: the model's outputs are not finite.
        """
        texts = table.renamed({name: name for name in self.task.columns})
        tokens = self.model.tokenizer.encode(make_split(self.task, "input", texts, False), self.limit)
        logits = self.evaluator.logits(TokenSplit("input", tokens, None))
        if not np.isfinite(logits).all():
            raise DivergedError("the model's outputs are not finite (NaN or Inf): its weights have diverged")
        return logits.astype(np.float64) if self.task.is_regression else softmax(logits)

    def label(self, table: Table) -> Columns:
        """The table's columns, then the model's.

        Raises:
            DataError: a text is missing or is no text (file:line), or a column of ours is there already.
            DivergedError: the model's outputs are not finite.
        """
        own = _own_columns(self.task, np.mean([one.answers(table) for one in (self, *self.others)], axis=0))
        if taken := [name for name in own if name in table.columns]:
            raise DataError(f"{table.origin}: the input has a column {taken[0]!r} already; rename it")
        return {**table.columns, **own}


def _own_columns(task: GlueTask, answers: np.ndarray) -> Columns:
    """Predictions and probabilities of `[rows, labels]` probabilities, or of `[rows, 1]` scores."""
    if task.is_regression:
        low, high = task.score_range or (-np.inf, np.inf)
        return {"prediction": np.clip(answers[:, 0], low, high).round(6).tolist()}
    shares = answers.round(6)
    labels = [task.labels[at] for at in answers.argmax(1)]
    return {
        "prediction": labels,
        **{f"probability_{name}": shares[:, at].tolist() for at, name in enumerate(task.labels)},
    }


def task_of_model(folder: Path) -> tuple[GlueTask, dict[str, Any]]:
    """What a saved classifier was trained on, and the settings its run recorded ({} where there are none).

    Raises:
        MachineError: it has no config.json.
    """
    config = read_config(folder)
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # what transformers leaves out
    labels = tuple(str(names[key]) for key in sorted(names, key=int))
    is_regression = config.get("problem_type") == "regression" or len(labels) == 1
    known = TASKS.get(config.get("finetuning_task") or "")
    settings: dict[str, Any] = {}
    with suppress(MachineError):  # a checkpoint, or another program's model, has no results
        settings = read_json_object(folder / "run.json").get("arguments", {})
        settings["text_columns"] = read_json_object(folder / "all_results.json").get("text_columns")
    if known is not None and known.labels == (() if is_regression else labels):
        return known, settings
    return own_task(str(config.get("finetuning_task") or "own"), (), () if is_regression else labels), settings


def columns_of(task: GlueTask, settings: dict[str, Any], asked: list[str] | None, first: Table) -> tuple[str, ...]:
    """The text columns of the input: those asked for, else the model's own, else found as in training.

    Raises:
        DataError: they are not in the file.
        UsageError: one text is given where the model reads two, or the reverse.
    """
    trained = tuple(settings.get("text_columns") or task.columns)
    if asked and trained and len(asked) != len(trained):
        raise UsageError(
            f"--text_columns {' '.join(asked)}: the model reads {len(trained)} a row: {', '.join(trained)}"
        )
    columns = tuple(asked or trained or text_columns(first))
    missing = [name for name in columns if name not in first.columns]
    if missing:
        raise DataError(
            f"{first.origin}: no column {missing[0]!r}; columns: {', '.join(map(str, first.columns))}; "
            "name those with the texts by --text_columns"
        )
    return columns


def build_labeller(args: Arguments, task: GlueTask) -> Labeller:
    """The model on its device, ready to label; for inference only.

    Raises:
        MachineError: the folder has no fine-tuned classifier, or the device cannot run it.
    """
    ranks = Ranks(args)
    plan = plan_precision(replace(args, amp_backend="native"), ranks.device)  # apex is for training
    model = load_model(args, task)
    if model.fresh:
        raise MachineError(f"--model {args.model_name_or_path}: has no classifier; fine-tune it first")
    model.module.to(ranks.device.torch_device)
    precision = InferencePrecision(plan, model.module)
    assemble = assembler(args, model, ranks, None)
    evaluator = Evaluator(model.module, assemble, args.per_device_eval_batch_size, ranks, precision)
    return Labeller(task, model, evaluator, min(args.max_seq_length, model.position_limit))
