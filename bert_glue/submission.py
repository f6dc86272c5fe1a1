"""Makes the GLUE leaderboard's archive from finished runs: `python -m bert_glue.submission RUN...`

Each RUN is an output folder of `run_glue.py --do_predict`. Together the runs cover the nine tasks; the run of MNLI also
covers AX. The format is that of the leaderboard's FAQ and sample archive. Each `<file>.tsv` has the header
`index<TAB>prediction` and one row per test row, in the order of the test set. It has label names for MNLI, QNLI, RTE
and AX, class numbers for the others (including WNLI), and scores in [0, 5] with 3 decimals for STS-B.

Everything is checked against GLUE's official row counts first. An error is reported with file:line and exit code 3, and
nothing is written. The same predictions give the same archive, byte for byte.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

from bert_glue.config.command_line import CommandParser
from bert_glue.data.readers import read_tsv
from bert_glue.data.tables import Problems, Table
from bert_glue.errors import CheckpointError, DataError, MachineError, exit_code_of, print_lines, run_program
from bert_glue.result_keys import predicted_samples_key, predictions_file
from bert_glue.storage.files import RECORD_FILE, read_json_object, read_results, write_whole
from bert_glue.tasks import SAMPLE_NOTE, TASKS, GlueTask, also_predicted, get_task

_HEADER = ["index", "prediction"]
_SAMPLE_MARK = "SAMPLE-DATA-NOT-GLUE.txt"


@dataclass(frozen=True)
class Entry:
    """One file of the archive: a test split of a task.

    Args:
        file: name in the archive.
        suffix: `file_suffix` of the split.
        rows: official number of rows.
    """

    task: GlueTask
    file: str
    suffix: str
    rows: int

    @property
    def results(self) -> str:
        """The file's name in a run's folder."""
        return predictions_file(self.task.name, self.suffix)


def entries_of(task: GlueTask) -> list[Entry]:
    """The files of a task in the archive."""
    files = task.leaderboard or {}
    return [
        Entry(task, files[split.name], split.file_suffix, task.rows[split.name])
        for split in task.test
        if split.name in files
    ]


ENTRIES: tuple[Entry, ...] = tuple(entry for task in TASKS.values() for entry in entries_of(task))


def collect(runs: list[Path], allow_sample: bool = False) -> tuple[dict[str, list[str]], list[str]]:
    """Checked predictions of the runs.

    Returns:
        File name -> values in row order, and one line per file that names its source.

    Raises:
        DataError: a run has sample or own data; rows, order or labels differ from GLUE's; or two runs give one file.
    """
    found: dict[str, list[str]] = {}
    origin: dict[str, Path] = {}
    problems = Problems("the runs")
    for run in runs:
        try:
            results = _results(run, allow_sample)
            task = get_task(results["task_name"])
            own = [entry for part in (task, *also_predicted(task)) for entry in entries_of(part)]
            for entry in own:
                if (run / entry.results).is_file():
                    if entry.file in origin:
                        raise DataError(
                            f"{run}: {entry.file} also comes from {origin[entry.file]}; give only one of them"
                        )
                    found[entry.file] = _values(entry, run, results)
                    origin[entry.file] = run
            if not any((run / entry.results).is_file() for entry in own):
                raise DataError(f"{run} has no predictions of {task.name}; run it with --do_predict")
        except DataError as error:
            for line in str(error).splitlines():
                problems.add_line(line)
    problems.raise_any()
    return found, [f"{file}: {len(found[file])} rows from {origin[file]}" for file in found]


def _results(run: Path, allow_sample: bool) -> dict:
    """all_results.json of a run on GLUE data.

    Raises:
        DataError: the file does not exist, or its run had sample data, own data or no GLUE task.
    """
    try:
        results, provenance = read_results(run), read_json_object(run / RECORD_FILE)
    except MachineError as error:
        raise DataError(str(error)) from None
    if results.get("sample_data") and not allow_sample:
        raise DataError(f"{run}: {SAMPLE_NOTE}; give --allow_sample to make a marked archive for a dry run")
    if results.get("task_name") not in TASKS:
        raise DataError(f"{run}: {results.get('task_name')!r} is not a GLUE task")
    arguments = provenance.get("arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"{run / RECORD_FILE}: it does not have the arguments of a run")
    for flag in ("test_file", "dataset_name"):
        if arguments.get(flag):
            raise DataError(f"{run} predicts --{flag} {arguments[flag]}, which may not be GLUE's test set")
    return results


def _values(entry: Entry, run: Path, results: dict) -> list[str]:
    """The predictions of one file in the leaderboard's format.

    Raises:
        DataError: file:line of the first five errors.
    """
    path = run / entry.results
    told = results.get(predicted_samples_key(entry.task.name, entry.suffix))
    table = read_tsv(path)
    if list(table.columns) != _HEADER:
        raise DataError(f"{path}:1: the header must be index<TAB>prediction, not {', '.join(table.columns)}")
    if told != len(table):
        raise DataError(
            f"{path}: {len(table)} rows, but all_results.json says {told}; the file may be from an earlier run"
        )
    if not results.get("sample_data") and len(table) != entry.rows:
        raise DataError(f"{path}: {len(table)} rows; {entry.file} has {entry.rows} (--max_predict_samples?)")
    problems = Problems(str(path))
    for row, index in enumerate(table.columns["index"]):
        if index != str(row):
            problems.add(
                table.where(row), f"index {index!r} instead of {row}; the rows are not in the order of the test set"
            )
    values = _scores(entry.task, table, problems) if entry.task.is_regression else _labels(entry.task, table, problems)
    problems.raise_any()
    return values


def _labels(task: GlueTask, table: Table, problems: Problems) -> list[str]:
    written = {name: name if task.leaderboard_names else str(at) for at, name in enumerate(task.labels)}
    values = []
    for row, label in enumerate(table.columns["prediction"]):
        if label not in written:
            problems.add(table.where(row), f"label {label[:40]!r} is not one of: {', '.join(task.labels)}")
        values.append(written.get(label, ""))
    return values


def _scores(task: GlueTask, table: Table, problems: Problems) -> list[str]:
    low, high = task.score_range
    values = []
    for row, text in enumerate(table.columns["prediction"]):
        try:
            score = float(text)
        except ValueError:
            score = float("nan")
        if not low <= score <= high:  # this also refuses NaN
            problems.add(table.where(row), f"score {text[:40]!r} is not a number in [{low:g}, {high:g}]")
        values.append(f"{score:.3f}")
    return values


def fill(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """One constant for each missing file: the first class, or the middle of the scores."""
    constants = {}
    for entry in ENTRIES:
        if entry.file not in found:
            task = entry.task
            value = f"{sum(task.score_range) / 2:.3f}" if task.is_regression else "0"
            constants[entry.file] = [task.labels[0] if task.leaderboard_names else value] * entry.rows
    return constants


def archive(files: dict[str, list[str]], is_sample: bool) -> bytes:
    """The zip archive. The same files give the same bytes at any time on any machine."""
    contents = {
        name: "\n".join(["\t".join(_HEADER), *(f"{row}\t{value}" for row, value in enumerate(values))]) + "\n"
        for name, values in files.items()
    }
    if is_sample:
        contents[_SAMPLE_MARK] = f"{SAMPLE_NOTE}: a dry run, do not submit\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in sorted(contents):
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system, member.external_attr = 3, 0o644 << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(member, contents[name], compresslevel=9)
    return buffer.getvalue()


def build(runs: list[Path], output: Path, partial: bool, allow_sample: bool) -> list[str]:
    """Writes the archive. Returns lines about its content.

    Raises:
        DataError: predictions are invalid, or files are missing and `partial` is False.
        CheckpointError: `output` cannot be written.
    """
    found, lines = collect(runs, allow_sample)
    constants = fill(found)
    if constants and not partial:
        # AX belongs to the run of the task whose model predicts it.
        names = (entry.task.predicted_with or entry.task.name for entry in ENTRIES if entry.file in constants)
        tasks = ", ".join(dict.fromkeys(names))
        raise DataError(
            f"missing: {', '.join(constants)} (tasks: {tasks}); the leaderboard accepts only complete archives. "
            "Give their runs, or --partial to fill them with a constant"
        )
    lines += [
        f"{name}: no run; every row is {values[0]!r}, so its score has no meaning" for name, values in constants.items()
    ]
    is_sample = any(read_results(run).get("sample_data") for run in runs)
    content = archive({**found, **constants}, is_sample)
    try:
        write_whole(output, content)
    except OSError as error:
        raise CheckpointError(f"--output {output} cannot be written: {error.strerror}") from error
    lines.append(f"wrote {output}" + (f" ({SAMPLE_NOTE}: a dry run, do not submit)" if is_sample else ""))
    return lines


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage, 3 the leaderboard would not accept the predictions, 6 not written."""
    parser = CommandParser(
        same={"output_dir": "output"},
        prog="python -m bert_glue.submission",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run with --do_predict")
    parser.add_argument("--output", type=Path, default=Path("submission.zip"), help="default: submission.zip")
    parser.add_argument("--partial", action="store_true", help="fill the files of missing runs with a constant")
    parser.add_argument(
        "--allow_sample", action="store_true", help="allow sample data for a dry run; the archive is marked"
    )
    args = parser.parse_args(argv)

    def write() -> int:
        print_lines(*build(args.runs, args.output, args.partial, args.allow_sample))
        return 0

    return exit_code_of(write)


if __name__ == "__main__":
    run_program(main)
