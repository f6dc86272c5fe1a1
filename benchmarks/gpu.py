"""The first hour on a GPU in nine minutes: is everything right there, and how fast is it against the stock Trainer?

    python benchmarks/gpu.py --out DIR                    DIR/nvidia-h100.json and a table
    python benchmarks/gpu.py --out DIR --stages base,large
    python benchmarks/gpu.py --out DIR --tiny             the same flow with tiny shapes, on a CPU too

Each stage is a process with a time limit, so a kernel that hangs or crashes costs its own stage alone. Rows are written
as soon as they are known. The checks run side by side, then each timing runs alone on the device. At the end the
verdict compares the rates with their targets. Nothing is read from a network, and no model or data is needed; the
packages are torch, transformers and accelerate. Move the file to benchmarks/results/, and `tools/make_measurements.py`
and `benchmarks/estimates.py` show it. Exit codes: 0 all checks are right; 1 some row is wrong; 4 there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import StageRows, append, read_rows  # noqa: E402
from bert_glue.launch.ranks import kill_group  # noqa: E402


@dataclass(frozen=True)
class Stage:
    """One process.

    Args:
        function: module of benchmarks/gpu_stages and function; takes a `StageRows`.
        seconds: after which it is killed.
        is_alone: whether nothing else may run on the device meanwhile.
        is_in_tiny: whether a tiny run has it; False for the same code with another shape.
    """

    function: str
    seconds: int
    is_alone: bool = False
    is_in_tiny: bool = True


# Machines with a GPU have the cores for all checks at once: 150 s for them, 380 s for the timings.
STAGES = {
    "machine": Stage("speed.measure_machine", 60, is_alone=True),
    "attention": Stage("attention.check_attention", 90),
    "models": Stage("models.check_models", 110),
    "recorded": Stage("runs.check_recorded", 120),
    "compiled": Stage("runs.check_compiled", 140),
    "resumed": Stage("runs.check_resumed", 120),
    "waits": Stage("runs.check_waits", 90),
    "base": Stage("speed.time_base", 110, is_alone=True),
    "large": Stage("speed.time_large", 120, is_alone=True, is_in_tiny=False),
    "tasks": Stage("speed.time_tasks", 80, is_alone=True),
    "padded": Stage("speed.time_padded", 50, is_alone=True),
    "kernels": Stage("speed.profile_steps", 50, is_alone=True),
}
LIMIT_SECONDS = 535
ROWS_FILE = "gpu.jsonl"
_CORES_A_CHECK = 2
_KILLED_AFTER = 8  # seconds between a stage's own end and its kill
_TINY_PATIENCE = 6  # a tiny run on a busy CPU is to end, not to be fast


# ---- running stages ----


def run_stages(names: list[str], out: Path, until: float, is_tiny: bool) -> None:
    """Run stages in their order, neighbours that need not be alone side by side.

    Args:
        until: when all must be over, by `time.monotonic`.
    """
    cores = os.cpu_count() or 1
    at_once = cores if is_tiny else max(1, cores // _CORES_A_CHECK)
    running: dict[str, tuple[subprocess.Popen, float, float]] = {}
    for name in names:
        # A tiny run times nothing, so that nothing has to be alone but the first row, which names the device.
        is_alone = STAGES[name].is_alone and (not is_tiny or name == names[0])
        while len(running) >= (1 if is_alone else at_once):
            _end_finished(running, out)
        limit = min(STAGES[name].seconds * (_TINY_PATIENCE if is_tiny else 1), until - time.monotonic())
        if limit < 2 * _KILLED_AFTER:
            append(out / ROWS_FILE, {"stage": name, "name": "stage", "ok": None, "reason": "no time was left"})
            continue
        running[name] = (_start(name, out, limit - _KILLED_AFTER, is_tiny), time.monotonic(), limit)
        print(f"{name}: started, at most {limit:.0f} s", file=sys.stderr, flush=True)
        while is_alone and running:
            _end_finished(running, out)
    while running:
        _end_finished(running, out)


def _start(name: str, out: Path, seconds: float, is_tiny: bool) -> subprocess.Popen:
    command = [sys.executable, __file__, "--out", str(out), "--stage", name, "--seconds", str(seconds)]
    hidden = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = {**hidden, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if is_tiny:
        environment["OMP_NUM_THREADS"] = "1"
    with open(out / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            command + ["--tiny"] * is_tiny, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def _end_finished(running: dict[str, tuple[subprocess.Popen, float, float]], out: Path) -> None:
    """Wait a moment, and take note of the stages that ended or are over their limit."""
    time.sleep(0.1)
    for name, (process, began, limit) in list(running.items()):
        took = time.monotonic() - began
        is_late = process.poll() is None and took > limit
        if process.poll() is None and not is_late:
            continue
        kill_group(process.pid)
        code = process.wait()
        row = {"stage": name, "name": "stage", "ok": code == 0, "exit_code": code, "seconds": round(took, 1)}
        why = f"killed after {limit:.0f} s" if is_late else f"ended with code {code}; {name}.log has its last words"
        append(out / ROWS_FILE, row | ({"error": why} if code else {}))
        del running[name]


def run_stage(name: str, out: Path, seconds: float, is_tiny: bool) -> None:
    """One stage in this process."""
    module, function = STAGES[name].function.split(".")
    check: Callable[[StageRows], None] = getattr(importlib.import_module(f"benchmarks.gpu_stages.{module}"), function)
    with tempfile.TemporaryDirectory() as folder:
        # Compiled kernels and tokens of this call alone, so that its seconds are those of a first run.
        os.environ |= {"BERT_GLUE_CACHE": folder, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        check(StageRows(out / ROWS_FILE, name, seconds, is_tiny))


# ---- the verdict ----


def best_rate(rows: Iterable[dict], **wanted: object) -> dict | None:
    """The fastest row of a run that has these settings; None if there is none."""
    found = [
        row for row in rows if row.get("samples_per_second") and all(row.get(k) == v for k, v in wanted.items())
    ]  # fmt: skip
    return max(found, key=lambda row: row["samples_per_second"], default=None)


PER_SECOND, TIMES = "samples/s", "x"
_OURS = {"name": "ours", "level": "O2", "precision": "bf16", "lengths": [25, 85]}
_STOCK = {"name": "stock Trainer"}
# (shape, batch, least samples/s), bf16 O2 with dropout 0.1 on rows of 25 to 85 tokens.
RATES = (("bert-base", 32, 5000), ("bert-base", 256, 11000), ("bert-large", 32, 1900), ("bert-large", 256, 3500))
# Least ratio to the stock Trainer.
RATIOS = {"its default": 5.0, "its best": 2.0}


def _target(what: str, least: float, measured: float | None, unit: str, by: str = "") -> dict[str, object]:
    is_reached = None if measured is None else measured >= least
    return {"what": what, "target": least, "measured": measured, "unit": unit, "reached": is_reached, "by": by}


def _ratio(ours: dict | None, theirs: dict | None) -> float | None:
    """Of real tokens a second, because batches of similar lengths are other samples than random ones for a while."""
    if ours is None or theirs is None:
        return None
    return ours["real_tokens_per_second"] / theirs["real_tokens_per_second"]


def verdict(rows: list[dict]) -> list[dict[str, object]]:
    """Each target with what was measured; `reached` is None where it was not."""
    found = []
    for shape, batch, least in RATES:
        row = best_rate(rows, **_OURS, stage=_stage_of(shape), shape=shape, batch=batch)
        rate, how = (row["samples_per_second"], row["how"]) if row else (None, "")
        found.append(_target(f"{shape}, batch {batch}", least, rate, PER_SECOND, how))
    for how, least in RATIOS.items():
        found.append(_against_stock(rows, how, least))
    large = best_rate(rows, name="ours", stage="padded", shape="bert-large", precision="bf16")
    rate, by = (large["samples_per_second"], large["how"]) if large else (None, "")
    found.append(_target("bert-large, batch 32, rows of 128 tokens", 1200, rate, PER_SECOND, by))
    single = {"name": "ours", "stage": "padded", "precision": "fp32"}
    padded = best_rate(rows, **single, how="eager, padded")
    packed = best_rate([row for row in rows if row.get("how") != "eager, padded"], **single)
    how = packed["how"] if packed else ""
    found.append(_target("fp32, packed against padded to 128", 3.0, _ratio(packed, padded), TIMES, how))
    return found


def _stage_of(shape: str) -> str:
    return shape.removeprefix("bert-")


def _against_stock(rows: list[dict], how: str, least: float) -> dict[str, object]:
    """The smallest ratio over the tasks; not measured while one of them is missing."""
    tasks = [row["task"] for row in rows if row.get("task") and row["name"] == "ours"]
    ratios = {
        task: _ratio(best_rate(rows, name="ours", task=task), best_rate(rows, **_STOCK, task=task, how=how))
        for task in dict.fromkeys(tasks)
    }
    known = {task: ratio for task, ratio in ratios.items() if ratio is not None}
    worst = min(known, key=known.get) if known and len(known) == len(ratios) else None
    what = f"every task, bert-base, batch 32, against the stock Trainer, {how}"
    return _target(what, least, known[worst] if worst else None, TIMES, worst or "")


def file_name(device: str) -> str:
    """Of a device's results, such as nvidia-h100.json: its name without memory and socket."""
    words = re.split(r"[^a-z0-9]+", device.lower())
    kept = [word for word in words if word and not re.fullmatch(r"\d+gb|hbm\w*|sxm\d*|geforce", word)]
    return f"{'-'.join(kept)}.json"


