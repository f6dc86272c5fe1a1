"""Measures several ranks on this machine, and predicts larger machines by a model.

    python benchmarks/scaling.py measure --json scaling.json [--steps 12] [--rounds 2]
    python benchmarks/scaling.py page scaling.json          the tables of docs/scaling.md

`measure` runs one rank with one thread, one rank with two threads, and two ranks with one thread each, in turn,
with the same samples a step (a BERT of hidden 384 and 6 layers, generated data, real tokens only). The model of a
step is

    t(N) = t(1) + 2 (N - 1) / N * bytes / bandwidth + 2 (N - 1) * latency

with the ring all-reduce (Patarasuk and Yuan 2009) after the backward pass, without overlap, as in our loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bert_glue import result_keys as keys  # noqa: E402
from bert_glue.storage.files import read_results  # noqa: E402

SETUPS = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
# Figures of others for bert-large-cased, Ascend NPU, batch 32 a device, sequences of 128 (QQP): samples/s.
PUBLISHED_1, PUBLISHED_8 = 207.756, 1511.692
LARGE_PARAMETERS, GRADIENT_BYTES = 333_581_314, 2  # bert-large-cased with a classifier of two; O2 reduces fp16
BATCH = 32
# Assumed, not measured: what leaves a host is 8 x 100 Gbit/s, of which 80 % arrives; seconds a hop.
HOST_BANDWIDTH, HOP = 8 * 12.5e9 * 0.8, 5e-6
# Fewer optimizer steps than this and fine-tuning does not settle: the published runs of eight devices lose 3 to
# 10 points on tasks that stay below 100 steps, and nothing on those above 700.
FEWEST_STEPS = 500


def make_model(folder: Path) -> Path:
    """A BERT of MiniLM's shape with random weights and the vocabulary of the sample."""
    import numpy as np
    from safetensors.numpy import save_file

    from bert_glue.data.sample import make_tiny_bert

    make_tiny_bert(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
    (folder / "config.json").write_text(json.dumps(config))
    from transformers import AutoConfig, AutoModel

    tensors = AutoModel.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    arrays = {f"bert.{name}": np.ascontiguousarray(value.numpy()) for name, value in tensors.items()}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder


def run(model: Path, output: Path, ranks: int, threads: int, steps: int) -> dict:
    """One measured run; its results."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    flags = {
        "--task_name": "mrpc", "--model_name_or_path": str(model), "--output_dir": str(output),
        "--global_batch_size": 32, "--per_device_train_batch_size": 32, "--max_seq_length": 128,
        "--max_steps": steps, "--skip_steps": 3, "--save_strategy": "no", "--device": "cpu",
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    subprocess.run(
        [*launch, str(ROOT / "run_glue.py"), "--sample", "--do_train", *words],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    return read_results(output)


def all_reduce_seconds(rank: int, port: int, elements: int, queue) -> None:
    """Median time of adding a flat fp32 buffer over two ranks; the first one puts it into the queue."""
    import torch

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    buffer, times = torch.zeros(elements), []
    for _ in range(12):
        torch.distributed.barrier()
        begin = time.perf_counter()
        torch.distributed.all_reduce(buffer)
        times.append(time.perf_counter() - begin)
    if rank == 0:
        queue.put(statistics.median(times[2:]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured_all_reduce(elements: int) -> float:
    """Seconds of one all-reduce of `[elements]` fp32 between two ranks here."""
    import socket

    import torch.multiprocessing as processes

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = processes.get_context("spawn").Queue()
    processes.spawn(all_reduce_seconds, (port, elements, queue), nprocs=2)
    return queue.get()


def measure(steps: int, rounds: int) -> dict:
    """Rounds of all three setups, and the all-reduce alone."""
    found: dict[str, list[float]] = {name: [] for name in SETUPS}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        for number in range(rounds):
            for name, (ranks, threads) in SETUPS.items():
                results = run(model, Path(folder) / f"out {number} {name}", ranks, threads, steps)
                found[name].append(results[keys.step_milliseconds_key("median")])
                print(f"{name}: {found[name][-1]:.1f} ms a step, {results['device_name']}", flush=True)
    return {
        "step_ms": found,
        "gradient_bytes": results[keys.TRAIN_GRADIENT_BYTES],
        "all_reduce_ms": 1000 * measured_all_reduce(results[keys.TRAIN_GRADIENT_BYTES] // 4),
        "cores": os.cpu_count(),
        "steps": steps,
    }


def step_seconds(alone: float, ranks: int, volume: float, bandwidth: float, hop: float = 0.0) -> float:
    """The paper model, seconds.

    Args:
        alone: seconds of a step on one device, without an all-reduce.
        volume: bytes to reduce.
        bandwidth: bytes/s of the slowest link of the ring, each way.
        hop: seconds of latency of one of its 2 (ranks - 1) hops.
    """
    return alone + 2 * (ranks - 1) / ranks * volume / bandwidth + 2 * (ranks - 1) * hop


def predicted(devices: int) -> tuple[float, float]:
    """Samples/s of bert-large-cased on `devices` in hosts of eight, and its share of linear scaling.

    The bandwidth inside a host follows from the two published speeds. Between hosts the eight devices of a
    host first add up among themselves, then share the host's network.
    """
    alone, volume = BATCH / PUBLISHED_1, LARGE_PARAMETERS * GRADIENT_BYTES
    eight = 8 * BATCH / PUBLISHED_8
    inside = 2 * 7 / 8 * volume / (eight - alone)
    seconds = step_seconds(alone, min(devices, 8), volume, inside)
    if devices > 8:
        seconds += step_seconds(0.0, devices // 8, volume, HOST_BANDWIDTH, HOP)
    rate = devices * BATCH / seconds
    return rate, rate / (devices * PUBLISHED_1)


def largest_batch(rows: int, epochs: int) -> int:
    """Samples a step that leave `FEWEST_STEPS` optimizer steps."""
    return rows * epochs // FEWEST_STEPS


def page(found: dict) -> str:
    """The tables of docs/scaling.md."""
    from bert_glue.tasks import TASKS, TRAINABLE

    alone, *_ = found["step_ms"].values()
    middle = {name: statistics.median(times) for name, times in found["step_ms"].items()}
    # The load of a machine changes, so ratios are formed only inside one round.
    faster = {
        name: statistics.median(one / other for one, other in zip(alone, times, strict=True))
        for name, times in found["step_ms"].items()
    }
    one, _, two_ranks = middle.values()
    lines = [
        f"| measured here, medians of {len(alone)} rounds | ms per step | speed vs 1 rank, 1 thread |",
        "|---|---|---|",
        *(f"| {name} | {time:.0f} | {faster[name]:.2f}x |" for name, time in middle.items()),
        "",
        f"The all_reduce of the {found['gradient_bytes'] / 1e6:.0f} MB of gradients between the two ranks takes "
        f"{found['all_reduce_ms']:.0f} ms by itself. The model predicts half a step plus the all_reduce, "
        f"{one / 2 + found['all_reduce_ms']:.0f} ms. We measured {two_ranks:.0f} ms.",
        "",
        "| devices, predicted | samples/s | share of linear scaling |",
        "|---|---|---|",
        *(f"| {count} | {predicted(count)[0]:,.0f} | {predicted(count)[1]:.0%} |" for count in (8, 64, 512)),
        "",
        "| task | rows x epochs | largest batch per step | steps at 256 (8 devices) | useful devices at 32 each |",
        "|---|---|---|---|---|",
    ]
    for name in TRAINABLE:
        rows, epochs = TASKS[name].rows["train"], TASKS[name].published[3].epochs
        most = largest_batch(rows, epochs)
        steps = epochs * (rows // 256)
        lines.append(f"| {name} | {rows:,} x {epochs} | {most:,} | {steps:,} | {max(1, most // BATCH)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_measure = commands.add_parser("measure")
    of_measure.add_argument("--json", type=Path, required=True)
    of_measure.add_argument("--steps", type=int, default=12)
    of_measure.add_argument("--rounds", type=int, default=2)
    commands.add_parser("page").add_argument("json", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        arguments.json.write_text(json.dumps(measure(arguments.steps, arguments.rounds), indent=2) + "\n")
    else:
        print(page(json.loads(arguments.json.read_text())), end="")


if __name__ == "__main__":
    main()
