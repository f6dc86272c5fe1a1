"""Labels tables with a finished model: its task, the columns that it reads, and its predictions."""

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
    """A model that labels tables, alone or as the first member of an ensemble.

    Args:
        task: the task of the training run. Its `columns` name the columns of this input, in the order in which the
            model reads them.
        limit: the largest number of tokens in a sequence.
        windows: how longer rows become several sequences. None: longer rows are cut.
        lengths: counts the rows that were cut or split into windows.
        others: the other members of the ensemble. Their probabilities (or scores) are averaged with those of this one.
        threshold: with several labels per row, every label with a higher mean probability is predicted. With two
            classes, the second class is predicted above it. None in all other cases.
        delimiter: joins the labels of a row into one text. None: they stay a list.
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
        """The probabilities `[rows, labels]` or scores `[rows, 1]` of this model alone, float64.

        Raises:
            DataError: a text is missing, or a value is not a text (file:line).
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
        """Log lines about the rows so far that were longer than a sequence."""
        windowed, cut = self.lengths[keys.WINDOWED_ROWS], self.lengths[keys.CUT_ROWS]
        found = []
        if windowed:
            found.append(f"{windowed} rows are longer than {self.limit} tokens and were read in windows (--doc_stride)")
        if cut:
            found.append(cut_note(f"{cut} rows were", self.limit, self.windows))
        return found

    def order_of(self, task: GlueTask) -> list[int]:
        """For each label of `task`, its column in the answers of this model, which may have them in another order."""
        return [self.task.labels.index(label) for label in task.labels] or [0]

    def label(self, table: Table) -> Columns:
        """The columns of the table, followed by the predictions and probabilities.

        Raises:
            DataError: a text is missing or not a text (file:line), or the table already has a column of such a name.
            DivergedError: the model's outputs are not finite.
        """
        answers = [one.answers(table)[:, one.order_of(self.task)] for one in (self, *self.others)]
        decision = self.task.decision
        if self.threshold is not None:
            decision = replace(decision, threshold=self.threshold)
        own = _own_columns(replace(self.task, decision=decision), np.mean(answers, axis=0), self.delimiter)
        if taken := [name for name in own if name in table.columns]:
            raise DataError(
                f"{table.origin}: the input already has a column {taken[0]!r}, which the output adds; rename it"
            )
        return {**table.columns, **own}


def _own_columns(task: GlueTask, answers: np.ndarray, delimiter: str | None) -> Columns:
    """The output columns for probabilities `[rows, labels]` (labels and probabilities) or scores `[rows, 1]`."""
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
    """The threshold for the mean probability of the models, and log lines about it.

    The threshold is None for scores, and for one label out of three or more.

    Args:
        names: the `--model` values.
        tasks: the task of each model.
        asked: `--label_threshold`.

    Raises:
        UsageError: the models differ in their labels or problem types, or `--label_threshold` does not apply to them.
    """
    first = tasks[0]
    for name, task in zip(names[1:], tasks[1:], strict=True):
        if task.problem_type != first.problem_type:
            raise UsageError(
                f"--model {name} has problem_type {task.problem_type} and --model {names[0]} has {first.problem_type}; "
                "an ensemble needs one problem type"
            )
        if sorted(task.labels) != sorted(first.labels):
            answers = [", ".join(one.labels) or "a score" for one in (task, first)]
            raise UsageError(
                f"--model {name} predicts {answers[0]} and --model {names[0]} predicts {answers[1]}; "
                "an ensemble needs the same labels"
            )
    if not first.is_multi_label and asked is not None:
        raise UsageError(
            f"--label_threshold {asked:g} is for models with several labels per row; this one gives one label per row"
        )
    # With two classes the threshold belongs to the second class, which may be another model's first class.
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
    """The text that joins the labels of a row in the output. None if they stay a list, or if a row has one label.

    Args:
        asked: `--label_delimiter`.
        tasks: the task of each model.
        kind: the format of the output.

    Raises:
        UsageError: `--label_delimiter` is given, but no labels are joined; or the models have different delimiters.
    """
    task = tasks[0]
    if task.is_multi_label and kind in ("csv", "tsv"):
        own = sorted({one.label_delimiter for one in tasks if one.label_delimiter is not None})
        if asked is None and len(own) > 1:
            raise UsageError(f"the models were trained on labels joined by {' and '.join(map(repr, own))}: "
                             "--label_delimiter says which")  # fmt: skip
        return asked or task.label_delimiter or DELIMITER
    if asked is not None:
        why = f"{kind} holds the labels as a list" if task.is_multi_label else "the model gives one label per row"
        raise UsageError(f"--label_delimiter {asked!r}: {why}")
    return None


def columns_of(
    task: GlueTask, settings: dict[str, Any], flags: ColumnFlags, first: Table
) -> tuple[tuple[str, ...], list[str]]:
    """The text columns of the input, and log lines about the choice.

    The columns named by a flag come first, then those of the training run, then a choice by content if it is certain.

    Raises:
        DataError: the file lacks a column, or the choice is not certain.
        UsageError: the flag names another number of columns than the model reads.
    """
    trained, asked = tuple(settings.get("text_columns") or task.columns), flags.texts
    if asked and trained and len(asked) != len(trained):
        raise UsageError(
            f"--text_column_names {' '.join(asked)}: the model reads {len(trained)} texts per row: {', '.join(trained)}"
        )
    columns = asked or trained
    if not columns:
        found = choose_columns(first, flags, is_labelled=False)
        return found.texts, list(found.lines(first))
    missing = [name for name in columns if name not in first.columns]
    if missing:
        raise DataError(
            f"{first.origin}: no column {missing[0]!r}; columns: {first.names}; "
            "name the text columns with --text_column_names"
        )
    return columns, []


def build_labeller(args: Arguments, task: GlueTask) -> Labeller:
    """Loads the model onto its device, for inference only.

    Raises:
        MachineError: the folder has no fine-tuned classifier, or the device cannot run the model.
    """
    ranks = DistributedContext(args)
    plan = plan_precision(replace(args, amp_backend="native"), ranks.device)  # apex is only for training
    model = load_model(args, task)
    if model.fresh:
        raise MachineError(
            f"--model {args.model_name_or_path} has no fine-tuned classifier; train it first with run_glue.py"
        )
    model.module.to(ranks.device.torch_device)
    precision = InferencePrecision(plan, model.module)
    collate = build_collator(args, model, ranks, None)
    evaluator = Evaluator(model.module, collate, args.per_device_eval_batch_size, ranks, precision)
    return Labeller(task, model, evaluator, model.row_limit(args.max_seq_length), Windows.of(args))