def content_of(rows: list[dict], is_tiny: bool, seconds: float) -> dict[str, object]:
    """The results file: the machine, the verdict, what is wrong, and every row."""
    device = next((row for row in rows if row["name"] == "device" and row.get("device")), {})
    return {
        "device": device.get("device"),
        "is_tiny": is_tiny,
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "packages": device.get("packages"),
        "verdict": verdict([] if is_tiny else rows),
        "wrong": [row for row in rows if row["ok"] is False],
        "rows": rows,
    }


# ---- the table ----


def table(content: dict) -> str:
    """Markdown of a results file: targets, rates, kernels and what is wrong."""
    counts = [sum(row["ok"] is state for row in content["rows"]) for state in (True, False, None)]
    lines = ["{} rows are right, {} wrong, {} not measured.\n".format(*counts)]
    lines += [_line_of_failure(row) for row in content["wrong"]] + [""] * bool(content["wrong"])
    lines += ["| target | at least | measured | |", "|---|---|---|---|"]
    lines += [_line_of_target(target) for target in content["verdict"]]
    runs = [row for row in content["rows"] if row.get("samples_per_second")]
    if runs:
        lines += ["", "| run | batch | tokens a row | how | samples/s | real tokens/s | peak memory, GB |"]
        lines += ["|---" * 7 + "|", *map(_line_of_run, runs)]
    profiles = [row for row in content["rows"] if row.get("shares")]
    if profiles:
        parts = list(profiles[0]["shares"])
        lines += ["", f"| kernels of an eager step | number | busy, ms | {' | '.join(parts)} |"]
        lines += ["|---" * (3 + len(parts)) + "|", *map(_line_of_profile, profiles)]
    return "\n".join(lines)


