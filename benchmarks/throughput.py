"""Compares the speed of bert_glue and the stock Hugging Face Trainer on equal rows, model, threads and precision.

    python benchmarks/throughput.py --model FOLDER --data_path GLUE --json out.json
    python benchmarks/throughput.py --shape bert-base --vocab vocab.txt --data_path GLUE --json out.json
    python benchmarks/throughput.py --families modernbert,mpnet,deberta-v2 --vocab vocab.txt --data_path GLUE \
        --tasks mrpc,cola --runs ours,hf_best --json benchmarks/results/families-runs-cpu.json
    python benchmarks/throughput.py --json out.json --table

A round runs `ours`, `hf_default` (padded to 128, the default of Hugging Face's run_glue.py) and `hf_best`
(padded to each batch's longest, similar lengths together) one after the other, each in its own process,
on `--rows` random training rows. The load of a machine changes, so ratios are formed only inside one round, and their
median is printed. Rates are real tokens per second after the first steps. On a GPU a step is recorded, and layers are
compiled, at the first batches of each shape, so the first 60 of at least 120 steps are left out there. hf_default
computes 128 tokens for every row, so `--default_steps` steps of it are enough. `sst2-like` replaces SST-2 where it is
missing: single sentences (hypotheses of MNLI) with 14 tokens on average.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import FAMILY_SHAPES, write_family, write_model  # noqa: E402
from bert_glue import result_keys as keys  # noqa: E402
from bert_glue.storage.files import read_results  # noqa: E402

RUNS = ("ours", "hf_default", "hf_best")
SENTENCES_LIKE = {"sst2-like": ("sst2", "mnli")}  # name -> (task it is run as, task whose second texts it takes)
_LEAST_WORDS = 4  # shorter hypotheses left out, the rest have 14 tokens on average
# Training rows, steps that are left out at the start, and steps of hf_default: on a CPU, and on a device.
_ON_HOST, _ON_DEVICE = (512, 2, 6), (3840, 60, 120)
FIGURES = ("real_tokens_per_second", "seconds_to_first_step", "seconds_to_end", "peak_bytes", "eval_tokens_per_second")


def write_rows(folder: Path, task_name: str, data_path: str, rows: int) -> tuple[str, Path]:
    """Task to run as, and a jsonl folder with `rows` random rows of its training and validation splits."""
    from bert_glue.config.arguments import Arguments
    from bert_glue.data.sources import load_task_data

    run_as, source = SENTENCES_LIKE.get(task_name, (task_name, task_name))
    data = load_task_data(Arguments(task_name=source, data_path=data_path), frozenset({"train", "evaluation"}))
    labels = data.task.labels
    for split in ("train", data.task.evaluation[0].name):
        found = data.splits[split]
        order = np.random.default_rng(0).permutation(len(found)).tolist()
        if run_as != source:
            texts = [found.texts[1][at] for at in order if len(found.texts[1][at].split()) >= _LEAST_WORDS]
            lines = [{"sentence": text, "label": at % 2} for at, text in enumerate(texts[:rows])]
        else:
            lines = [
                {column: text[at] for column, text in zip(data.task.columns, found.texts, strict=True)}
                | {"label": labels[found.labels[at]] if labels else found.labels[at]}
                for at in order[:rows]
            ]
        file = folder / split.partition("_")[0] / "rows.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run_as, folder


def command(run: str, args: argparse.Namespace, task: str, data: Path, out: Path, scores: bool) -> list[str]:
    """The process of one measurement; its results go to `out`."""
    shared = ["--data_path", str(data), "--max_seq_length", "128", "--learning_rate", "5e-5"]
    if run == "ours":
        return [
            sys.executable, str(ROOT / "run_glue.py"), "--model_name_or_path", args.model, "--task_name", task,
            *shared, "--do_train", "--num_train_epochs", "1", "--per_device_train_batch_size", "32",
            "--per_device_eval_batch_size", "32", "--output_dir", str(out), "--save_strategy", "no",
            "--skip_steps", str(args.skip_steps), *(["--do_eval"] if scores else []), *args.extra,
        ]  # fmt: skip
    steps = ["--train_steps", str(args.default_steps)] if run == "hf_default" else ["--epochs", "1"]
    return [
        sys.executable, str(ROOT / "benchmarks" / "hf_recipe.py"), "--model", args.model, "--task", task, *shared,
        "--padding", "max_length" if run == "hf_default" else "grouped", *steps, "--batch_size", "32",
        "--skip_steps", str(args.skip_steps), "--json", str(out / "hf.json"), *(["--eval"] if scores else []),
        *(["--precision", "bf16"] if "--bf16" in args.extra else []),
    ]  # fmt: skip


def measure(run: str, args: argparse.Namespace, task: str, data: Path, scores: bool) -> dict[str, float | None]:
    """One process: `FIGURES`, and for ours its share of the device's matrix-product rate."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        threads = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
        asked = command(run, args, task, data, out, scores)
        done = subprocess.run(asked, env={**os.environ, **threads}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{run} on {task} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        if run == "ours":
            r = read_results(out)
            return {
                "real_tokens_per_second": r[keys.TRAIN_REAL_TOKENS_PER_SECOND],
                "seconds_to_first_step": r[keys.SECONDS_TO_FIRST_STEP],
                "seconds_to_end": r[keys.E2E_RUNTIME],
                "peak_bytes": r[keys.PEAK_MEMORY_BYTES],
                "eval_tokens_per_second": r.get(keys.evaluation_key(keys.REAL_TOKENS_PER_SECOND)),
                "share_of_gemm": r[keys.TRAIN_SHARE_OF_GEMM],
                "padding_percent": r[keys.TRAIN_PADDING_PERCENT],
            }
        r = json.loads((out / "hf.json").read_text(encoding="utf-8"))
        scored = next(iter(r["evaluation"].values()), None)
        return {
            "real_tokens_per_second": r["real_tokens_per_second"],
            "seconds_to_first_step": r["process_start_to_first_step_s"],
            # The time of a run with fewer steps would say nothing about a whole run.
            "seconds_to_end": None if run == "hf_default" else r["process_start_to_end_s"],
            "peak_bytes": r["peak_device_bytes"] or r["training_peak_rss_bytes"],
            "eval_tokens_per_second": scored and scored["real_tokens"] / scored["seconds"],
            "padding_percent": r["padding_percent"],
        }


def ratios(rounds: list[dict]) -> dict[str, float]:
    """Median over rounds of ours over each other run, figure by figure."""
    result = {}
    for other in RUNS[1:]:
        for name in FIGURES:
            pairs = [(r["ours"][name], r[other][name]) for r in rounds if other in r]
            known = [ours / theirs for ours, theirs in pairs if ours and theirs]
            if known:
                result[f"{name}_vs_{other}"] = statistics.median(known)
    ours = [r["ours"] for r in rounds]
    result["share_of_gemm"] = statistics.median(r["share_of_gemm"] for r in ours)
    result["real_tokens_per_second"] = statistics.median(r["real_tokens_per_second"] for r in ours)
    return result


def table(report: dict) -> str:
    """Markdown of one report: ratios of ours, a task a line."""
    columns = {
        "tokens/s vs HF default": "real_tokens_per_second_vs_hf_default",
        "vs HF best": "real_tokens_per_second_vs_hf_best",
        "real tokens/s": "real_tokens_per_second",
        "share of GEMM": "share_of_gemm",
        "evaluation vs HF default": "eval_tokens_per_second_vs_hf_default",
        "start to first step": "seconds_to_first_step_vs_hf_default",
        "start to end vs HF best": "seconds_to_end_vs_hf_best",
        "peak memory vs HF default": "peak_bytes_vs_hf_default",
        "vs HF best ": "peak_bytes_vs_hf_best",
    }
    lines = [f"| task | {' | '.join(columns)} |", "|" + "---|" * (len(columns) + 1)]
    for task, result in report["tasks"].items():
        found = ratios(result["rounds"])
        cells = [_cell(key, found.get(key)) for key in columns.values()]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(small: dict, large: dict) -> list[str]:
    """Lines of the table in docs/results.md, a task each, of two reports over the same tasks."""
    speed, share = "real_tokens_per_second_vs_hf_default", "share_of_gemm"
    keys = (
        speed, "real_tokens_per_second_vs_hf_best", share, "seconds_to_first_step_vs_hf_default",
        "peak_bytes_vs_hf_default",
    )  # fmt: skip
    lines = []
    for task in small["tasks"]:
        ours, larger = (ratios(report["tasks"][task]["rounds"]) for report in (small, large))
        cells = [_cell(key, ours[key]) for key in keys] + [_cell(key, larger[key]) for key in (speed, share)]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


def spans(report: dict) -> list[tuple[float, float]]:
    """The smallest and the largest ratio to "HF best" over the tasks: speed, time of the run, peak memory."""
    found = [ratios(result["rounds"]) for result in report["tasks"].values()]
    keys = ("real_tokens_per_second_vs_hf_best", "seconds_to_end_vs_hf_best", "peak_bytes_vs_hf_best")
    return [(min(ratio[key] for ratio in found), max(ratio[key] for ratio in found)) for key in keys]


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "share_of_gemm":
        return f"{100 * value:.0f} %"
    return f"{value:.0f}" if key == "real_tokens_per_second" else f"{value:.2f}x"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Settings; those after `--` go to run_glue.py."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a BERT-family model")
    parser.add_argument("--shape", choices=("bert-base", "bert-large"), help="random weights of this shape instead")
    parser.add_argument("--families", help=f"some of {', '.join(FAMILY_SHAPES)}, in MiniLM's size with random weights")
    parser.add_argument("--vocab", type=Path, help="WordPiece vocabulary for --shape and --families")
    parser.add_argument("--data_path", help="as for run_glue.py")
    parser.add_argument("--tasks", default="cola,sst2-like,stsb,mrpc,qnli")
    parser.add_argument("--eval_tasks", default="mrpc", help="those whose evaluation is timed too")
    parser.add_argument("--runs", default=",".join(RUNS), help="ours and any of the others")
    parser.add_argument("--rows", type=int, help="training rows; default: 512, on a device 3840")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip_steps", type=int, help="first steps that no rate counts; default: 2, on a device 60")
    parser.add_argument("--default_steps", type=int, help="steps of hf_default; default: 6, on a device 120")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table of --json and end")
    parser.add_argument("extra", nargs="*", help="flags of run_glue.py, after --")
    args = parser.parse_args(argv)
    is_random = bool((args.shape or args.families) and args.vocab)
    if not args.table and not (args.data_path and (args.model or is_random)):
        parser.error("give --data_path, and --model, or --shape or --families with --vocab; or --table")
    return args if args.table else _with_steps(args)


