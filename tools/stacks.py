"""Runs a part of the tests on other versions of Python, torch and transformers: `bash test/run_stacks.sh`.

    python -m tools.stacks --folder FOLDER [--only NAME...] [--areas AREA...]
    python -m tools.stacks --folder FOLDER --beside     the old pure-Python packages on this python's torch

Environments are built below FOLDER, 3 to 7 GB each. In each one the areas below are tested and six steps of the
sample are trained, whose losses must equal those of the current Python. The result is a table in docs/stacks.md,
with the date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bert_glue.launch.requirements import pins

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "stacks.md"
BEGIN, END = "<!-- measured -->\n", "<!-- /measured -->\n"


class Stack(NamedTuple):
    """One set of versions. A set without torch is added on top of the current environment."""

    name: str
    python: str
    packages: dict[str, str]


_OLD = {"transformers": "4.44.2", "datasets": "3.0.0", "accelerate": "1.0.0", "huggingface_hub": "0.26.0"}
BESIDE = Stack("old packages", "", {**_OLD, "tokenizers": "0.19.1", "evaluate": "0.4.2"})
STACKS = (
    Stack("oldest", "3.10", {"torch": "2.6.0", **_OLD}),
    Stack(
        "Ascend, long-term", "3.11",
        {"torch": "2.7.1", "transformers": "4.57.1", "datasets": "4.4.1", "accelerate": "1.11.0"},
    ),
    Stack("middle", "3.12", {"torch": "2.9.1", "transformers": "5.0.0", "datasets": "4.5.0", "accelerate": "1.12.0"}),
    Stack("pinned", "3.13", dict(pins(ROOT / "requirements.txt"))),
    Stack("newest", "3.13", {"torch": "", "transformers": "", "datasets": "", "accelerate": ""}),
)  # fmt: skip
# Packages that every stack needs, in any version.
_REST = (
    "evaluate", "numpy", "scipy", "scikit-learn", "safetensors", "rich", "PyYAML", "Jinja2", "matplotlib",
    "sentencepiece", "protobuf", "pytest", "pytest-xdist", "hypothesis",
)  # fmt: skip
SHOWN = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub")

_LOOP = "tests/training/test_loop.py::"
_RUN = "tests/pipeline/test_run.py::"
_PREDICT, _UPLOAD = "tests/predict/test_predict.py::", "tests/hub/test_upload.py::"
_RANKS, _NPU = "tests/devices/test_rank_environment.py::", "tests/devices/test_npu.py::"
AREAS = {
    "resume": [
        f"{_LOOP}test_a_run_resumed_in_mid_epoch_is_bit_for_bit_the_same",
        f"{_RUN}test_sigterm_saves_a_checkpoint_and_the_second_run_goes_on",
    ],
    "packed = padded": [f"{_LOOP}test_packed_is_the_padded_run"],
    "tokenizers": ["tests/data/test_tokenization.py"],
    "saved folder": [
        f"{_RUN}test_the_saved_folder_works_in_transformers_and_gives_the_same_metric",
        "tests/model/test_family_folders.py",
    ],
    "predict": [
        f"{_PREDICT}test_labels_are_those_of_run_glue",
        f"{_PREDICT}test_probabilities_are_transformers_own",
        f"{_PREDICT}test_standard_input_to_standard_output",
    ],
    "hub": ["tests/data/test_hub_datasets.py", f"{_UPLOAD}test_the_model_its_card_and_scores_are_sent_and_no_secret"],
    "launchers": ["tests/devices/test_distributed.py::test_a_launch_of_ours_saves_on_a_signal_and_goes_on"],
    "two ranks": [f"{_RUN}test_two_ranks_are_one_with_the_same_global_batch", f"{_RANKS}test_torchrun"],
    "simulated NPU": [
        f"{_NPU}test_the_recipe_equals_the_hosts", f"{_NPU}test_each_precision", f"{_NPU}test_two_ranks_equal_one",
    ],
}  # fmt: skip
_EQUAL = 1e-5  # for losses near 0.7: another torch sums in another order
# The areas for the gate, which must end within minutes.
_QUICK = ("resume", "saved folder", "tokenizers", "two ranks")
_TRAINING = (
    "run_glue.py", "--sample", "--task_name", "mrpc", "--do_train", "--max_steps", "6", "--logging_steps", "1",
    "--device", "cpu", "--report_to", "none",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Builds and tests the stacks, and writes the table. Returns 1 if anything failed, else 0."""
    parser = argparse.ArgumentParser(prog="tools.stacks", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder of the environments, which are kept")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help=", ".join(s.name for s in STACKS))
    parser.add_argument("--areas", nargs="*", default=list(AREAS), choices=AREAS, metavar="AREA", help=", ".join(AREAS))
    parser.add_argument("--beside", action="store_true", help="only the old packages, on the torch of this python")
    args = parser.parse_args(argv)
    losses = train(Path(sys.executable))
    if args.beside:
        return _examine_beside(args.folder, losses)
    rows = []
    for stack in (stack for stack in STACKS if not args.only or stack.name in args.only):
        rows.append(examine(stack, build(stack, args.folder), losses, tuple(args.areas)))
        print(json.dumps(rows[-1]), flush=True)
        write_page(rows)
    return int(not all(map(is_sound, rows)))


def _examine_beside(folder: Path, losses: list[float]) -> int:
    """Prints one line for the gate. Without a package index nothing can be installed: a note, and no failure."""
    try:
        python = beside(BESIDE, folder)
    except subprocess.CalledProcessError as error:
        print(f"stacks: skipped, {BESIDE.packages} could not be installed: {error}", file=sys.stderr)
        return 0
    row = examine(BESIDE, python, losses, _QUICK)
    print("stacks:", "as here" if is_sound(row) else "NOT as here", json.dumps(row))
    return int(not is_sound(row))


def build(stack: Stack, folder: Path) -> Path:
    """The Python of the stack's environment, which is built if it does not exist."""
    place = folder / stack.name.replace(" ", "-").replace(",", "")
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        base = shutil.which(f"python{stack.python}") or sys.exit(f"python{stack.python} is not on the PATH")
        subprocess.run([base, "-m", "venv", "--clear", str(place)], check=True)
        wanted = [f"{name}=={version}" if version else name for name, version in stack.packages.items()]
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-cache-dir", *wanted, *_REST], check=True)
        (place / "complete").touch()
    return python


def beside(stack: Stack, folder: Path) -> Path:
    """The Python of an environment whose packages hide those of the current one."""
    place = folder / stack.name.replace(" ", "-")
    python = place / "bin" / "python"
    if not (place / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        site = next((place / "lib").glob("python*/site-packages"))
        (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        wanted = [f"{name}=={version}" for name, version in stack.packages.items()]
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--retries", "1", *wanted], check=True)
        (place / "complete").touch()
    return python


def examine(stack: Stack, python: Path, losses: list[float], areas: tuple[str, ...]) -> dict:
    """One row of the table: versions, the largest difference of a loss, and "passed", "n failed" by area."""
    trained = train(python)
    is_whole = len(trained) == len(losses) > 0
    difference = max(abs(a - b) for a, b in zip(trained, losses, strict=True)) if is_whole else None
    # Two areas at once, each on one thread: half of the time on the two cores that a gate has.
    with ThreadPoolExecutor(2) as pool:
        counts = pool.map(lambda area: tested(python, AREAS[area], python.parents[1] / f"{area}.xml"), areas)
    return {
        "stack": stack.name,
        "versions": versions(python),
        "loss_difference": difference,
        "areas": dict(zip(areas, counts, strict=True)),
    }


def is_sound(row: dict) -> bool:
    """Whether every area passed and the losses are equal to rounding."""
    difference = row["loss_difference"]
    return difference is not None and difference < _EQUAL and not any(map(_failures, row["areas"].values()))


def _failures(counts: dict[str, int]) -> int:
    return counts["failed"] or int(not counts["passed"] and not counts["skipped"])


def train(python: Path) -> list[float]:
    """The losses of six steps of the sample; [] if it does not run."""
    with tempfile.TemporaryDirectory() as folder:
        done = _run(python, *_TRAINING, "--output_dir", folder)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            return []
        history = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]


def versions(python: Path) -> dict[str, str]:
    """The versions of Python and of the packages in `SHOWN`."""
    code = (
        "import json, platform\nfrom importlib.metadata import version\n"
        f"print(json.dumps({{'python': platform.python_version()}} | {{n: version(n) for n in {SHOWN!r}}}))"
    )
    return json.loads(_run(python, "-c", code).stdout)


def tested(python: Path, tests: list[str], report: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped; reasons go to the screen. What did not run counts as failed.

    Args:
        report: the report of pytest on each test, which is kept for debugging.
    """
    report.unlink(missing_ok=True)
    # A test that is named individually runs even if it is slow.
    selection = [] if all("::" in name for name in tests) else ["-m", "not slow"]
    done = _run(python, "-m", "pytest", "-q", "-ra", "--tb=short", *selection, f"--junitxml={report}", *tests)
    if not report.exists():
        print(done.stdout[-3000:], done.stderr[-2000:], file=sys.stderr)
        return {"passed": 0, "failed": 1, "skipped": 0}
    kinds = ("FAILED", "ERROR", "SKIPPED")
    print(*(line for line in done.stdout.splitlines() if line.startswith(kinds)), sep="\n", flush=True)
    return _counts(report)


def _counts(report: Path) -> dict[str, int]:
    from xml.etree import ElementTree  # our own pytest wrote it

    suite = ElementTree.parse(report).getroot().find("testsuite")
    failed, skipped = (int(suite.get("failures")) + int(suite.get("errors")), int(suite.get("skipped")))
    return {"passed": int(suite.get("tests")) - failed - skipped, "failed": failed, "skipped": skipped}


def _run(python: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([python, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def write_page(rows: list[dict]) -> None:
    """Writes the table into docs/stacks.md. Rows of other stacks stay unchanged."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    old, after = rest.split(END)
    kept = [
        line for line in old.splitlines()[2:] if line and line.split("|")[1].strip() not in {r["stack"] for r in rows}
    ]
    heads = ["stack", "python", *SHOWN, "losses", *AREAS, "measured"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *map(table_row, rows), *kept]
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


def table_row(row: dict) -> str:
    """One row of the table in markdown."""
    difference = row["loss_difference"]
    cells = [row["stack"], row["versions"]["python"], *(row["versions"][name] for name in SHOWN)]
    cells.append(
        "do not run" if difference is None else "equal" if difference < _EQUAL else f"differ by {difference:.1e}"
    )
    cells += [_area_cell(row["areas"].get(area)) for area in AREAS]
    return f"| {' | '.join([*cells, f'{datetime.date.today()}, {platform.machine()}'])} |"


def _area_cell(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "not run"
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if counts[name])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
