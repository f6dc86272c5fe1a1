"""Chooses the trained weights: all of them, the head alone (`--freeze_encoder`), or LoRA and the head (`--lora_rank`).

The head is everything above the encoder, with BERT's pooler. Adapters have peft's names, initial values, scaling and
files. A packed encoder computes them itself (layers.py); any other encoder runs peft's own layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn

from bert_glue.errors import MachineError, UsageError
from bert_glue.model.families import FAMILIES, HEAD, Family, weight_names
from bert_glue.model.layers import Adapter, LowRank

if TYPE_CHECKING:
    from bert_glue.config.arguments import Arguments
    from bert_glue.model.classifier import LoadedModel

FOLDER = "adapter"  # not beside config.json: transformers would then load the base model and miss the merged one
_ALL = "all-linear"


def choose_trained(args: Arguments, model: LoadedModel) -> None:
    """Add adapters, and freeze the weights that `--lora_rank` and `--freeze_encoder` exclude; record both in `model`.

    Args:
        model: the model, on the host, in fp32, before any cast.

    Raises:
        MachineError: peft is not installed or cannot adapt this model.
        UsageError: `--lora_target_modules` matches no layer, or matches the head.
    """
    if args.lora_rank is None and not args.freeze_encoder:
        return
    family = FAMILIES.get(model.config.get("model_type", "")) if model.is_packed else None
    head = _head(model, family)
    if args.lora_rank is not None:
        model.adapter = _add(args, model, family, head)
    parameters = dict(model.module.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in head or bool(re.search(r"\.low_rank\.|\.lora_[AB]\.", name)))
    model.frozen = {name: p.detach() for name, p in parameters.items() if not p.requires_grad}
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    what = "the head"
    if model.adapter is not None:
        what += f", and LoRA of rank {args.lora_rank} on {len(model.adapter.layers)} layers"
        what += f" ({', '.join(sorted(model.adapter.config.target_modules))})"
    total = sum(p.numel() for p in parameters.values())
    model.trained = f"{what}; {trained:,} of {total:,} parameters, {100 * trained / total:.2f} %"


def _head(model: LoadedModel, family: Family | None) -> set[str]:
    """Names of the parameters above the encoder."""
    names = [name for name, _ in model.module.named_parameters()]
    if family is not None:
        return {name for name in names if name.startswith(HEAD)}
    encoder = f"stock.{model.module.stock.base_model_prefix}."
    return {name for name in names if not name.startswith(encoder) or "pooler." in name}


def _peft() -> Any:
    if find_spec("peft") is None:
        raise MachineError("--lora_rank: the package peft is not installed (pip install peft)")
    try:
        import peft
    except Exception as error:  # a peft for another transformers or torch fails in many ways
        raise MachineError(f"--lora_rank: peft cannot be imported ({error})") from error
    return peft


def _add(args: Arguments, model: LoadedModel, family: Family | None, head: set[str]) -> Adapter:
    peft = _peft()
    above, layers = _linear_layers(model, family, head)
    targets = _targets(args, model, family, layers)
    found = tuple(name for name in layers if _fits(name, targets))
    unknown = [target for target in targets if not any(_fits(name, [target]) for name in layers)]
    if unknown or any(_fits(name, targets) for name in above):
        names = sorted({re.sub(r".*?\.\d+\.", "", name) for name in layers})
        raise UsageError(
            f"--lora_target_modules {' '.join(targets)}: each must name layers of the encoder and none of the head. "
            f"Choices: {_ALL}, or some of {', '.join(names)}"
        )
    alpha = 2.0 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    config = peft.LoraConfig(
        r=args.lora_rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=list(targets),
        task_type="SEQ_CLS", modules_to_save=_modules_to_save(model, family, above),
        base_model_name_or_path=args.model_name_or_path,
    )  # fmt: skip
    if family is None:
        # Only the adapted layers: the head itself is trained, and not the copy that peft would make.
        inner = peft.LoraConfig(
            r=args.lora_rank, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=list(found)
        )
        peft.inject_adapter_in_model(inner, model.module.stock)
    else:
        _add_packed(model.module, family, found, args, alpha / args.lora_rank)
    config.inference_mode = True  # as peft saves it
    return Adapter(config, found)


def _fits(name: str, targets: Iterable[str]) -> bool:
    """True if a layer matches `targets`, by peft's rule for `target_modules`."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _without_stock(names: Iterable[str]) -> list[str]:
    return [name.removeprefix("stock.").removesuffix(".weight") for name in names]


def _linear_layers(model: LoadedModel, family: Family | None, head: set[str]) -> tuple[list[str], list[str]]:
    """The names in transformers of the linear layers of the head, and of those of the encoder."""
    if family is None:
        linear = [f"{n}.weight" for n, part in model.module.named_modules() if isinstance(part, nn.Linear)]
        above = [name for name in linear if name in head]
        inside = [name for name in linear if name not in head]
        return _without_stock(above), _without_stock(inside)
    above, inside = [], []
    for ours, theirs in weight_names(family, model.module.shape).items():
        if isinstance(model.module.get_submodule(ours.rpartition(".")[0]), nn.Linear) and ours.endswith(".weight"):
            names = theirs if isinstance(theirs, tuple) else (theirs,)
            (above if ours in head else inside).extend(name.removesuffix(".weight") for name in names)
    return above, inside


def _targets(args: Arguments, model: LoadedModel, family: Family | None, layers: list[str]) -> tuple[str, ...]:
    if args.lora_target_modules == _ALL:
        return tuple(layers)
    if args.lora_target_modules is not None:
        return tuple(args.lora_target_modules.split(","))
    kind = model.config.get("model_type", "")
    if kind in FAMILIES:  # query and value, as in the paper; peft names no default for some of them
        names = FAMILIES[kind].inside["qkv"]
        adapted = (
            (names,) if isinstance(names, str) else (names[0], names[2])
        )  # one product of all three is adapted whole
        return tuple(name.rpartition(".")[2] for name in adapted)
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    if not isinstance(DEFAULTS.get(kind), list):
        raise UsageError(f"--lora_rank: peft has no default for model_type {kind!r}: give --lora_target_modules")
    return tuple(DEFAULTS[kind])


def _modules_to_save(model: LoadedModel, family: Family | None, above: list[str]) -> list[str]:
    """The names of the head's modules for peft, inside the encoder's prefix or beside it."""
    prefix = family.prefix if family else model.module.stock.base_model_prefix
    return sorted({name.removeprefix(f"{prefix}.").split(".")[0] for name in above})


def _add_packed(module: nn.Module, family: Family, found: tuple[str, ...], args: Arguments, scaling: float) -> None:
    for ours, theirs in weight_names(family, module.shape).items():
        names = theirs if isinstance(theirs, tuple) else (theirs,)
        parts = tuple(n for n, name in enumerate(names) if name.removesuffix(".weight") in found)
        if parts and ours.endswith(".weight"):
            product = module.get_submodule(ours.removesuffix(".weight"))
            outputs, inputs = product.weight.shape
            product.low_rank = LowRank(inputs, outputs, args.lora_rank, scaling, args.lora_dropout, parts, len(names))
