"""Which of the techniques go together: layer-wise rates, new layers, averaged weights, R-Drop, FGM."""

from __future__ import annotations

from collections.abc import Iterator

from bert_glue.arguments import FLAGS, Arguments
from bert_glue.errors import Problem

# name -> what each changes; off at its default.
_TECHNIQUES = ("layerwise_lr_decay", "reinit_layers", "ema_decay", "rdrop_alpha", "fgm_epsilon")


def asked(args: Arguments) -> list[str]:
    """Techniques that are not off."""
    return [name for name in _TECHNIQUES if getattr(args, name) != FLAGS[name].default]


def technique_problems(args: Arguments) -> Iterator[Problem]:
    """Combinations that make no sense."""
    names = asked(args)
    if {"rdrop_alpha", "fgm_epsilon"} <= set(names):
        text = "--rdrop_alpha and --fgm_epsilon both run each batch twice: give one"
        yield Problem(("rdrop_alpha", "fgm_epsilon"), text)
    partly = "lora_rank" if args.lora_rank is not None else "freeze_encoder" if args.freeze_encoder else None
    for name in names:
        if partly and name in ("reinit_layers", "fgm_epsilon", "layerwise_lr_decay"):
            text = f"--{name} is for training the whole model, --{partly} trains a part: give one"
            yield Problem((name, partly), text)
        if args.amp_backend == "apex" and name in ("layerwise_lr_decay", "ema_decay", "fgm_epsilon"):
            yield Problem((name, "amp_backend"), f"--{name} goes with --amp_backend native only")
        if name == "reinit_layers" and not args.do_train:
            yield Problem(("reinit_layers", "do_train"), "--reinit_layers needs --do_train: new layers know nothing")


def techniques_without_effect(args: Arguments) -> Iterator[str]:
    """A line on each technique that a run without training does not use."""
    if not args.do_train:
        yield from (f"--{name} has no effect without --do_train" for name in asked(args) if name != "reinit_layers")
