"""`--torch_compile`: compiles parts of a model before the first step, outside its timing.

In a packed encoder everything between two attentions is compiled: one graph with gradients and one without serve all
layers and lengths. Attention stays eager, because its lengths are host numbers that differ in every batch. The
embedding and the projections to query, key and value stay eager, because they are products and look-ups with nothing to
fuse. The graph calls `bert_glue::keep` for its dropout masks, so that they equal those of an eager run. Models that
cannot be packed are compiled as a whole.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from dataclasses import dataclass
from types import MethodType

import numpy as np
import torch
from torch._dynamo.utils import counters

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import TokenSplit
from bert_glue.devices.device import Device, has_onednn_linear, has_slow_products
from bert_glue.devices.rng import random_tensors, set_random_tensors
from bert_glue.errors import MachineError, UsageError, did_you_mean, first_line
from bert_glue.evaluation.evaluator import Evaluator
from bert_glue.model.classifier import LoadedModel
from bert_glue.model.encoder import PackedClassifier, PackedLayer
from bert_glue.model.layers import DropoutMasks
from bert_glue.training.console import ConsoleLog

_NEEDS_COMPILER = "inductor"
# Modes of inductor that record CUDA graphs themselves (torch 2.13, torch/_inductor/__init__.py).
_RECORDING_MODES = ("reduce-overhead", "max-autotune")


@dataclass
class Compiled:
    """The result of a compilation.

    Args:
        backend: backend of torch.compile.
        graphs: number of graphs that were compiled before the first step.
    """

    backend: str
    graphs: int

    def summary(self, shapes: set[int], log: ConsoleLog) -> dict[str, str | int]:
        """The entries of the results files, after the last batch; also logs them.

        Args:
            shapes: token counts of all batches.
        """
        later = graphs_made() - self.graphs
        span = f" ({min(shapes)} to {max(shapes)})" if shapes else ""
        log.line(f"torch_compile: {self.graphs} graph(s) ran {len(shapes)} token count(s){span}")
        if later:
            log.line(
                f"note: {later} more graph(s) were compiled later; their time counts for the phase that needed them"
            )
        return {
            "compiled": self.backend,
            "compiled_graphs": self.graphs,
            "compiled_graphs_later": later,
            "compiled_token_counts": len(shapes),
        }


def graphs_made() -> int:
    """Number of graphs compiled since `compile_model` began."""
    return counters["stats"]["unique_graphs"]


def compile_model(
    args: Arguments, model: LoadedModel, evaluator: Evaluator, splits: dict[str, TokenSplit], log: ConsoleLog
) -> Compiled:
    """Compile by a forward and backward pass over the first rows; afterwards all gradients are zero.

    Raises:
        UsageError: there is no such backend.
        MachineError: this machine, or this backend, cannot compile it.
    """
    backend = args.torch_compile_backend
    if args.fgm_epsilon and not model.is_packed:
        raise UsageError("--fgm_epsilon with --torch_compile: packed models only, it reaches into the model by hooks")
    _check(backend, args.torch_compile_mode, evaluator.ranks.device)
    began = time.perf_counter()
    torch.compiler.reset()
    counters.clear()
    options = {"backend": backend, "mode": args.torch_compile_mode, "dynamic": True}
    if model.is_packed:
        compile_layers(model.module, options)
    else:
        model.module.compiled = torch.compile(model.module.stock.forward, **options)
    state = random_tensors(evaluator.ranks.device)
    try:
        _warm_up(args, evaluator, splits)
    except Exception as error:  # compilers fail in as many ways as there are compilers
        reason = f"{type(error).__name__}: {first_line(error)[:300]}"
        raise MachineError(f"--torch_compile: {backend} cannot compile this model here ({reason})") from error
    set_random_tensors(state, evaluator.ranks.device)
    compiled = Compiled(backend, graphs_made())
    seconds = time.perf_counter() - began
    log.line(
        f"torch_compile: {backend} made {compiled.graphs} graph(s) in {seconds:.1f} s, which are in no rate; "
        f"token counts are rounded up to buckets, {evaluator.collate.counts} from one power of two to the next"
    )
    return compiled


def compile_layers(module: PackedClassifier, options: dict) -> None:
    """Compile one graph for all layers, of everything that follows attention in a layer.

    Args:
        options: options of torch.compile.
    """
    for answer in (has_slow_products, has_onednn_linear):  # of the machine, not of a batch
        torch.compiler.assume_constant_result(answer)
    run = torch.compile(PackedLayer._after_attention, fullgraph=True, **options)
    for layer in module.layers:
        layer._after_attention = MethodType(run, layer)


def _check(backend: str, mode: str | None, device: Device) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UsageError(f"--torch_compile_backend: {did_you_mean('backend', backend, known)}")
    if not device.can_compile:
        raise MachineError(f"--torch_compile: not on this kind of device ({device.name}); leave it out")
    if device.can_record and mode in _RECORDING_MODES:
        # inductor would record one graph a layer and length, whose inputs it copies: the layers share one function.
        raise MachineError(
            f"--torch_compile_mode {mode} records graphs of its own, which has not been tried here on {device.kind}; "
            "use default or max-autotune-no-cudagraphs, with --cuda_graph"
        )
    compiler = shlex.split(os.environ.get("CXX") or "g++")[0]
    if backend == _NEEDS_COMPILER and shutil.which(compiler) is None:
        raise MachineError(
            f"--torch_compile: {backend} needs a C++ compiler, and there is no {compiler} here; "
            "install one, name one in the variable CXX, or leave --torch_compile out"
        )


def _warm_up(args: Arguments, evaluator: Evaluator, splits: dict[str, TokenSplit]) -> None:
    module, precision = evaluator.module, evaluator.precision

    def run(split: TokenSplit, rows: int, dropout_masks: DropoutMasks | None) -> torch.Tensor:
        with precision.autocast():
            return module(
                **evaluator.collate(split, np.arange(min(rows, len(split)))).inputs, dropout_masks=dropout_masks
            ).float()

    if args.do_train:
        module.train()
        run(splits["train"], args.per_device_train_batch_size, DropoutMasks(args.seed)).sum().backward()
        precision.zero_gradients()
    others = [split for name, split in splits.items() if name != "train"]
    if others:
        module.eval()
        with torch.no_grad():
            run(others[0], args.per_device_eval_batch_size, None)
