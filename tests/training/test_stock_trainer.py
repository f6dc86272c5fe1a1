"""Step by step the same numbers as the stock Hugging Face Trainer, given its order of samples and no dropout.

What remains between the two is chance: the order that a seed gives, and the masks of dropout.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_run import arguments, fit, losses, make_model

from bert_glue.training.resume import whole_weights

RATE, BATCH = 2e-3, 8


class _InOrder(torch.utils.data.Sampler):
    """Epoch after epoch the order that our run takes."""

    def __init__(self, run):
        self.run, self.epoch = run, -1

    def __len__(self) -> int:
        return self.run.data.sampler.rows

    def __iter__(self):
        self.epoch += 1
        return iter(self.run.data.sampler.permutation(self.epoch).tolist())


def _rows(run) -> list[dict]:
    table, rows = run.data.split.table, []
    for at in range(len(table)):
        tokens = slice(table.offsets[at], table.offsets[at + 1])
        ids, types = table.ids[tokens].tolist(), table.types[tokens].tolist()
        rows.append({"input_ids": ids, "token_type_ids": types, "labels": int(run.data.split.labels[at])})
    return rows


def _trainer(run, folder, model_folder: str, **settings):
    import transformers as hf

    order = _InOrder(run)

    class InOrder(hf.Trainer):
        seen: list[float] = []

        def _get_train_sampler(self, *args, **kwargs):
            return order

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            self.seen.append((found[0] if isinstance(found, tuple) else found).item())
            return found

    model = hf.AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    tokenizer = hf.AutoTokenizer.from_pretrained(model_folder)
    args = hf.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, learning_rate=RATE, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    return InOrder(model, args, hf.DataCollatorWithPadding(tokenizer), _rows(run), processing_class=tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1, "warmup_steps": 3, "lr_scheduler_type": "cosine"},
        {"max_grad_norm": 0.05, "dataloader_drop_last": True, "adam_epsilon": 1e-6},
    ],
    ids=["defaults", "decay-warmup-cosine", "clip-drop_last"],
)
def test_losses_and_weights_are_those_of_the_stock_trainer(tmp_path, settings):
    head = {"classifier.weight": np.linspace(-0.2, 0.2, 32, dtype=np.float32).reshape(2, 16)}
    head["classifier.bias"] = np.zeros(2, np.float32)
    model = str(make_model(tmp_path / "headed", changes=head))
    run = fit(
        arguments(tmp_path, model_name_or_path=model, learning_rate=RATE, per_device_train_batch_size=BATCH, **settings)
    )
    trainer = _trainer(run, tmp_path / "hf", model, num_train_epochs=2, **settings)
    trainer.train()
    assert len(trainer.seen) == run.data.total_steps == 2 * (29 // BATCH if settings.get("dataloader_drop_last") else 4)
    assert losses(run) == pytest.approx(trainer.seen, rel=1e-4)
    theirs = trainer.model.state_dict()
    for name, ours in whole_weights(run).items():
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding only, and Adam makes steps of any gradient
        difference = (ours - theirs[name]).abs().max().item()
        assert difference <= 0.05 * RATE * math.sqrt(run.data.total_steps), name
