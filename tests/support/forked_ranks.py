"""Ranks of a run as forks of one process that has imported everything: a run of eight costs little more than one.

python forked_ranks.py WORLD FUNCTION FOLDER      each rank writes what FUNCTION returns to FOLDER/<rank>.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

SIZES = range(1, 68)
GLOBAL_BATCH = 8


def on_ranks(world: int, function: str, folder: Path, timeout: float = 240.0) -> list[Any]:
    """What a function of this module returned on each rank, in the order of ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, __file__, str(world), function, str(folder)],
        capture_output=True, text=True, timeout=timeout, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def lora(folder: Path) -> dict[str, Any]:
    """`same_run` with adapters."""
    return same_run(folder, lora_rank=3)


def weighted(folder: Path) -> dict[str, Any]:
    """`same_run` with weights of the classes."""
    return same_run(folder, class_weights=str(folder.parent / "weights.json"), label_smoothing_factor=0.1)


def several(folder: Path) -> dict[str, Any]:
    """`same_run` of rows that have several labels, evaluated after each epoch."""
    from tiny_run import make_label_sets

    return same_run(folder, **make_label_sets(folder.parent / "sets"), eval_strategy="epoch")


def several_to_the_end(folder: Path) -> dict[str, Any]:
    """Results of a whole run of rows that have several labels, in windows, weighted and calibrated."""
    from tiny_run import arguments, make_label_sets, results_of

    from bert_glue.pipeline.run import run

    args = arguments(
        folder.parent / "parts", **make_label_sets(folder.parent / "whole", train=60, validation=40),
        output_dir=str(folder / "out"), do_eval=True, do_predict=True, calibrate=True, class_weights="balanced",
        max_seq_length=8, doc_stride=1, global_batch_size=GLOBAL_BATCH, adam_epsilon=1e-4, num_train_epochs=2.0,
        problem_type="multi_label_classification",
    )  # fmt: skip
    assert run(args) == 0
    return {**results_of(args), "predicted": (folder / "out" / "predict_results_own.txt").read_text()}


def frozen(folder: Path) -> dict[str, Any]:
    """`same_run` of the head alone."""
    return same_run(folder, freeze_encoder=True)


def same_run(folder: Path, **changes) -> dict[str, Any]:
    """A short run with one global batch on any number of ranks: its numbers, rows and collectives."""
    import torch
    from tiny_run import arguments, fit, losses

    from bert_glue.config.resolve import for_ranks
    from bert_glue.data.batching import Collator
    from bert_glue.training.loop import StopVote

    rows, collectives = [], []
    collate = Collator.__call__

    def noted(self, split, members):
        if split.name == "train":
            rows.append(members.tolist())
        return collate(self, split, members)

    Collator.__call__ = noted
    for name in ("all_reduce", "all_gather_object", "barrier"):
        original = getattr(torch.distributed, name)

        def counted(*given, name=name, original=original):
            collectives.append(name)
            return original(*given)

        setattr(torch.distributed, name, counted)
    in_steps = []
    add_up = StopVote.all_reduce

    def between(self, *given):
        in_steps.append(len(collectives))
        return add_up(self, *given)

    StopVote.all_reduce = between
    args = arguments(
        folder.parent / "parts", num_train_epochs=2.0, adam_epsilon=1e-4, global_batch_size=GLOBAL_BATCH,
        output_dir=str(folder / "out"), logging_steps=4, **changes,
    )  # fmt: skip
    args, _ = for_ranks(args, int(os.environ.get("WORLD_SIZE", "1")))
    run = fit(args)
    return {
        "losses": losses(run),
        "norms": [entry["grad_norm"] for entry in run.progress.history if "grad_norm" in entry],
        "scores": [entry["eval_f1_micro"] for entry in run.progress.history if "eval_f1_micro" in entry],
        "samples": run.progress.samples,
        "counted": run.observers.meter.samples,
        "rows": rows,
        "collectives": [later - earlier for earlier, later in zip(in_steps, in_steps[1:], strict=False)],
        "weight": float(sum(master.double().sum() for master in run.learner.precision.masters)),
    }


