"""The nine GLUE tasks and the AX diagnostic, one row each. No other module compares the name of a task.

Sources: Wang et al. 2018 (GLUE); columns and label names of the data set `nyu-mll/glue`; published
figures of Ascend ModelZoo's "Bert_text_classification for PyTorch" (bert-large-cased) and of the
Hugging Face text-classification example README (bert-base-cased).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from bert_glue.errors import UsageError, did_you_mean

SAMPLE_NOTE = "sample data, not GLUE"
COMBINED_SCORE = "combined_score"
# transformers' names of the kinds of answers.
SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# The name of a task that a user's own files make.
OWN = "own"


def base_epochs(name: str) -> tuple[str, int]:
    """The canonical name of a task and the epochs that Hugging Face published for bert-base-cased.

    Raises:
        UsageError: not a task with training data.
    """
    if name.lower() not in TRAINABLE:
        known = did_you_mean("task", name.lower(), list(TRAINABLE))
        raise UsageError(f"--TASK: {known if name else 'missing. Choices: ' + ', '.join(TRAINABLE)}")
    task = TASKS[name.lower()]
    return task.name, task.published[-1].epochs


@dataclass(frozen=True)
class TsvFile:
    """The file of one split in the original GLUE folder, and its columns.

    `texts` and `label` name header columns, or are 0-based positions where the file has no header.
    `label` is None if the split is unlabelled.
    """

    file: str
    texts: tuple[str | int, ...]
    label: str | int | None = None

    @property
    def has_header(self) -> bool:
        """True if the columns are found by header name."""
        return isinstance(self.texts[0], str)


class EvaluationSplit(NamedTuple):
    """A labelled split that a task is scored on.

    Args:
        name: of the split.
        key_suffix: at the end of its keys in the results.
        file_suffix: at the end of the task's name in the names of its files.
    """

    name: str
    key_suffix: str = ""
    file_suffix: str = ""


class PredictionSplit(NamedTuple):
    """An unlabelled split; `file_suffix` as in `EvaluationSplit`."""

    name: str
    file_suffix: str = ""


@dataclass(frozen=True)
class Published:
    """One published run: scores (x100), in the order of the task's `headline` metrics."""

    where: str
    scores: tuple[float, ...]
    epochs: int
    samples_per_second: float | None = None


@dataclass(frozen=True)
class Decision:
    """How a model's probabilities become its answer; it belongs to the weights (`model/description.py`).

    Args:
        threshold: a multi-label model gives a class whose probability is above it, a model of two classes the second
            one; in (0, 1).
        temperature: divides the logits, > 0.
        is_calibrated: both were chosen by `--calibrate`.
    """

    threshold: float = 0.5
    temperature: float = 1.0
    is_calibrated: bool = False