def target_table() -> str:
    """Markdown of the targets alone."""
    lines = [f"| {target['what']} | {_shown(target['target'], target['unit'])} |" for target in verdict([])]
    return "\n".join(["| target on an H100 | at least |", "|---|---|", *lines])


def _line_of_failure(row: dict) -> str:
    known = {k: v for k, v in row.items() if k in ("kernel", "family", "case", "shape", "batch", "how", "precision")}
    about = "".join(f", {value}" for value in known.values())
    return f"- wrong: {row['stage']}: {row['name']}{about}: {row.get('error', 'beyond its limit')[:200]}"


def _line_of_target(target: dict) -> str:
    measured, unit = target["measured"], target["unit"]
    shown, outcome = "-", "not measured"
    if measured is not None:
        shown = ", ".join(filter(None, (_shown(measured, unit), target["by"])))
        missed = 100 * (1 - measured / target["target"])
        outcome = "reached" if target["reached"] else f"missed by {missed:.1f} %"
    return f"| {target['what']} | {_shown(target['target'], unit)} | {shown} | {outcome} |"


def _shown(number: float, unit: str) -> str:
    return f"{number:,.0f} samples/s" if unit == PER_SECOND else f"{round(number, 2):g}x"


def _line_of_run(row: dict) -> str:
    low, high = row["lengths"]
    who = row["shape"] if row["name"] == "ours" else f"{row['shape']}, {row['name']}"
    how = f"{row['how']}, {' '.join(filter(None, (row['level'], row['precision'])))}"
    rates = f"{row['samples_per_second']:,.0f} | {row['real_tokens_per_second']:,.0f}"
    return f"| {who} | {row['batch']} | {low} to {high} | {how} | {rates} | {row['peak_bytes'] / 1e9:.1f} |"


def _line_of_profile(row: dict) -> str:
    shares = " | ".join(f"{100 * share:.0f} %" for share in row["shares"].values())
    numbers = f"{row['kernels_a_step']:.0f} | {row['busy_milliseconds_a_step']:.2f}"
    return f"| {row['shape']}, batch {row['batch']} | {numbers} | {shares} |"


# ---- the command ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The settings; `--stage` is one stage's own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: the flow, and no figure that counts")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of them; default: all")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = [name.strip() for name in args.stages.split(",")]
    unknown = [name for name in args.names if name not in STAGES]
    if unknown:
        parser.error(f"--stages {unknown[0]}: choose from {', '.join(STAGES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the stages, write the results file and print its table."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        run_stage(args.stage, args.out, args.seconds, args.tiny)
        return 0
    (args.out / ROWS_FILE).unlink(missing_ok=True)
    began = time.monotonic()
    until = began + LIMIT_SECONDS * (_TINY_PATIENCE if args.tiny else 1)
    run_stages(["machine"], args.out, until, args.tiny)
    device = next((row for row in read_rows(args.out / ROWS_FILE) if row["name"] == "device"), None)
    if not args.tiny and (device is None or device.get("is_host", True)):
        print("error: torch finds no GPU here; --tiny runs the flow on a CPU", file=sys.stderr)
        return 4
    names = [name for name in args.names if name != "machine" and (STAGES[name].is_in_tiny or not args.tiny)]
    run_stages(names, args.out, until, args.tiny)
    content = content_of(read_rows(args.out / ROWS_FILE), args.tiny, time.monotonic() - began)
    file = args.out / (("tiny-" if args.tiny else "") + file_name(content["device"] or "unknown device"))
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{table(content)}\n\n{content['device']}, {content['seconds']} s: {file}")
    return 1 if content["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
