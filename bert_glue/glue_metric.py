"""The GLUE metrics as a local module of the `evaluate` library, without hub or network.

    evaluate.load("bert_glue/glue_metric.py", "mrpc").compute(predictions=[...], references=[...])

`evaluate` copies this file into its cache and runs the copy, so this file imports everything by its full name. Run it
from the repository root, or install the package.
"""

from __future__ import annotations

import datasets
import evaluate

from bert_glue.evaluation.metrics import compute_metrics
from bert_glue.tasks import get_task

_DESCRIPTION = "Metrics of the GLUE benchmark, computed by scikit-learn and scipy as bert_glue.evaluation.metrics does."
_CITATION = "Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019"
_INPUTS = """
Args:
    predictions: class ids, or scores for a regression task.
    references: labels of the same kind.
Returns:
    metric name -> value; None if there is no value (constant scores, no rows), with the cause in `reasons`.
"""


class Glue(evaluate.Metric):
    """One task's metrics; the configuration name is the task name."""

    def _info(self) -> evaluate.MetricInfo:
        # Raises UsageError with the nearest match for an unknown task.
        kind = "float64" if get_task(self.config_name).is_regression else "int64"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(predictions=datasets.Value(kind), references=datasets.Value(kind)),
            format="numpy",
        )

    def _compute(self, predictions, references) -> dict:
        scores = compute_metrics(get_task(self.config_name), predictions, references)
        return {**scores, "reasons": scores.reasons} if scores.reasons else dict(scores)
