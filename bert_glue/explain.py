"""Which tokens decided: gradient x input of the predicted logit (Shrikumar et al. 2017), for a few rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bert_glue.batching import TokenSplit
from bert_glue.evaluation import Evaluator, predictions_of, row_losses
from bert_glue.model import LoadedModel
from bert_glue.tasks import GlueTask


def explain(
    task: GlueTask, model: LoadedModel, evaluator: Evaluator, split: TokenSplit, logits: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """The `count` rows of highest loss with a signed score for each token.

    Costs a forward and a backward pass a row; no weight and no gradient buffer is touched.

    Args:
        logits: of the whole split, `[rows, labels]`.
    """
    rows = np.argsort(-row_losses(task, logits, split.labels), kind="stable")[:count]
    predictions = predictions_of(task, logits)
    evaluator.module.eval()
    found = []
    for row in rows.tolist():
        label, prediction = split.labels[row], predictions[row]
        ids = split.table.ids[split.table.borders[row] : split.table.borders[row + 1]].tolist()
        scores = token_scores(model, evaluator, split, row, 0 if task.is_regression else int(prediction))
        shown = (
            (f"{label:.2f}", f"{prediction:.2f}")
            if task.is_regression
            else (task.labels[label], task.labels[prediction])
        )
        found.append(
            {
                "row": row,
                "label": shown[0],
                "prediction": shown[1],
                "tokens": [model.tokenizer.backend.id_to_token(i) or "?" for i in ids],
                "scores": [round(float(score), 5) for score in scores[: len(ids)]],
            }
        )
    return found


def token_scores(model: LoadedModel, evaluator: Evaluator, split: TokenSplit, row: int, output: int) -> torch.Tensor:
    """Gradient of one logit times each token's word embedding, summed over its width.

    Args:
        output: which logit.

    Returns:
        `[tokens]` float32 on the host.
    """
    words = model.module.words if model.is_packed else model.module.stock.get_input_embeddings()
    leaves: list[torch.Tensor] = []

    def as_leaf(module: torch.nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    handle = words.register_forward_hook(as_leaf)
    try:
        with evaluator.precision.autocast():
            logits = evaluator.module(**evaluator.assemble(split, np.array([row])).inputs)
        gradient = torch.autograd.grad(logits.float()[0, output], leaves[0])[0]
    finally:
        handle.remove()
    return (gradient.float() * leaves[0].detach().float()).sum(-1).flatten().cpu()
