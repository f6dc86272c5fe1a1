"""Which flags `--torch_compile` and `--cuda_graph` go with."""

from __future__ import annotations

from collections.abc import Iterator

from bert_glue.arguments import Arguments
from bert_glue.errors import Problem

_COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def compiled_problems(args: Arguments) -> Iterator[Problem]:
    """What `--torch_compile` does not go with."""
    if args.torch_compile_mode and args.torch_compile_backend not in (None, "inductor"):
        text = f"--torch_compile_mode {args.torch_compile_mode} is inductor's, not {args.torch_compile_backend}'s"
        yield Problem(("torch_compile_mode", "torch_compile_backend"), f"{text}: give one")
    if args.amp_backend == "apex":
        for name in _COMPILE:
            if getattr(args, name):
                yield Problem((name, "amp_backend"), f"--{name} goes with --amp_backend native only")


def recorded_problems(args: Arguments) -> Iterator[Problem]:
    """What `--cuda_graph` does not go with."""
    if not args.cuda_graph:
        return
    reasons = {
        **dict.fromkeys(_COMPILE, "a compiled graph was never recorded"),
        "gradient_checkpointing": "it asks the host for the generator's state within a pass",
        "fgm_epsilon": "it needs lengths on the host within a pass",
    }
    for name, reason in reasons.items():
        if getattr(args, name):
            yield Problem((name, "cuda_graph"), f"--cuda_graph with --{name}: {reason}; give one")
    if args.amp_backend == "apex":
        yield Problem(("cuda_graph", "amp_backend"), "--cuda_graph goes with --amp_backend native only")
