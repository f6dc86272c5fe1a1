"""Compares ways to run one training step: eager and compiled, and on CUDA also recorded and with each attention kernel.

    python benchmarks/steps.py --model FOLDER --json out.json            on a GPU if there is one, else on the CPU
    python benchmarks/steps.py --shape bert-base --bf16 --json out.json  random weights

The tokens are random, so no data is needed. A round runs every way over the same batches: forward, backward, clip,
update. Ratios are formed inside a round, and their medians are printed; on a busy machine those of CPU seconds vary
least. On a device, whose memory eleven models would fill, one way is alive at a time and runs all its rounds. Compiling
and recording are timed separately. On CUDA each attention kernel is a separate way, without and with attention dropout,
beside the automatic choice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import free_memory, random_split, write_model  # noqa: E402

_WARM = 4  # passes of each batch before the clock runs: one more than a recording waits for
Key = tuple[float, str, str]  # dropout, how, attention kernel
_LONGEST = 128


class Way:
    """One model, optimizer and set of batches; `seconds` of a pass over them.

    Args:
        kernel: of `attention.CUDA_KERNELS`, "padded" for none of them, "" for the product's choice.
    """

    def __init__(self, args: argparse.Namespace, split, drop: float, how: str = "eager", kernel: str = ""):
        import numpy as np
        import torch

        from bert_glue.config.arguments import Arguments
        from bert_glue.data.batching import Collator
        from bert_glue.model.loading import load_model
        from bert_glue.precision.native import NativePrecision
        from bert_glue.precision.plan import PrecisionPlan
        from bert_glue.tasks import get_task
        from bert_glue.training import compile, cuda_graphs
        from bert_glue.training.optim import build_optimizer

        began, self.device, self.kernel = time.perf_counter(), args.device, kernel
        place = self.device.torch_device
        flags = Arguments(
            model_name_or_path=args.model, do_train=True, hidden_dropout_prob=drop, attention_probs_dropout_prob=drop,
            cuda_graph=how == "recorded",
        )  # fmt: skip
        self.module = load_model(flags, get_task("mrpc")).module.to(place).train()
        plan = PrecisionPlan("O2", torch.bfloat16, 1.0) if args.bf16 else PrecisionPlan("O0", torch.float32, 1.0)
        self.precision = NativePrecision(plan, self.module)
        self.optimizer, _ = build_optimizer(flags, self.precision.optimizer_groups(False))
        collate = Collator("packed", _LONGEST, 0, True, place, is_rounded=how != "eager")
        rows = np.split(np.arange(len(split)), args.batches)
        self.batches = [collate(split, members) for members in rows]
        if how == "compiled":
            compile.compile_layers(self.module, {"backend": args.backend, "mode": args.mode, "dynamic": True})
        self.recorded = None
        if how == "recorded":
            recorder = cuda_graphs.Recorder(self.device)
            self.recorded = cuda_graphs.RecordedStep(
                recorder, self._pass, longest=_LONGEST, precision=self.precision, optimizer=self.optimizer, max_norm=1.0
            )
        for _ in range(_WARM):
            self.seconds()
        self.first_seconds = time.perf_counter() - began

    def _pass(self, batch, samples: int):
        import torch

        from bert_glue.model.layers import DropoutMasks

        logits = self.module(**batch.inputs, dropout_masks=DropoutMasks(0))
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels, reduction="sum") / samples
        self.precision.backward(loss)
        return loss.detach()

    def _step(self, batch) -> None:
        self.precision.zero_gradients()
        if self.recorded:
            self.recorded.run_pass(batch, batch.samples)
            self.recorded.finish(self.recorded.gather_gradients())
        else:
            self._pass(batch, batch.samples)
            self.precision.step(self.optimizer, self.precision.gather_gradients(), 1.0)

    def _chosen(self) -> AbstractContextManager:
        if not self.kernel:
            return nullcontext()
        name = None if self.kernel == "padded" else self.kernel
        return patch("bert_glue.model.attention.cuda_kernel", lambda *given: name)

    def seconds(self) -> tuple[float, float]:
        """(clock, CPU) of one step on each batch, the device waited for."""
        self.device.synchronize()
        began, cpu = time.perf_counter(), time.process_time()
        with self._chosen():
            for batch in self.batches:
                self._step(batch)
        self.device.synchronize()
        return time.perf_counter() - began, time.process_time() - cpu

    def filler(self) -> float:
        """Share of computed tokens that are filler."""
        return 1.0 - sum(b.real_tokens for b in self.batches) / sum(b.computed_tokens for b in self.batches)


def ways(args: argparse.Namespace) -> list[Key]:
    """The ways that this device has."""
    import torch

    from bert_glue.model import attention
    from bert_glue.model.folder import read_config

    config = read_config(Path(args.model))
    dim = config["hidden_size"] // config["num_attention_heads"]
    found = []
    for drop in (0.0, 0.1):
        found += [(drop, "eager", ""), (drop, "compiled", "")]
        if not args.device.can_record:
            continue
        given = (args.device.torch_device, torch.bfloat16 if args.bf16 else torch.float32, dim, drop)
        found += [(drop, "recorded", "")] if attention.cuda_kernel(*given) else []
        kernels = [name for name in attention.CUDA_KERNELS if attention.runs_here(name, *given)]
        found += [(drop, "eager", kernel) for kernel in (*kernels, "padded")]
    return found


def timed(args: argparse.Namespace, split) -> tuple[dict[Key, list[tuple[float, float]]], dict[Key, dict]]:
    """`Way.seconds` of each way in each round, and what is known of a way without a clock."""
    seen: dict[Key, list[tuple[float, float]]] = {}
    about: dict[Key, dict] = {}
    found = ways(args)
    # On a host all ways take turns, because the load of a shared machine changes. A device is alone, and its memory
    # holds one model with its optimizer, activations and recordings, not eleven.
    for keys in [found] if args.device.is_host else [[key] for key in found]:
        running = {}
        for key in keys:
            running[key] = Way(args, split, *key)
            about[key] = {"filler": running[key].filler(), "seconds_before": running[key].first_seconds}
            print(f"{key[1]} {key[2]} dropout {key[0]:g}: ready", file=sys.stderr, flush=True)
        for _ in range(args.rounds):
            for key, way in running.items():
                seen.setdefault(key, []).append(way.seconds())
        del running, way
        free_memory()
    return seen, about


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures of each way; ratios to the eager run of the same dropout, medians over rounds."""
    low, high = map(int, args.lengths.split(":"))
    split = random_split(args.rows * args.batches, low, high)
    seen, about = timed(args, split)
    figures = {}
    tokens = int(split.table.offsets[-1])
    for (drop, how, kernel), seconds in seen.items():
        pairs = list(zip(seen[drop, "eager", ""], seconds, strict=True))
        figures[f"{how}{', ' + kernel if kernel else ''}, dropout {drop:g}"] = {
            "vs_eager": statistics.median(eager[0] / own[0] for eager, own in pairs),
            "vs_eager_cpu_seconds": statistics.median(eager[1] / own[1] for eager, own in pairs),
            "real_tokens_per_second": tokens / statistics.median(own[0] for own in seconds),
            **about[drop, how, kernel],
        }
    return figures


def main() -> None:
    """Measure, print and, with --json, keep."""
    import torch

    from bert_glue.devices.device import resolve_device

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a BERT-family model")
    parser.add_argument("--shape", default="bert-base", help="else random weights of this shape of hf_recipe.py")
    parser.add_argument("--lengths", default="25:85", help="tokens of a row, least:most; the default is like mrpc")
    parser.add_argument("--rows", type=int, default=32, help="of a batch")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--bf16", action="store_true", help="O2 bf16 instead of fp32")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--mode", help="of inductor")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            write_model(Path(folder), args.shape)
        settings = {**vars(args), "model": Path(args.model).parent.name if args.model else args.shape, "json": None}
        args.model, args.device = args.model or folder, resolve_device(args.device)
        args.device.activate()
        about = {"device": args.device.name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        found = {"settings": settings, "machine": about, "ways": measure(args)}
    for way, figures in found["ways"].items():
        print(way, {name: round(value, 3) for name, value in figures.items()})
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
