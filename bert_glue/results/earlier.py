"""Merges the results of a later evaluation or prediction into those that an output folder already holds.

The entries that describe the weights (their training, their hashes) are replaced only together with the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert_glue.errors import UsageError
from bert_glue.result_keys import EVAL, PREDICT
from bert_glue.storage.files import ANALYSIS_FILE, RECORD_FILE, RESULTS_FILE, json_object

# These results of a trained model come from scoring it; the others describe its training.
_SCORED = (EVAL, PREDICT, "diagnostic_", "expectations")
_OF_SCORING = ("eval_results.json", "predict_results.json", ANALYSIS_FILE)


def check_output_folder(folder: Path, record: dict[str, Any]) -> None:
    """Before a run that does not train: its results must be of the model that `folder` holds, if it holds one.

    Args:
        record: run.json of this run.

    Raises:
        UsageError: the folder holds a trained model, and another one would be scored.
    """
    if _is_trained(folder) and not _is_same_model(folder, record):
        raise UsageError(
            f"--output_dir {folder} holds a trained model and its results, and --model_name_or_path "
            f"{record['arguments']['model_name_or_path']} is another one: choose another --output_dir"
        )


def merged(
    folder: Path, results: dict[str, Any], record: dict[str, Any], analysis: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`all_results.json`, `run.json` and `analysis.json` of a run that did not train, with what is there already.

    Returns:
        The three, as they are where the folder has nothing on this run's model. In run.json the later commands are
        the list `later`.
    """
    if not _is_same_model(folder, record):
        return results, record, analysis
    earlier, told = _read(folder / RESULTS_FILE), _read(folder / RECORD_FILE)
    added = results
    if _is_trained(folder):
        added = {name: value for name, value in results.items() if name.startswith(_SCORED)}
    later = [*(told.get("later") or []), record]
    return {**earlier, **added}, {**told, "later": later}, {**_read(folder / ANALYSIS_FILE), **analysis}


def remove_scores_of_other_weights(folder: Path) -> None:
    """Delete the scores of the weights that newly saved ones have replaced."""
    for name in _OF_SCORING:
        (folder / name).unlink(missing_ok=True)


def _is_trained(folder: Path) -> bool:
    return bool(_read(folder / RECORD_FILE).get("weights_sha256")) and (folder / "model.safetensors").is_file()


def _is_same_model(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the folder's results are those of the weights that `record` reads."""
    told, own = _read(folder / RECORD_FILE), record["model_sha256"]
    if _is_trained(folder):
        return told["weights_sha256"] in own.values()
    return bool(own) and told.get("model_sha256") == own


def _read(path: Path) -> dict[str, Any]:
    """A results file; {} where it is missing or damaged, as nothing can be kept of it then."""
    try:
        return json_object(path)
    except (OSError, ValueError):
        return {}
