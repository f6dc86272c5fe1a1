"""The names of the figures in a run's results: this module builds every `eval_...`, `train_...` and `predict_...` key.

Harnesses and users' scripts read these keys, so no name is ever removed. Scores are in 0..1 (correlations in -1..1),
times are in seconds. The module needs only the standard library and the table of tasks, because launchers read results
without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bert_glue.tasks import GlueTask

EVAL, TRAIN, PREDICT = "eval_", "train_", "predict_"

# Figures of an evaluated split, for `evaluation_key`.
LOSS = "loss"
MAJORITY_BASELINE = "majority_baseline"
COLLAPSED = "collapsed"
SAMPLES = "samples"
RUNTIME = "runtime"
SAMPLES_PER_SECOND = "samples_per_second"
REAL_TOKENS_PER_SECOND = "real_tokens_per_second"
CLASSES = "classes"
# Of a split with --doc_stride: sequences, and rows of more than one.
WINDOWS = "windows"
WINDOWED_ROWS = "windowed_rows"
# Rows that have text beyond the tokens that are read.
CUT_ROWS = "cut_rows"
CALIBRATION_ERROR = "ece"

TRAIN_LOSS = "train_loss"
TRAIN_RUNTIME = "train_runtime"
TRAIN_STEPS = "train_steps"
TRAIN_COLLAPSED = "train_collapsed"
TRAIN_SKIPPED_UPDATES = "train_skipped_updates"
TRAIN_SAMPLES = "train_samples"
TRAIN_SAMPLES_CONSUMED = "train_samples_consumed"
TRAIN_GRADIENT_BYTES = "train_gradient_bytes"
TRAIN_SAMPLES_PER_SECOND = "train_samples_per_second"
TRAIN_REAL_TOKENS_PER_SECOND = "train_real_tokens_per_second"
TRAIN_COMPUTED_TOKENS_PER_SECOND = "train_computed_tokens_per_second"
TRAIN_WINDOWS_PER_SECOND = "train_windows_per_second"
TRAIN_PADDING_PERCENT = "train_padding_percent"
TRAIN_TIMED_STEPS = "train_timed_steps"
TRAIN_TIMED_SECONDS = "train_timed_seconds"
TRAIN_MODEL_TFLOPS_PER_SECOND = "train_model_tflops_per_second"
TRAIN_SHARE_OF_GEMM = "train_share_of_gemm"
E2E_RUNTIME = "e2e_runtime"
STOPPED_BY_SIGNAL = "stopped_by_signal"  # true if a signal ended the run; else absent
PEAK_MEMORY_BYTES = "peak_memory_bytes"
SECONDS_TO_FIRST_STEP = "seconds_to_first_step"
CLASS_WEIGHTS = "class_weights"
CALIBRATION = "calibration"


def evaluation_key(figure: str, suffix: str = "") -> str:
    """`eval_<figure><suffix>`.

    Args:
        figure: a metric's name or one of the constants above.
        suffix: `key_suffix` of the evaluated split, such as `_mm`.
    """
    return f"{EVAL}{figure}{suffix}"


def training_key(figure: str) -> str:
    """`train_<figure>` of the training data: one of the constants above."""
    return f"{TRAIN}{figure}"


def calibrated_key(figure: str, suffix: str = "") -> str:
    """A figure of the answers that `--calibrate` chose; `evaluation_key` has the figure without it."""
    return evaluation_key(f"calibrated_{figure}", suffix)


def without_eval(name: str) -> str:
    """The figure of `eval_<figure>`; a user may write both forms."""
    return name.removeprefix(EVAL)


def is_loss(key: str) -> bool:
    """Whether a key of an evaluation is a loss, where less is better, and not a metric."""
    return key.startswith(evaluation_key(LOSS))


def is_of_evaluation(key: str) -> bool:
    """Whether only a run that evaluates has this key."""
    return key.startswith(EVAL)


def is_of_training(key: str) -> bool:
    """Whether only a run that trains has this key."""
    return key.startswith(TRAIN)


def is_measured(key: str) -> bool:
    """Whether a key holds a measured figure; the others describe the run."""
    return key.startswith((EVAL, TRAIN, PREDICT)) or key in (E2E_RUNTIME, PEAK_MEMORY_BYTES)


def predictions_file(task: str, suffix: str = "") -> str:
    """The file with the predictions on a test split; `suffix` is the split's `file_suffix`."""
    return f"predict_results_{task}{suffix}.txt"


