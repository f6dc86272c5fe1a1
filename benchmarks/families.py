"""Training steps of each family, packed, against the same model of transformers in batches of similar length.

    python benchmarks/families.py --vocab vocab.txt --data_path GLUE --json benchmarks/results/families-cpu.json

MiniLM's size with random weights, on real rows, batch 32. A round runs one step of ours on a random batch and one of
theirs on a batch of rows of similar length, padded to its longest: the stock Trainer's fastest setting, without what
the Trainer adds to a step. Both clip and run fused AdamW. The rates are real tokens per CPU second on one thread, which
other programs disturb less than the clock; ratios are formed inside a round, and their median is printed. For whole
runs by the clock, and their memory, see `throughput.py --families`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import FAMILY_SHAPES, write_family  # noqa: E402
from benchmarks.throughput import processor  # noqa: E402

_BATCH, _LONGEST = 32, 128
_SORTED_BATCHES = 50  # Trainer sorts the rows of this many batches
Step = Callable[[np.ndarray], float]


def timed(run: Callable[[], None]) -> float:
    """CPU seconds of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def our_step(args, model, split, dropout_masks) -> Step:
    """A step as a run takes it: packed, into flat buffers, with the word rows that the data uses."""
    import torch
    from torch.nn.functional import cross_entropy

    from bert_glue.data.batching import Collator
    from bert_glue.precision.native import NativePrecision
    from bert_glue.precision.plan import PrecisionPlan
    from bert_glue.training.embedding_rows import NarrowedEmbedding
    from bert_glue.training.optim import build_optimizer

    narrowed = NarrowedEmbedding(model.module, [split], model.pad_id)
    precision = NativePrecision(PrecisionPlan("O0", torch.float32, 1.0), model.module.train())
    optimizer, _ = build_optimizer(args, precision.optimizer_groups(False))
    collate = Collator("packed", _LONGEST, model.pad_id, True, torch.device("cpu"), row_of_token=narrowed.row_of_token)

    def run(rows: np.ndarray) -> None:
        batch = collate(split, rows)
        precision.zero_gradients()
        logits = model.module(**batch.inputs, dropout_masks=dropout_masks)
        precision.backward(cross_entropy(logits, batch.labels))
        precision.step(optimizer, precision.gather_gradients(), 1.0)

    return lambda rows: timed(lambda: run(rows))


def their_step(args, model, split) -> Step:
    """The same step of transformers' module on padded rows, with dropout, fused AdamW and clipping."""
    import torch
    from torch.nn.functional import cross_entropy

    from bert_glue.data.batching import Collator

    module = model.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.learning_rate, fused=True)
    collate = Collator("longest", _LONGEST, model.pad_id, model.tokenizer.gives_types, torch.device("cpu"))

    def run(rows: np.ndarray) -> None:
        batch = collate(split, rows)
        optimizer.zero_grad()
        cross_entropy(module(**batch.inputs), batch.labels).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return lambda rows: timed(lambda: run(rows))


def measure(name: str, task_name: str, vocab: Path, data_path: str, rounds: int) -> dict:
    """Ratios of one family on one task, round by round after one that is not counted."""
    from bert_glue.config.arguments import Arguments
    from bert_glue.data.batching import TokenSplit
    from bert_glue.data.sources import load_task_data
    from bert_glue.model.layers import DropoutMasks
    from bert_glue.model.loading import load_model

    data = load_task_data(Arguments(task_name=task_name, data_path=data_path), frozenset({"train"}))
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), name, vocab)
        args = Arguments(model_name_or_path=folder, do_train=True)
        ours = load_model(args, data.task)
        assert ours.is_packed, ours.why_padded
        padded_args = Arguments(model_name_or_path=folder, do_train=True, padding="longest")
        theirs = load_model(padded_args, data.task)
        table = ours.tokenizer.encode(data.splits["train"], _LONGEST)
    split = TokenSplit("train", table, np.asarray(data.splits["train"].labels, np.int64))
    masks = DropoutMasks(0)
    steps = our_step(args, ours, split, masks), their_step(padded_args, theirs, split)
    draw = np.random.default_rng(0)
    seen = []
    for number in range(rounds + 1):
        masks.begin(number)
        order = draw.permutation(len(split))[: _BATCH * _SORTED_BATCHES]
        of_similar_length = order[np.argsort(-table.lengths[order], kind="stable")]
        begin = _BATCH * int(draw.integers(len(order) // _BATCH))
        batches = draw.permutation(order)[:_BATCH], of_similar_length[begin : begin + _BATCH]
        tokens = [int(table.lengths[rows].sum()) for rows in batches]
        seconds = [step(rows) for step, rows in zip(steps, batches, strict=True)]
        seen.append({"tokens": tokens, "cpu_seconds": seconds})
    rates = [[t / s for t, s in zip(one["tokens"], one["cpu_seconds"], strict=True)] for one in seen[1:]]
    return {
        "rounds": seen[1:],
        "tokens_per_row": float(np.mean(table.lengths)),
        "rate_vs_padded": statistics.median(ours / theirs for ours, theirs in rates),
    }


def main() -> None:
    """Measure, print and, with --json, keep after each family."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILY_SHAPES))
    parser.add_argument("--tasks", default="mrpc,cola")
    parser.add_argument("--vocab", type=Path, required=True, help="a WordPiece vocabulary")
    parser.add_argument("--data_path", required=True, help="as for run_glue.py")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict = {"processor": processor(), "threads": 1, "torch": torch.__version__, "batch": _BATCH, "families": {}}
    for name in args.families.split(","):
        for task in args.tasks.split(","):
            load = os.getloadavg()[0]
            found = measure(name, task, args.vocab, args.data_path, args.rounds)
            report["families"].setdefault(name, {})[task] = {**found, "load_before": load}
            print(f"{name} {task}: {found['rate_vs_padded']:.2f}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
