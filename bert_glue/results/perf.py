"""perf.json: the speed of a run, its setup, and a comparison with an earlier run. Standard library only."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import Any

from bert_glue import result_keys as keys
from bert_glue.errors import BaselineError, UsageError
from bert_glue.results.records import is_number
from bert_glue.storage.files import json_object

# A run may be slower than its baseline by this share: the same run twice differs by less on a quiet machine.
TOLERANCE = 0.05
FORMAT = 1
SETUP = (
    "task_name", "sample_data", "device_name", "world_size", "per_device_train_batch_size",
    "gradient_accumulation_steps", "global_batch_size", "max_seq_length", "precision", "batches",
)  # fmt: skip
_FIGURES = {
    "samples_per_second": keys.TRAIN_SAMPLES_PER_SECOND,
    "real_tokens_per_second": keys.TRAIN_REAL_TOKENS_PER_SECOND,
    "share_of_gemm": keys.TRAIN_SHARE_OF_GEMM,
    "timed_steps": keys.TRAIN_TIMED_STEPS,
    "timed_seconds": keys.TRAIN_TIMED_SECONDS,
    "seconds_to_first_step": keys.SECONDS_TO_FIRST_STEP,
    "peak_memory_bytes": keys.PEAK_MEMORY_BYTES,
}


def perf_of(results: dict[str, Any]) -> dict[str, Any]:
    """What `perf.json` holds.

    Args:
        results: `all_results.json` of a run that trained.

    Returns:
        `setup` (what two runs must share to be compared), rates of all ranks together (samples/s, real
        tokens/s), `step_ms` (milliseconds of an optimizer step: median, p10, p90, on the first rank),
        `share_of_gemm` (per rank, of a matrix product on the same device), `peak_memory_bytes` (of the
        rank with most) and `seconds` of each phase. A figure that was not measured is null, with
        `reasons`.
    """
    perf: dict[str, Any] = {"format": FORMAT, "setup": setup_of(results)}
    perf |= {name: results.get(key) for name, key in _FIGURES.items()}
    perf["step_ms"] = {part: results.get(keys.step_milliseconds_key(part)) for part in ("median", "p10", "p90")}
    perf["seconds"] = _seconds(results["seconds"])
    perf["reasons"] = {}
    if perf["seconds"]["compile"] is None:
        perf["reasons"]["seconds.compile"] = "nothing is compiled: kernels run eagerly"
    if perf["samples_per_second"] is None:
        perf["reasons"]["samples_per_second"] = results.get(
            keys.reason_key(keys.TRAIN_SAMPLES_PER_SECOND), "not measured"
        )
    elif perf["share_of_gemm"] is None:
        perf["reasons"]["share_of_gemm"] = results.get(keys.reason_key(keys.TRAIN_SHARE_OF_GEMM), "not measured")
    return perf


def setup_of(results: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the speed. A model is compared by its name, not by its folder."""
    setup = {name: results[name] for name in SETUP}
    setup["model"] = PurePath(results["model_name_or_path"] or "unnamed").name
    if "doc_stride" in results:
        setup["doc_stride"] = results["doc_stride"]
    setup["compiled"] = results.get("compiled")
    setup["device"] = results["device"].partition(":")[0]
    return setup


def _seconds(phases: dict[str, float | None]) -> dict[str, float | None]:
    """Seconds of each phase; reading and tokenizing are both `data`."""
    seconds = {"import": phases["import"], "data": phases["data"] + phases["tokenize"], "compile": phases["compile"]}
    names = {"model": "model", "train": "train", "evaluate": "eval", "predict": "predict", "save": "save"}
    return seconds | {new: phases[old] for old, new in names.items() if old in phases}


def read_baseline(file: Path) -> dict[str, Any]:
    """The `perf.json` of an earlier run.

    Raises:
        UsageError: the file cannot be read, is not a perf.json, or has no samples/s.
    """
    try:
        perf = json_object(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--baseline {file}: cannot be read ({error})") from error
    if perf.get("format") != FORMAT or not isinstance(perf.get("setup"), dict):
        raise UsageError(f"--baseline {file}: not a perf.json of this program")
    speed = perf.get("samples_per_second")
    if not is_number(speed) or speed <= 0:
        raise UsageError(f"--baseline {file}: it holds no samples/s")
    return perf


def compare(perf: dict[str, Any], file: Path) -> str:
    """Compare a run with its baseline.

    Returns:
        One line with the ratio.

    Raises:
        UsageError: the two are not of the same setup, or this run has no samples/s.
        BaselineError: this run is slower by more than `TOLERANCE`.
    """
    baseline = read_baseline(file)
    names = sorted(perf["setup"].keys() | baseline["setup"].keys())
    other = [(name, baseline["setup"].get(name), perf["setup"].get(name)) for name in names]
    differences = "; ".join(f"{name} {then!r}, now {now!r}" for name, then, now in other if then != now)
    if differences:
        raise UsageError(f"--baseline {file}: not the same setup: {differences}")
    if perf["samples_per_second"] is None:
        reason = perf["reasons"]["samples_per_second"]
        raise UsageError(f"--baseline {file}: nothing to compare, as this run has no samples/s: {reason}")
    ratio = perf["samples_per_second"] / baseline["samples_per_second"]
    line = f"{ratio:.3f} x the baseline's {baseline['samples_per_second']:.3f} samples/s ({file})"
    if ratio < 1.0 - TOLERANCE:
        raise BaselineError(f"slower than the baseline by more than {TOLERANCE:.0%}: {line}")
    return f"Performance : {line}"
