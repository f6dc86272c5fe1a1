"""The loss of one forward pass over a batch, and what `--rdrop_alpha` and `--fgm_epsilon` add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bert_glue.config.arguments import Arguments
from bert_glue.data.batching import Batch
from bert_glue.model.layers import DropoutMasks
from bert_glue.tasks import GlueTask


def sample_losses(
    task: GlueTask,
    logits: torch.Tensor,
    labels: torch.Tensor,
    smoothing: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over `[samples]` of squared errors or (smoothed, weighted) cross-entropies, in fp32, 0-d.

    A multi-label row's loss is the mean over the classes, as transformers has it. Smoothing moves each class's target
    towards 0.5, by half of `smoothing`: cross-entropy's own rule for the two outcomes of one class.

    Args:
        weights: `[labels]` fp32, of `--class_weights`.
    """
    logits = logits.float()
    if task.is_multi_label:
        targets = labels.float() * (1 - smoothing) + 0.5 * smoothing
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / task.num_labels
    if task.is_regression:
        return F.mse_loss(logits[:, 0], labels, reduction="sum")
    return F.cross_entropy(logits, labels, weight=weights, reduction="sum", label_smoothing=smoothing)


def disagreement(task: GlueTask, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Sum over `[samples]` of how far two passes' logits `[samples, labels]` are apart, in fp32, 0-d.

    The mean of both Kullback-Leibler divergences (R-Drop, Liang et al. 2021, arXiv 2106.14448, equation 2);
    for regression the squared difference of the scores; multi-label the mean over the classes, whose distributions
    have two outcomes each.
    """
    if task.is_regression:
        return F.mse_loss(one[:, 0].float(), other[:, 0].float(), reduction="sum")
    if task.is_multi_label:  # both divergences of p and q together are (p - q) (logit p - logit q)
        a, b = one.float(), other.float()
        return 0.5 * ((a.sigmoid() - b.sigmoid()) * (a - b)).sum() / task.num_labels
    p, q = one.float().log_softmax(1), other.float().log_softmax(1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum()


class Objective:
    """What is minimised: gives each pass's losses, one after the other, for a backward pass each.

    Args:
        module: called with a batch's inputs.
        rank: of this process; ranks draw different dropout masks.
        weights: of the classes, `[labels]`, where `--class_weights` gives some.
    """

    def __init__(
        self, args: Arguments, task: GlueTask, module: nn.Module, rank: int, weights: np.ndarray | None = None
    ):
        self.args = args
        device = next(module.parameters()).device
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)
        self.task = task
        self.module = module
        self.dropout_masks, self.second = DropoutMasks(args.seed, rank), DropoutMasks(args.seed, rank, branch=1)
        self.shift = EmbeddingShift(module, args.fgm_epsilon) if args.fgm_epsilon else None

    @property
    def passes(self) -> int:
        """Forward passes over each batch."""
        return 2 if self.args.rdrop_alpha or self.shift else 1

    def begin(self, number: int) -> None:
        """Say which batch of the run comes next, counted from 0."""
        self.dropout_masks.begin(number)
        self.second.begin(number)

    def losses(self, batch: Batch, samples: int, autocast: Callable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The loss (0-d, this batch's share of the mean over `samples`), then an adversarial one if asked.

        With each goes what to show of it: the task's own loss, and 0 for an adversarial one.

        The caller runs each one's backward pass before it asks for the next.

        Args:
            samples: of the optimizer step, on all ranks together.
            autocast: gives the context of a forward pass.
        """
        # R-Drop's loss needs the logits of both passes: two graphs live at once, which takes twice the activations.
        with autocast():
            logits = self._logits(batch, self.dropout_masks)
            again = self._logits(batch, self.second) if self.args.rdrop_alpha else None
        loss = shown = self._mean(logits, batch, samples)
        if again is not None:  # the mean of both losses, as in the authors' code: the rate keeps its meaning
            apart = disagreement(self.task, logits, again) / samples
            shown = 0.5 * (loss + self._mean(again, batch, samples))
            loss = shown + self.args.rdrop_alpha * apart
        yield loss, shown.detach()
        # The caller has run the first backward by now, whose gradient by the embeddings says where to move them.
        if self.shift is not None:
            with self.shift.against(batch), autocast():
                logits = self._logits(batch, self.second)
            yield self._mean(logits, batch, samples), torch.zeros_like(shown)

    def _logits(self, batch: Batch, dropout_masks: DropoutMasks) -> torch.Tensor:
        """Logits of each sample, `[samples, labels]`.

        Of a row in windows their mean, which is what evaluation scores: a loss for each window would weigh a row by
        its length, and ask each window for a label whose grounds may stand in another.
        """
        return batch.row_means(self.module(**batch.inputs, dropout_masks=dropout_masks))

    def _mean(self, logits: torch.Tensor, batch: Batch, samples: int) -> torch.Tensor:
        # torch's mean of weighted losses divides by the weights' sum. That of the whole step is the same for all of its
        # passes and ranks, so that plain sums over them make the mean of one process with the same global batch.
        total = samples if batch.step_weight is None else batch.step_weight
        return sample_losses(self.task, logits, batch.labels, self.args.label_smoothing_factor, self.weights) / total

    def close(self) -> None:
        """Take the hook off the word embedding."""
        if self.shift is not None:
            self.shift.close()


class EmbeddingShift:
    """FGM (Miyato et al. 2017, arXiv 1605.07725): word embeddings moved to where the loss grows fastest.

    r = epsilon * g / |g|, with g the gradient of the loss by the embeddings of one sequence and |g| its L2
    norm over all its tokens.

    Args:
        module: its word embedding gets a hook.
        epsilon: L2 norm of each sequence's move, in the unit of the word embeddings, > 0.
    """

    def __init__(self, module: nn.Module, epsilon: float):
        self.epsilon = epsilon
        self.output: torch.Tensor | None = None
        self.move: torch.Tensor | None = None
        words = module.stock.get_input_embeddings() if hasattr(module, "stock") else module.words
        self._hook = words.register_forward_hook(self._on_output)

    def _on_output(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        if self.move is not None:
            return output + self.move
        output.retain_grad()
        self.output = output
        return None

    def against(self, batch: Batch) -> EmbeddingShift:
        """As a context: embeddings of the forward pass in it are moved; after the loss's backward pass."""
        gradient = self.output.grad.float()
        squares = gradient.square().sum(-1)
        if "layout" in batch.inputs:  # [1, tokens] or [tokens]: sequences one after the other
            lengths = torch.tensor(batch.inputs["layout"].all_lengths)
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(squares.device)
            sums = torch.zeros(len(lengths), device=squares.device).index_add_(0, owner, squares.flatten())
            norms = sums.sqrt()[owner].view(squares.shape)
        else:
            norms = squares.sum(1, keepdim=True).sqrt().expand_as(squares)
        scale = torch.where(norms > 0, self.epsilon / norms, torch.zeros_like(norms))
        self.move = (gradient * scale[..., None]).to(self.output.dtype)
        self.output = None
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        self.move = None

    def close(self) -> None:
        """Take the hook off."""
        self._hook.remove()