def compiled_run(folder: Path) -> dict[str, Any]:
    """`_brief_run` with a compiled encoder."""
    return _brief_run(folder, torch_compile=True, torch_compile_backend="aot_eager")


def recorded_run(folder: Path) -> dict[str, Any]:
    """`_brief_run` recorded on tapes."""
    import pytest
    from fake_cuda_graph import stand_in

    from bert_glue.training import cuda_graphs

    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        patch.setattr(cuda_graphs, "_EAGER_FIRST", 1)
        return _brief_run(folder, cuda_graph=True)


def windowed_run(folder: Path) -> dict[str, Any]:
    """`_brief_run` whose longer rows are in windows."""
    return _brief_run(folder, max_seq_length=16, doc_stride=1)


def _brief_run(folder: Path, **changes) -> dict[str, Any]:
    """A few steps with one global batch on any number of ranks."""
    from tiny_run import arguments, fit, losses

    from bert_glue.config.resolve import for_ranks

    args = arguments(
        folder.parent / "parts", max_steps=6, adam_epsilon=1e-4, global_batch_size=GLOBAL_BATCH,
        output_dir=str(folder / "out"), **changes,
    )  # fmt: skip
    args, _ = for_ranks(args, int(os.environ.get("WORLD_SIZE", "1")))
    run = fit(args)
    return {
        "losses": losses(run),
        "weight": float(sum(master.double().sum() for master in run.learner.precision.masters)),
        "updates": run.step.after[1].replays if args.cuda_graph else 0,
    }


def closed(folder: Path) -> list[str]:
    """Names of the threads that are left when the ranks have parted; the first import of torch's module is theirs."""
    from bert_glue.config.arguments import Arguments
    from bert_glue.devices.distributed import DistributedContext

    for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
        del sys.modules[name]
    ranks = DistributedContext(Arguments(use_cpu=True))
    ranks.all_gather_object(ranks.rank)
    import torch.distributed.nn.functional  # noqa: F401  as transformers does in the middle of a run

    ranks.close()
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]


def evaluations(folder: Path) -> dict[str, list]:
    """First token and length of every row by a model that echoes them, at each size; and this rank's share."""
    from echo_model import echo_evaluator, split_of

    from bert_glue.data.batching import evaluation_batches

    evaluator = echo_evaluator(4)
    ranks = evaluator.ranks
    found: dict[str, list] = {"echoes": [], "lengths": [], "rows": []}
    for size in SIZES:
        split = split_of(size)
        logits = evaluator.logits(split)
        found["echoes"].append(logits[:, 0].tolist())
        found["lengths"].append((logits[:, 1] == split.table.lengths).all().item())
        shares = evaluation_batches(split.table.lengths, 4, ranks.rank, ranks.world_size)
        found["rows"].append([row for share in shares for row in share.tolist()])
    return found


def stopped(folder: Path) -> dict[str, Any]:
    """A run whose last rank alone receives a stop signal, in the middle of its fifth step."""
    from resume_checks import fit_until
    from tiny_run import arguments

    from bert_glue.storage import checkpoint

    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    args = arguments(folder.parent / "parts", max_steps=20, output_dir=str(folder / "out"))
    run = fit_until(args, 5 if last else 1000)
    return {"step": run.progress.step, "saved": [f.name for f in checkpoint.list_checkpoints(run.output_dir)]}


def main(world: int, function: str, folder: Path) -> int:
    """Fork the ranks, wait for all; 1 if one failed."""
    import accelerate.state  # noqa: F401  all that is slow to import, once
    import echo_model  # noqa: F401
    import resume_checks  # noqa: F401
    import tiny_run  # noqa: F401
    from torch.distributed import TCPStore

    from bert_glue.launch.ranks import die_with_parent

    os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is the parent's
    # It comes after the forks: its thread may hold a lock of the C library, which a fork then never gets back.
    reading, writing = os.pipe()
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            die_with_parent()
            port = int.from_bytes(os.read(reading, 2), "big")
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
            (folder / f"{rank}.json").write_text(json.dumps(globals()[function](folder)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writing, store.port.to_bytes(2, "big") * world)
    return int(any([os.waitpid(child, 0)[1] for child in children]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