@dataclass(frozen=True)
class GlueTask:
    """One row of the table.

    Args:
        name: as given to `--task_name`.
        columns: one or two text columns, named as in `nyu-mll/glue`; more with a `text_delimiter`.
        labels: label names in class order; empty for regression.
        metrics: keys of the result, `metrics[0]` of `headline` is what published tables show.
        evaluation: each labelled evaluation split.
        test: each unlabelled split.
        tsv: split -> file of the original GLUE folder `folder`.
        rows: official number of rows of each split.
        score_range: closed range of a regression label.
        predicted_with: the task whose model labels this one (AX has no training data).
        leaderboard: split -> file name in the leaderboard archive.
        leaderboard_names: whether that file has label names; otherwise class numbers (WNLI's too).
        label_column: name of the column with the labels.
        text_delimiter: what joins all columns into one text; None: two columns are a pair.
        is_multi_label: a row has any number of the classes, none included.
        label_delimiter: separates the labels in a text. None if they are lists.
        decision: how probabilities become an answer.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    headline: str
    tsv: dict[str, TsvFile]
    rows: dict[str, int]
    evaluation: tuple[EvaluationSplit, ...] = (EvaluationSplit("validation"),)
    test: tuple[PredictionSplit, ...] = (PredictionSplit("test"),)
    score_range: tuple[float, float] | None = None
    predicted_with: str | None = None
    leaderboard: dict[str, str] | None = None
    leaderboard_names: bool = False
    published: tuple[Published, ...] = ()
    is_official: bool = True
    label_column: str = "label"
    text_delimiter: str | None = None
    is_multi_label: bool = False
    label_delimiter: str | None = None
    decision: Decision = Decision()

    @property
    def is_regression(self) -> bool:
        """True if the label is a number, not a class."""
        return not self.labels and not self.is_multi_label

    @property
    def problem_type(self) -> str:
        """The problem type as transformers names it in config.json."""
        if self.is_regression:
            return REGRESSION
        return MULTI_LABEL if self.is_multi_label else SINGLE_LABEL

    @property
    def has_combined_score(self) -> bool:
        """Whether the mean of all metrics is a figure: averages of one F1 have no mean that says anything."""
        return len(self.metrics) > 1 and (self.is_official or self.is_regression)

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier: 1 for regression."""
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split of the task, training first."""
        train = ("train",) if "train" in self.rows else ()
        return (*train, *(split.name for split in self.evaluation), *(split.name for split in self.test))


_BINARY_F1 = ("accuracy", "f1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")


def _tsv(
    texts: tuple[str, ...], label: str, train: str = "train", dev: str = "dev", test: str = "test"
) -> dict[str, TsvFile]:
    return {
        "train": TsvFile(f"{train}.tsv", texts, label),
        "validation": TsvFile(f"{dev}.tsv", texts, label),
        "test": TsvFile(f"{test}.tsv", texts),
    }


def _modelzoo(*rows: tuple[str, tuple[float, ...], int, float]) -> tuple[Published, ...]:
    return tuple(Published(f"bert-large-cased, {w}", s, e, v) for w, s, e, v in rows)


def _runs(one_a, one_n, eight_a, eight_n, base) -> tuple[Published, ...]:
    """Four ModelZoo runs as (scores, epochs, samples/s), then bert-base-cased as (scores, epochs)."""
    return _modelzoo(
        ("1p competitor A", *one_a),
        ("1p Ascend NPU", *one_n),
        ("8p competitor A", *eight_a),
        ("8p Ascend NPU", *eight_n),
    ) + (Published("bert-base-cased, Hugging Face README", *base),)


_SENTENCES = ("sentence1", "sentence2")
_ROWS = (
    GlueTask(
        name="cola",
        folder="CoLA",
        columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews_correlation",),
        headline="matthews_correlation",
        tsv={
            "train": TsvFile("train.tsv", (3,), 1),
            "validation": TsvFile("dev.tsv", (3,), 1),
            "test": TsvFile("test.tsv", ("sentence",)),
        },
        rows={"train": 8551, "validation": 1043, "test": 1063},
        leaderboard={"test": "CoLA.tsv"},
        published=_runs(
            ((63.81,), 3, 242.865),
            ((63.23,), 3, 203.362),
            ((58.3,), 3, 1474.32),
            ((62.16,), 3, 1340.928),
            ((56.53,), 3),
        ),
    ),
    GlueTask(
        name="sst2",
        folder="SST-2",
        columns=("sentence",),
        labels=("negative", "positive"),
        metrics=("accuracy",),
        headline="accuracy",
        tsv=_tsv(("sentence",), "label"),
        rows={"train": 67349, "validation": 872, "test": 1821},
        leaderboard={"test": "SST-2.tsv"},
        published=_runs(
            ((93.0,), 3, 242.869),
            ((93.92,), 3, 208.024),
            ((92.78,), 3, 1606.601),
            ((93.0,), 3, 1490.631),
            ((92.32,), 3),
        ),
    ),
    GlueTask(
        name="mrpc",
        folder="MRPC",
        columns=_SENTENCES,
        labels=("not_equivalent", "equivalent"),
        metrics=_BINARY_F1,
        headline="f1",
        tsv=_tsv(("#1 String", "#2 String"), "Quality"),
        rows={"train": 3668, "validation": 408, "test": 1725},
        leaderboard={"test": "MRPC.tsv"},
        published=_runs(
            ((90.17,), 5, 244.989),
            ((90.29,), 5, 207.063),
            ((84.86,), 5, 666.44),
            ((87.23,), 5, 1120.797),
            ((88.85,), 5),
        ),
    ),
    GlueTask(
        name="stsb",
        folder="STS-B",
        columns=_SENTENCES,
        labels=(),
        metrics=("pearson", "spearmanr"),
        headline="spearmanr",
        tsv=_tsv(_SENTENCES, "score"),
        rows={"train": 5749, "validation": 1500, "test": 1379},
        score_range=(0.0, 5.0),
        leaderboard={"test": "STS-B.tsv"},
        published=_runs(
            ((88.92,), 3, 246.16),
            ((89.49,), 3, 201.876),
            ((85.74,), 5, 876.796),
            ((87.43,), 5, 1237.05),
            ((88.48,), 3),
        ),
    ),
    GlueTask(
        name="qqp",
        folder="QQP",
        columns=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=_BINARY_F1,
        headline="f1",
        tsv=_tsv(("question1", "question2"), "is_duplicate"),
        rows={"train": 363846, "validation": 40430, "test": 390965},
        leaderboard={"test": "QQP.tsv"},
        published=_runs(
            ((87.03,), 3, 242.804),
            ((87.97,), 3, 207.756),
            ((88.02,), 3, 1694.026),
            ((87.67,), 3, 1511.692),
            ((87.49,), 3),
        ),
    ),
    GlueTask(
        name="mnli",
        folder="MNLI",
        columns=("premise", "hypothesis"),
        labels=_NLI,
        metrics=("accuracy",),
        headline="accuracy",
        evaluation=(
            EvaluationSplit("validation_matched"),
            EvaluationSplit("validation_mismatched", key_suffix="_mm", file_suffix="-mm"),
        ),
        test=(PredictionSplit("test_matched"), PredictionSplit("test_mismatched", file_suffix="-mm")),
        tsv={
            "train": TsvFile("train.tsv", _SENTENCES, "gold_label"),
            "validation_matched": TsvFile("dev_matched.tsv", _SENTENCES, "gold_label"),
            "validation_mismatched": TsvFile("dev_mismatched.tsv", _SENTENCES, "gold_label"),
            "test_matched": TsvFile("test_matched.tsv", _SENTENCES),
            "test_mismatched": TsvFile("test_mismatched.tsv", _SENTENCES),
        },
        rows={
            "train": 392702,
            "validation_matched": 9815,
            "validation_mismatched": 9832,
            "test_matched": 9796,
            "test_mismatched": 9847,
        },
        leaderboard={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        leaderboard_names=True,
        published=_runs(
            ((86.71, 86.8), 3, 245.052),
            ((86.46, 86.09), 3, 207.809),
            ((86.36, 86.36), 3, 1726.692),
            ((85.19, 85.33), 3, 1511.887),
            ((83.91, 84.10), 3),
        ),
    ),
    GlueTask(
        name="qnli",
        folder="QNLI",
        columns=("question", "sentence"),
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        headline="accuracy",
        tsv=_tsv(("question", "sentence"), "label"),
        rows={"train": 104743, "validation": 5463, "test": 5463},
        leaderboard={"test": "QNLI.tsv"},
        leaderboard_names=True,
        published=_runs(
            ((91.82,), 3, 242.437),
            ((91.9,), 3, 208.137),
            ((91.95,), 3, 1700.906),
            ((91.10,), 3, 1498.031),
            ((90.66,), 3),
        ),
    ),
    GlueTask(
        name="rte",
        folder="RTE",
        columns=_SENTENCES,
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        headline="accuracy",
        tsv=_tsv(_SENTENCES, "label"),
        rows={"train": 2490, "validation": 277, "test": 3000},
        leaderboard={"test": "RTE.tsv"},
        leaderboard_names=True,
        published=_runs(
            ((65.34,), 5, 242.835),
            ((68.75,), 5, 204.021),
            ((58.12,), 5, 1042.305),
            ((65.34,), 5, 1010.221),
            ((65.70,), 3),
        ),
    ),
    GlueTask(
        name="wnli",
        folder="WNLI",
        columns=_SENTENCES,
        labels=("not_entailment", "entailment"),
        metrics=("accuracy",),
        headline="accuracy",
        tsv=_tsv(_SENTENCES, "label"),
        rows={"train": 635, "validation": 71, "test": 146},
        leaderboard={"test": "WNLI.tsv"},
        published=_runs(
            ((50.7,), 1, 239.393),
            ((54.69,), 1, 205.816),
            ((43.66,), 1, 498.107),
            ((55.32,), 1, 338.084),
            ((56.34,), 5),
        ),
    ),
    GlueTask(
        name="ax",
        folder="diagnostic",
        columns=("premise", "hypothesis"),
        labels=_NLI,
        metrics=("matthews_correlation",),
        headline="matthews_correlation",
        evaluation=(),
        tsv={"test": TsvFile("diagnostic.tsv", _SENTENCES)},
        rows={"test": 1104},
        predicted_with="mnli",
        leaderboard={"test": "AX.tsv"},
        leaderboard_names=True,
    ),
)
TASKS: dict[str, GlueTask] = {task.name: task for task in _ROWS}
TRAINABLE = tuple(name for name, task in TASKS.items() if task.predicted_with is None)


def get_task(name: str) -> GlueTask:
    """The row of a task, found by its lower-cased name.

    Raises:
        UsageError: no such task; the message has the nearest match and the choices.
    """
    task = TASKS.get(name.lower())
    if task is None:
        raise UsageError(f"--task_name: {did_you_mean('task', name, list(TASKS))}")
    return task


def also_predicted(task: GlueTask) -> tuple[GlueTask, ...]:
    """The tasks without training data that a model of `task` predicts (AX with MNLI)."""
    return tuple(other for other in TASKS.values() if other.predicted_with == task.name)


MULTI_LABEL_METRICS = ("f1_micro", "f1_macro", "f1_samples", "subset_accuracy")


def own_task(name: str, columns: tuple[str, ...], labels: tuple[str, ...], is_multi_label: bool = False) -> GlueTask:
    """A row for own data: classes `labels`, one or several per row, or a regression if there are none."""
    template = TASKS["stsb"] if not labels else TASKS["sst2"]
    if is_multi_label:
        template = replace(template, metrics=MULTI_LABEL_METRICS, headline="f1_micro", is_multi_label=True)
    return replace(
        template,
        name=name,
        folder="",
        columns=columns,
        labels=labels,
        tsv={},
        rows={"train": 0, "validation": 0, "test": 0},
        score_range=None,
        leaderboard=None,
        published=(),
        is_official=False,
    )
