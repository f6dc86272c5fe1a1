"""A packed encoder beside the padded model of transformers: logits and gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from tiny_models import packed_like, random_batch, takes_types

from bert_glue.model.encoder import PackedClassifier
from bert_glue.model.families import FAMILIES, weight_names
from bert_glue.model.layers import DropoutMasks

LOGITS_LIMIT = 1e-5  # largest difference


GRADIENT_LIMIT = 1e-5  # relative, per parameter and overall


LENGTH_SETS = ((37, 1, 2, 200, 3, 64, 61), (512, 1, 255), (1,), (2, 2), (512,), (9,) * 5)


def _backward(logits: torch.Tensor) -> None:
    F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()


def _stock_logits(stock, padded: dict) -> torch.Tensor:
    drops = set() if takes_types(stock.config.model_type) else {"token_type_ids"}
    return stock(**{k: v for k, v in padded.items() if k not in drops}).logits


def _stock_gradients(stock, shape) -> dict[str, torch.Tensor]:
    """Gradients of `stock` under our names."""
    theirs = {name: parameter.grad for name, parameter in stock.named_parameters()}
    names = weight_names(FAMILIES[stock.config.model_type], shape)
    return {ours: torch.cat([theirs[p] for p in (t if isinstance(t, tuple) else (t,))]) for ours, t in names.items()}


def _assert_same_gradients(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(reference)
    total = torch.cat([g.flatten() for g in reference.values()]).norm()
    assert total > 0.1
    difference = torch.cat([(ours[n] - reference[n]).flatten() for n in reference]).norm()
    assert difference <= GRADIENT_LIMIT * total
    for name, gradient in reference.items():
        # A sequence of one token has no gradient in query and key at all, only rounding.
        assert (ours[name] - gradient).norm() <= GRADIENT_LIMIT * max(gradient.norm(), 1e-3 * total), name


def _compare(stock, module, lengths, tail=0, vocab=120) -> None:
    packed, padded = random_batch(lengths, vocab, takes_types(stock.config.model_type), tail)
    stock.zero_grad(set_to_none=True)
    module.zero_grad(set_to_none=False)  # the views of flat buffers stay
    expected, logits = _stock_logits(stock, padded), module(**packed)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= LOGITS_LIMIT * max(1.0, expected.abs().max().item())
    _backward(expected)
    _backward(logits)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    _assert_same_gradients(gradients, _stock_gradients(stock, module.shape))


_RATES = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "output_dropout": 0.1, "head_dropouts": (0.1, 0.2)}


def with_dropout(stock, **options) -> PackedClassifier:
    """The packed encoder with the weights of `stock` and another rate at each place, in training.

    Args:
        options: of `PackedClassifier`.
    """
    plain = packed_like(stock)
    inner = {"inner_dropout": 0.2, "embedding_dropout": 0.1} if stock.config.model_type == "modernbert" else {}
    module = PackedClassifier(replace(plain.shape, **_RATES, **inner), **options)
    module.load_state_dict(plain.state_dict())
    return module.train()


def assert_finite_differences(module: PackedClassifier, lengths: tuple[int, ...], limit: float) -> None:
    """Check every gradient of a module in fp64, under its own dropout, along a random direction.

    Args:
        lengths: tokens of each of three rows.
        limit: largest difference, relative where the slope exceeds 1.
    """
    packed, _ = random_batch(lengths)
    masks = DropoutMasks(seed=1)

    def loss() -> torch.Tensor:
        return F.cross_entropy(module(**packed, dropout_masks=masks), torch.tensor([0, 1, 2]))

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = loss()
            parameter -= 2e-6 * direction
            slope = (above - loss()) / 2e-6
            parameter += 1e-6 * direction
        expected = (parameter.grad * direction).sum()
        assert abs(slope - expected) <= limit * max(1.0, abs(expected)), name
