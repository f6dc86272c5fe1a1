"""The loss of one forward pass over a batch, and the terms that `--rdrop_alpha` and `--fgm_epsilon` add to it."""

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
    """Sum of the samples' squared errors or (smoothed, weighted) cross-entropies, 0-d fp32.

    The loss of a multi-label row is the mean over the classes, as in transformers. Smoothing moves the target of each
    class towards 0.5 by half of `smoothing`, which is the rule of cross-entropy for the two outcomes of one class.

    Args:
        logits: `[samples, labels]`.
        labels: `[samples]`, class ids or scores; multi-label `[samples, labels]`, 0 or 1.
        smoothing: label smoothing, in [0, 1).
        weights: weights of the classes, `[labels]` fp32, from `--class_weights`.
    """
    # In 16 bits the sum of exponentials would round away classes with small probabilities. A cast of
    # `[samples, labels]` costs nothing.
    logits = logits.float()
    if task.is_multi_label:
        targets = labels.float() * (1 - smoothing) + 0.5 * smoothing
        total = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
        return total / task.num_labels
    if task.is_regression:
        return F.mse_loss(logits[:, 0], labels, reduction="sum")
    return F.cross_entropy(logits, labels, weight=weights, reduction="sum", label_smoothing=smoothing)


def disagreement(task: GlueTask, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Sum over the samples of the distance between two passes' logits, 0-d fp32.

    The distance is the mean of both Kullback-Leibler divergences (R-Drop, Liang et al. 2021, arXiv 2106.14448,
    equation 2). For a regression it is the squared difference of the scores. For a multi-label task it is the mean over
    the classes, each with a distribution over two outcomes.

    Args:
        one, other: `[samples, labels]`.
    """
    if task.is_regression:
        return F.mse_loss(one[:, 0].float(), other[:, 0].float(), reduction="sum")
    if task.is_multi_label:  # both divergences of p and q together are (p - q) (logit p - logit q)
        a, b = one.float(), other.float()
        return 0.5 * ((a.sigmoid() - b.sigmoid()) * (a - b)).sum() / task.num_labels
    p, q = one.float().log_softmax(1), other.float().log_softmax(1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum()


class Objective:
    """The training objective: yields the losses of each forward pass, one after the other, for a backward pass each.

    Args:
        module: the model, called with a batch's inputs.
        rank: rank of this process, >= 0; ranks draw different dropout masks.
        weights: weights of the classes, `[labels]`; None without `--class_weights`.
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
        """Number of forward passes over each batch."""
        return 2 if self.args.rdrop_alpha or self.shift else 1

    def begin(self, number: int) -> None:
        """Set the number of the run's next batch, counted from 0; the dropout masks depend on it."""
        self.dropout_masks.begin(number)
        self.second.begin(number)

    def losses(self, batch: Batch, samples: int, autocast: Callable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (loss, loss to log) of the batch, and with `--fgm_epsilon` also those of the adversarial pass.

        The loss is this batch's share of the mean over `samples`, 0-d. The loss to log is the task's own loss; that of
        the adversarial pass is 0. The caller runs each backward pass before it requests the next loss.

        Args:
            samples: samples of the optimizer step, on all ranks together.
            autocast: function that returns the context of a forward pass.
        """
        # R-Drop's loss needs the logits of both passes. Two graphs live at once and take twice the activations.
        with autocast():
            logits = self._logits(batch, self.dropout_masks)
            again = self._logits(batch, self.second) if self.args.rdrop_alpha else None
        loss = shown = self._mean(logits, batch, samples)
        # The mean of both losses and not their sum, as in the authors' code, so that a learning rate keeps its meaning.
        if again is not None:
            apart = disagreement(self.task, logits, again) / samples
            shown = 0.5 * (loss + self._mean(again, batch, samples))
            loss = shown + self.args.rdrop_alpha * apart
        yield loss, shown.detach()
        # The caller has now run the first backward pass, whose gradient with respect to the embeddings is the direction
        # of the move. FGM costs a second forward and backward pass, but hardly any memory: the first graph is free.
        if self.shift is not None:
            with self.shift.against(batch), autocast():
                logits = self._logits(batch, self.second)
            yield self._mean(logits, batch, samples), torch.zeros_like(shown)

    def _logits(self, batch: Batch, dropout_masks: DropoutMasks) -> torch.Tensor:
        """Logits of each sample, `[samples, labels]`; for a row in several windows the mean over its windows."""
        # Evaluation scores the same mean. A loss for each window would weigh a row by its length, and would expect the
        # label of a window although the evidence for it may be in another window.
        return batch.row_means(self.module(**batch.inputs, dropout_masks=dropout_masks))

    def _mean(self, logits: torch.Tensor, batch: Batch, samples: int) -> torch.Tensor:
        # torch's mean of weighted losses divides by the sum of the weights. Here it is the sum over the whole step, the
        # same in all passes and ranks: plain sums over them give the mean of one process with the same global batch.
        total = samples if batch.step_weight is None else batch.step_weight
        return sample_losses(self.task, logits, batch.labels, self.args.label_smoothing_factor, self.weights) / total

    def close(self) -> None:
        """Remove the hook from the word embedding."""
        if self.shift is not None:
            self.shift.close()


class EmbeddingShift:
    """FGM (Miyato et al. 2017, arXiv 1605.07725): moves word embeddings to where the loss grows fastest.

    The move is r = epsilon * g / |g|. g is the gradient of the loss with respect to the embeddings of one sequence, and
    |g| is its L2 norm over all tokens of the sequence.

    Args:
        module: the model; its word embedding gets a hook.
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
        output.retain_grad()  # `[tokens, width]` more in memory until the move is computed
        self.output = output
        return None

    def against(self, batch: Batch) -> EmbeddingShift:
        """A context whose forward pass reads moved embeddings; call it after the backward pass of the loss."""
        gradient = self.output.grad.float()  # squares of fp16 gradients would underflow
        squares = gradient.square().sum(-1)
        if "layout" in batch.inputs:  # `[1, tokens]` or `[tokens]`: the sequences lie one after the other
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
        """Remove the hook."""
        self._hook.remove()