def _with_steps(args: argparse.Namespace) -> argparse.Namespace:
    """The settings with the rows and steps that the device of this machine needs, where none are given."""
    from bert_glue.devices.device import resolve_device

    is_host = resolve_device("auto").is_host
    for name, number in zip(("rows", "skip_steps", "default_steps"), _ON_HOST if is_host else _ON_DEVICE, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, number)
    return args


def main() -> int:
    """Measure, print, and write the JSON."""
    args = parse()
    if args.table:
        report = json.loads(args.json.read_text(encoding="utf-8"))
        print(family_table(report) if "families" in report else table(report))
        return 0
    if args.families:
        return measure_families(args)
    print(table(measure_model(args, lambda report: _write(args.json, report))))
    return 0


def measure_model(args: argparse.Namespace, keep: Callable[[dict], None]) -> dict:
    """One model on all tasks.

    Args:
        args: result of `parse`.
        keep: is called with the report after each task.

    Returns:
        The report: model, machine, settings, and the rounds of each task with their ratios.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = args.shape or Path(args.model).parent.name
        args.model = write_model(Path(folder), args.shape, args.vocab) if args.shape else args.model
        report = {"model": name, "machine": _machine(args.threads), "settings": _settings(args), "tasks": {}}
        measure_tasks(args, report["tasks"], lambda: keep(report))
    return report


def measure_families(args: argparse.Namespace) -> int:
    """Every family of `--families` on every task, into one file."""
    report = {"machine": _machine(args.threads), "settings": _settings(args), "families": {}}
    for name in args.families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            args.model = write_family(Path(folder), name, args.vocab)
            tasks = report["families"].setdefault(name, {})
            measure_tasks(args, tasks, lambda: _write(args.json, report))
    print(family_table(report))
    return 0


def family_table(report: dict) -> str:
    """A Markdown table of a report over families."""
    lines = ["| family | task | training rate against hf_best | peak memory against hf_best |", "|---|---|---|---|"]
    for name, tasks in report["families"].items():
        for task, found in tasks.items():
            cells = [found.get(f"{key}_vs_hf_best") for key in ("real_tokens_per_second", "peak_bytes")]
            shown = " | ".join("-" if x is None else f"{x:.2f}" for x in cells)
            lines.append(f"| {name} | {task} | {shown} |")
    return "\n".join(lines)


def measure_tasks(args: argparse.Namespace, tasks: dict, save: Callable[[], None]) -> None:
    """The rounds of every task into `tasks`, saved after each task."""
    for task in args.tasks.split(","):
        rounds = tasks.setdefault(task, {"rounds": []})["rounds"]
        with tempfile.TemporaryDirectory() as rows:
            run_as, data = write_rows(Path(rows), task, args.data_path, args.rows)
            for number in range(args.rounds):
                scores = task in args.eval_tasks.split(",")
                load = os.getloadavg()[0]
                rounds.append({run: measure(run, args, run_as, data, scores) for run in args.runs.split(",")})
                rounds[-1]["load_before"] = load  # how busy the cores were with other programs
                print(task, "round", number + 1, json.dumps(rounds[-1]), flush=True)
        tasks[task] |= ratios(rounds)
        save()


def _settings(args: argparse.Namespace) -> dict[str, object]:
    return {k: v for k, v in vars(args).items() if k not in ("model", "vocab", "data_path", "json", "table")}


def _write(file: Path, report: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _machine(threads: int) -> dict[str, object]:
    import torch

    from bert_glue.devices import cpu
    from bert_glue.devices.device import resolve_device

    device = resolve_device("auto")
    return {
        "device": device.name,
        "processor": processor(),
        "vendor": cpu.vendor(),
        "features": sorted(name for name in cpu.features() if name.startswith(("avx", "amx", "sve", "bf16", "asimd"))),
        "product_library": device.product_library,
        "threads": threads,
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def processor() -> str:
    """Its name, the vector instructions that torch uses, and the cores."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
