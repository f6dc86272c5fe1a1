"""The launchers' calls to Python: check task and recipe, and print the final lines of a finished run.

    python -m bert_glue.launch.results task MRPC --recipe stable  -> "mrpc 5", epochs of bert-base-cased
    python -m bert_glue.launch.results baseline perf.json         -> exit code 2 if it is not valid
    python -m bert_glue.launch.results report OUTPUT --case perf  -> final lines, <CaseName>.log, perf.json,
                                                                     train_<CaseName>_loss.txt

The harnesses of Ascend ModelZoo read these lines and the keys of the log, so their names stay although some are odd
("images/sec"). Every figure comes from `all_results.json`. A figure that was not measured is `null` with the reason,
never 0.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from pathlib import Path, PurePath
from typing import Any

from bert_glue import result_keys as keys
from bert_glue.config.files import recipe_file
from bert_glue.errors import CheckpointError, MachineError, exit_code_of, print_lines
from bert_glue.results.perf import compare, perf_of, read_baseline
from bert_glue.results.records import is_list, is_object
from bert_glue.storage.files import STATE_FILE, json_text, read_json_object, read_results, write_whole
from bert_glue.tasks import SAMPLE_NOTE, base_epochs


def figure(results: dict[str, Any], key: str, digits: int, absent: str = "not measured") -> str:
    """A number as text, or `null (reason)`. The reason is the one in the results, or else `absent`."""
    value = results.get(key)
    if isinstance(value, int | float):
        return f"{value:.{digits}f}"
    return f"null ({results.get(keys.reason_key(key)) or absent})"


def accuracy(results: dict[str, Any]) -> str:
    """The headline metric in [-1, 1], under any name."""
    key = keys.headline_key_of(results)
    return figure(results, key, 4, "undefined" if key in results else "this run did not evaluate")


def final_lines(results: dict[str, Any]) -> list[str]:
    """The last lines of a launcher's output."""
    speed = figure(results, keys.TRAIN_SAMPLES_PER_SECOND, 3)
    note = f" ({SAMPLE_NOTE})" if results.get("sample_data") else ""
    return [
        f"Final Performance samples/sec : {speed}{note}",
        f"Final Performance images/sec : {speed}{note}",
        f"Final Train Accuracy : {accuracy(results)}{note}",
        f"E2E Training Duration sec : {figure(results, keys.E2E_RUNTIME, 1)}{note}",
    ]


def step_milliseconds(results: dict[str, Any]) -> str:
    """Mean time of an optimizer step in ms; ModelZoo's harness calls it TrainingTime."""
    if not results.get(keys.TRAIN_SAMPLES_PER_SECOND):
        return figure(results, keys.TRAIN_SAMPLES_PER_SECOND, 2)
    return f"{1000 * results[keys.TRAIN_TIMED_SECONDS] / results[keys.TRAIN_TIMED_STEPS]:.2f}"


def case_log(results: dict[str, Any], case: str) -> dict[str, str]:
    """Keys and values of `<CaseName>.log`."""
    network = PurePath(results.get("model_name_or_path") or "unnamed").name
    batch, ranks = results["per_device_train_batch_size"], results["world_size"]
    log = {
        "Network": network,
        "RankSize": str(ranks),
        "BatchSize": str(batch),
        "DeviceType": platform.machine(),
        # The name of a file, too: nothing in it leads out of the folder.
        "CaseName": re.sub(r"[^\w.-]", "_", f"Bert_{network}_{results['task_name']}_bs{batch}_{ranks}p_{case}"),
        "ActualFPS": figure(results, keys.TRAIN_SAMPLES_PER_SECOND, 3),
        "TrainingTime": step_milliseconds(results),
        "ActualLoss": figure(results, keys.TRAIN_LOSS, 6),
        "E2ETrainingTime": figure(results, keys.E2E_RUNTIME, 1),
        "TrainAccuracy": accuracy(results),
        "Device": str(results.get("device")),
    }
    if results.get("sample_data"):
        log["DataSource"] = SAMPLE_NOTE
    return log


def losses(output_dir: Path) -> list[float]:
    """The training losses that the run logged, in order; each is the mean since the one before it.

    Raises:
        MachineError: trainer_state.json is damaged.
    """
    file = output_dir / STATE_FILE
    if not file.exists():
        return []
    entries = read_json_object(file).get("log_history", [])
    if not is_list(entries, is_object):
        raise MachineError(f"{file}: log_history is not a list of objects")
    return [entry["loss"] for entry in entries if isinstance(entry.get("loss"), float)]


def report(output_dir: Path, case: str, baseline: Path | None = None) -> None:
    """Print the final lines; write `<CaseName>.log`, `train_<CaseName>_loss.txt`, and of a performance run `perf.json`.

    Args:
        output_dir: folder of a finished run.
        case: acc or perf.
        baseline: the `perf.json` with which this run is compared.

    Raises:
        MachineError: the results are missing, or lack a key that every run has.
        CheckpointError: a file cannot be written.
        UsageError, BaselineError: see `perf.compare`.
    """
    results = read_results(output_dir)
    try:
        log = case_log(results, case)
        perf = perf_of(results) if case == "perf" else None
    except KeyError as error:
        raise MachineError(f"{output_dir}: all_results.json has no {error}") from error
    except (TypeError, ZeroDivisionError) as error:  # null or 0 where a finished run has a figure
        raise MachineError(f"{output_dir}: all_results.json is not of a finished run ({error})") from error
    text = "".join(f"{key} = {value}\n" for key, value in log.items())
    _write(output_dir / f"{log['CaseName']}.log", text)
    _write(output_dir / f"train_{log['CaseName']}_loss.txt", "".join(f"{loss:.6f}\n" for loss in losses(output_dir)))
    verdict = []
    try:
        if perf is not None and baseline is not None:
            verdict = [compare(perf, baseline)]  # before perf.json is written, because it may be the baseline itself
    finally:
        if perf is not None:
            _write(output_dir / "perf.json", json_text(perf))
        print_lines(*verdict, *final_lines(results))


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def main(argv: list[str]) -> int:
    """Exit code of one call from a launcher."""
    parser = argparse.ArgumentParser(prog="launch_results")
    commands = parser.add_subparsers(dest="command", required=True)
    of_task = commands.add_parser("task")
    of_task.add_argument("name")
    of_task.add_argument("--recipe", default="reference")
    of_report = commands.add_parser("report")
    of_report.add_argument("output_dir", type=Path)
    of_report.add_argument("--case", choices=("acc", "perf"), required=True)
    of_report.add_argument("--baseline", type=Path)
    commands.add_parser("baseline").add_argument("file", type=Path)
    arguments = parser.parse_args(argv)

    def answer() -> int:
        if arguments.command == "task":
            answer = base_epochs(arguments.name)
            recipe_file(arguments.recipe, answer[0])
            print(*answer)
        elif arguments.command == "baseline":
            read_baseline(arguments.file)
        else:
            report(arguments.output_dir, arguments.case, arguments.baseline)
        return 0

    return exit_code_of(answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
