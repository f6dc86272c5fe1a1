"""What treats layers by their height: `--layerwise_lr_decay` and `--reinit_layers`."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from bert_glue.errors import UsageError
from bert_glue.packed import PackedClassifier
from bert_glue.weights import initialise

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")
_BELOW = ("words.", "positions.", "types.", "embedding_norm.", "projection.")


def rate_factors(names: Iterable[str], decay: float, is_shared: bool) -> dict[str, float]:
    """Factor of the learning rate of each parameter, in (0, 1].

    The head and the top layer have 1, each layer below `decay` times that of the one above it, and the
    embeddings once more (Howard and Ruder 2018, arXiv 1801.06146; Zhang et al. 2021, arXiv 2006.05987, section 6).

    Args:
        names: of all parameters.
        is_shared: whether the layers are one set of weights.

    Raises:
        UsageError: layers cannot be told apart.
    """
    names = list(names)
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    heights = {name: _height(name) for name in names}
    known = [height for height in heights.values() if height]
    if is_shared or not known:
        raise UsageError(f"--layerwise_lr_decay {decay:g}: the layers of this model are one set, or have no numbers")
    return {name: 1.0 if height is None else decay ** (max(known) - height) for name, height in heights.items()}


def _height(name: str) -> int | None:
    """0 of embeddings, n of the n-th layer, None of what is above all layers."""
    if found := _LAYER.search(name):
        return int(found[1]) + 1
    return 0 if name.startswith(_BELOW) or "embed" in name else None


@torch.no_grad()
def reinitialise(module: PackedClassifier, count: int, deviation: float) -> str:
    """Start the top layers and BERT's pooler anew (Zhang et al. 2021, arXiv 2006.05987, section 4).

    Args:
        count: of layers, >= 1.
        deviation: standard deviation of new weights.

    Returns:
        A line for the log.

    Raises:
        UsageError: the model has not so many layers, or they are one set of weights.
    """
    total = module.shape.layers
    if module.shape.shared_layers:
        raise UsageError(f"--reinit_layers {count}: the layers of this model are one set of weights")
    if count > total:
        raise UsageError(f"--reinit_layers {count}: the model has {total} layers")
    for part in (*module.layers[total - count :], module.head_dense):
        initialise(part, deviation)
        for norm in part.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.reset_parameters()
    return f"--reinit_layers {count}: the head's dense layer and layers {total - count + 1} to {total} start anew"