def reason_key(key: str) -> str:
    """The key of the reason why the value of `key` is null or should not be trusted."""
    return f"{key}_reason"


def standard_error_key(metric: str, suffix: str = "") -> str:
    """The standard error of a metric, in the metric's unit."""
    return evaluation_key(f"{metric}_standard_error", suffix)


def headline_keys(task: GlueTask) -> list[str]:
    """The headline metric on each evaluation split of a task, in the table's order."""
    return [evaluation_key(task.headline, split.key_suffix) for split in task.evaluation]


def headline_key_of(results: Mapping[str, Any], suffix: str = "") -> str:
    """The key of the headline metric that the results themselves name."""
    return evaluation_key(str(results.get("headline_metric")), suffix)


def step_milliseconds_key(part: str) -> str:
    """Milliseconds of an optimizer step: `part` is median, p10 or p90."""
    return f"{TRAIN}step_ms_{part}"


def predicted_samples_key(task: str, suffix: str = "") -> str:
    """Rows predicted; `suffix` is the `file_suffix` of the split."""
    return f"{PREDICT}samples_{task}{suffix}"


def predicted_samples_per_second_key(task: str, suffix: str = "") -> str:
    """The number of rows predicted per second; `suffix` as above."""
    return f"{PREDICT}samples_per_second_{task}{suffix}"


def predicted_key(figure: str, task: str, suffix: str = "") -> str:
    """`predict_<figure>_<task>` of a test split; `suffix` as above."""
    return f"{PREDICT}{figure}_{task}{suffix}"


def diagnostic_reason_key(task: str) -> str:
    """The key of the reason why a task without training data has no scores by category."""
    return reason_key(f"diagnostic_{task}")


_TEXTS = (
    "task_name", "headline_metric", "model_name_or_path", "data", "device", "device_name", "precision", "fallback",
    "trained", "batches", "optimizer", "problem_type",
)  # fmt: skip
_NUMBERS = (
    "world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "learning_rate",
    "max_seq_length", "doc_stride", "max_windows", "seed", "epoch", "label_threshold", SECONDS_TO_FIRST_STEP,
)  # fmt: skip


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_figure(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and abs(value) < 1e300 and math.isfinite(value))


def _is_figures(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_figure, value.values()))


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_classes(value: Any) -> bool:
    shares = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(figures, dict) and all(map(_is_figure, figures.values())) for figures in shares)


def _is_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(bound, dict) for bound in value)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_TEXTS, (_is_text, "a text")),
    **dict.fromkeys(_NUMBERS, (_is_figure, "a finite number")),
    "seconds": (_is_figures, "seconds by name"),
    CLASS_WEIGHTS: (_is_figures, "weights by class"),
    "sample_data": (_is_flag, "true or false"),
    "text_columns": (_is_names, "a list of names"),
    "attention": (_is_names, "a list of texts"),
    "expectations": (_is_objects, "a list of bounds"),
}


def wrong_value(results: Mapping[str, Any]) -> str:
    """A text on the first value whose kind does not fit its key; "" if all fit. Unknown keys are accepted."""
    for key, value in results.items():
        if key in _KINDS:
            is_right, kind = _KINDS[key]
        elif COLLAPSED in key or key.endswith(reason_key("")):
            is_right, kind = _is_text, "a text"
        elif key.startswith(evaluation_key(CLASSES)):
            is_right, kind = _is_classes, "figures by class"
        elif is_measured(key):
            is_right, kind = _is_figure, "a finite number"
        else:
            continue
        if not is_right(value):
            return f"{key[:60]!r} is {str(value)[:40]!r}, not {kind}"
    return ""
