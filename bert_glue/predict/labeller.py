"""A finished model that labels tables: what it was trained on, which columns it reads, and its answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bert_glue import result_keys as keys
from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import TokenSplit
from bert_glue.data.chunked_encoding import Windows, cut_note
from bert_glue.data.own.columns import ColumnFlags, check_quoting, choose_columns
from bert_glue.data.own.label_sets import DELIMITER, join_labels
from bert_glue.data.splits import make_split
from bert_glue.data.tables import Table
from bert_glue.devices.distributed import DistributedContext
from bert_glue.errors import DataError, DivergedError, MachineError, UsageError
from bert_glue.evaluation.answers import decided, label_lists, probabilities
from bert_glue.evaluation.evaluator import Evaluator
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.loading import load_model
from bert_glue.precision.native import InferencePrecision
from bert_glue.precision.plan import plan_precision
from bert_glue.predict.output import Columns
from bert_glue.tasks import Decision, GlueTask
from bert_glue.training.setup import build_collator


@dataclass(frozen=True)
class Labeller:
    """A model that labels tables.

    Args:
        task: as it was trained; `columns` are this input's, in the order this model reads them.
        limit: tokens of a sequence.
        windows: how longer rows become several sequences; None where they are cut.
        lengths: counts rows that are cut or in windows.
        others: whose answers are averaged with its own (an ensemble): probabilities, or scores.
        threshold: a class whose mean probability is above it is given: any where a row may have several, the second of
            two; None elsewhere.
        delimiter: joins several labels of a row into one text; None leaves them a list.
    """

    task: GlueTask
    model: LoadedModel
    evaluator: Evaluator
    limit: int
    windows: Windows | None = None
    lengths: Counter[str] = field(default_factory=Counter)
    others: tuple[Labeller, ...] = ()
    threshold: float | None = None
    delimiter: str | None = None

    def answers(self, table: Table) -> np.ndarray:
        """Probabilities `[rows, labels]`, or scores `[rows, 1]`, of this model alone, float64.

        Raises:
            DataError: a text is missing or is no text (file:line).
            DivergedError: the model's outputs are not finite.
        """
        check_quoting(table, self.task.columns)
        texts = table.renamed({name: name for name in self.task.columns})
        tokens = self.model.tokenizer.encode(make_split(self.task, "input", texts, False), self.limit, self.windows)
        self.lengths.update(tokens.row_counts)
        logits = self.evaluator.logits(TokenSplit("input", tokens, None))
        if not np.isfinite(logits).all():
            raise DivergedError("the model's outputs are not finite (NaN or Inf): its weights have diverged")
        return probabilities(self.task, logits)

    def length_notes(self) -> list[str]:
        """Lines on the rows so far that were longer than a sequence."""
        windowed, cut = self.lengths[keys.WINDOWED_ROWS], self.lengths[keys.CUT_ROWS]
        found = []
        if windowed:
            found.append(f"{windowed} rows are longer than {self.limit} tokens and were read in windows (--doc_stride)")
        if cut:
            found.append(cut_note(f"{cut} rows were", self.limit, self.windows))
        return found

    def order_of(self, task: GlueTask) -> list[int]:
        """The column of its own answers for each label of `task`, which has the same labels in any order."""
        return [self.task.labels.index(label) for label in task.labels] or [0]

    def label(self, table: Table) -> Columns:
        """The table's columns, then the model's.

        Raises:
            DataError: a text is missing or is no text (file:line), or a column of ours is there already.
            DivergedError: the model's outputs are not finite.
        """
        answers = [one.answers(table)[:, one.order_of(self.task)] for one in (self, *self.others)]
        decision = self.task.decision
        if self.threshold is not None:
            decision = replace(decision, threshold=self.threshold)
        own = _own_columns(replace(self.task, decision=decision), np.mean(answers, axis=0), self.delimiter)
        if taken := [name for name in own if name in table.columns]:
            raise DataError(f"{table.origin}: the input has a column {taken[0]!r} already; rename it")
        return {**table.columns, **own}


def _own_columns(task: GlueTask, answers: np.ndarray, delimiter: str | None) -> Columns:
    """Predictions and probabilities of `[rows, labels]` probabilities, or predictions of `[rows, 1]` scores."""
    if task.is_regression:
        if task.score_range is not None:
            return {"prediction": np.clip(answers[:, 0], *task.score_range).round(6).tolist()}
        return {"prediction": [float(f"{score:.9g}") for score in answers[:, 0]]}  # all digits of fp32
    shares, found = answers.round(6), decided(task, answers)
    labels: list = label_lists(task, found) if task.is_multi_label else [task.labels[at] for at in found]
    if task.is_multi_label and delimiter is not None:
        labels = [join_labels(names, delimiter) for names in labels]
    return {
        "prediction": labels,
        **{f"probability_{name}": shares[:, at].tolist() for at, name in enumerate(task.labels)},
    }


def ensemble_threshold(names: list[str], tasks: list[GlueTask], asked: float | None) -> tuple[float | None, list[str]]:
    """The threshold of the models' mean probability, None for one label of three or more or for scores; and log lines.

    Args:
        names: of the models.
        tasks: what each was trained on.
        asked: `--label_threshold`.

    Raises:
        UsageError: the models have different labels or kinds of answers, or none of theirs has a threshold.
    """
    first = tasks[0]
    for name, task in zip(names[1:], tasks[1:], strict=True):
        if task.problem_type != first.problem_type:
            raise UsageError(
                f"--model {name} is of problem_type {task.problem_type}, --model {names[0]} of {first.problem_type}"
            )
        if sorted(task.labels) != sorted(first.labels):
            answers = [", ".join(one.labels) or "a score" for one in (task, first)]
            raise UsageError(f"--model {name} answers {answers[0]}, --model {names[0]} {answers[1]}")
    if not first.is_multi_label and asked is not None:
        raise UsageError(f"--label_threshold {asked:g}: the model gives one label a row")
    # Of two classes the threshold is that of the second, which another model may have first.
    own = [
        task.decision.threshold if first.is_multi_label or task.labels == first.labels else 1 - task.decision.threshold
        for task in tasks
    ]
    said = [
        f"{name} is calibrated: temperature {task.decision.temperature:.4g}, threshold {task.decision.threshold:.4g}"
        for name, task in zip(names, tasks, strict=True)
        if task.decision.is_calibrated
    ]
    if not first.is_multi_label and (first.num_labels != 2 or set(own) == {Decision().threshold}):
        return None, said
    if asked is None and len(set(own)) > 1:
        shown = ", ".join(f"{value:g}" for value in own)
        mean = float(np.mean(own))
        overrules = "; --label_threshold overrules" if first.is_multi_label else ""
        return mean, [*said, f"the models' thresholds are {shown}: {mean:g}, their mean, is used{overrules}"]
    return own[0] if asked is None else asked, said


def delimiter_of(asked: str | None, tasks: list[GlueTask], kind: str) -> str | None:
    """What joins the labels of a row in an output of this kind; None where they are a list, or one.

    Args:
        asked: `--label_delimiter`.
        tasks: what each model was trained on.

    Raises:
        UsageError: there is nothing to join, or the models join with different ones.
    """
    task = tasks[0]
    if task.is_multi_label and kind in ("csv", "tsv"):
        own = sorted({one.label_delimiter for one in tasks if one.label_delimiter is not None})
        if asked is None and len(own) > 1:
            raise UsageError(f"the models were trained on labels joined by {' and '.join(map(repr, own))}: "
                             "--label_delimiter says which")  # fmt: skip
        return asked or task.label_delimiter or DELIMITER
    if asked is not None:
        why = f"{kind} holds them as a list" if task.is_multi_label else "the model gives one label a row"
        raise UsageError(f"--label_delimiter {asked!r}: {why}")
    return None


def columns_of(
    task: GlueTask, settings: dict[str, Any], flags: ColumnFlags, first: Table
) -> tuple[tuple[str, ...], list[str]]:
    """The text columns of the input: those named, else the model's own, else where it is certain; and log lines.

    Raises:
        DataError: they are not in the file, or not certain.
        UsageError: one text is given where the model reads two, or the reverse.
    """
    trained, asked = tuple(settings.get("text_columns") or task.columns), flags.texts
    if asked and trained and len(asked) != len(trained):
        raise UsageError(
            f"--text_column_names {' '.join(asked)}: the model reads {len(trained)} a row: {', '.join(trained)}"
        )
    columns = asked or trained
    if not columns:
        found = choose_columns(first, flags, is_labelled=False)
        return found.texts, list(found.lines(first))
    missing = [name for name in columns if name not in first.columns]
    if missing:
        raise DataError(
            f"{first.origin}: no column {missing[0]!r}; columns: {first.names}; "
            "name those with the texts by --text_column_names"
        )
    return columns, []


def build_labeller(args: Arguments, task: GlueTask) -> Labeller:
    """The model on its device, ready to label; for inference only.

    Raises:
        MachineError: the folder has no fine-tuned classifier, or the device cannot run it.
    """
    ranks = DistributedContext(args)
    plan = plan_precision(replace(args, amp_backend="native"), ranks.device)  # apex is for training
    model = load_model(args, task)
    if model.fresh:
        raise MachineError(f"--model {args.model_name_or_path}: has no classifier; fine-tune it first")
    model.module.to(ranks.device.torch_device)
    precision = InferencePrecision(plan, model.module)
    collate = build_collator(args, model, ranks, None)
    evaluator = Evaluator(model.module, collate, args.per_device_eval_batch_size, ranks, precision)
    return Labeller(task, model, evaluator, model.row_limit(args.max_seq_length), Windows.of(args))
