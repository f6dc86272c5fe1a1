"""Training runs on random weights and tokens in this process: ours by the product's own loop, and the stock Trainer's.

Neither reads a model folder, data or the network. Both have the same shape, batch size, lengths of rows,
precision, optimizer and schedule. Ours goes through everything that run_glue.py calls between the data and the trained
weights, so what is timed is what a user runs.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.common import MODEL_SHAPES, free_memory, random_split

if TYPE_CHECKING:
    import torch

    from bert_glue.config.arguments import Arguments
    from bert_glue.model.classifier import LoadedModel
    from bert_glue.training.console import ConsoleLog
    from bert_glue.training.state import TrainState

_SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
_TINY = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128}
SHAPES = {**MODEL_SHAPES, "small": _SMALL, "tiny": _TINY}
VOCABULARY = 28_996  # bert-base-cased
_WORDS = 12_000  # of them in use, about as many as mrpc has
_LONGEST = 128
_BATCHES = 40  # of an epoch; other orders of the same rows follow


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run does.

    Args:
        shape: of `SHAPES`.
        batch: samples a step.
        lengths: least and most tokens of a row, all numbers between equally often.
        precision: fp32, bf16 or fp16.
        level: O-level of ours; the stock Trainer has autocast alone.
        dropout: of hidden values and attention probabilities.
        is_recorded, is_compiled: `--cuda_graph` and `--torch_compile` of ours.
        is_padded: ours with `--padding max_length`.
        steps, skip: optimizer steps, and the first ones that no rate counts.
    """

    shape: str = "small"
    batch: int = 32
    lengths: tuple[int, int] = (25, 85)
    precision: str = "bf16"
    level: str = "O2"
    dropout: float = 0.1
    is_recorded: bool = False
    is_compiled: bool = False
    is_padded: bool = False
    steps: int = 120
    skip: int = 60

    @property
    def how(self) -> str:
        """Eager, recorded, compiled or both, for people."""
        ways = (("recorded", self.is_recorded), ("compiled", self.is_compiled))
        return " and ".join(name for name, is_on in ways if is_on) or "eager"

    @property
    def about(self) -> dict[str, object]:
        """What a row of results says of it."""
        how = f"{self.how}, padded" if self.is_padded else self.how
        precision = {"precision": self.precision, "level": self.level, "dropout": self.dropout}
        return {"shape": self.shape, "batch": self.batch, "lengths": list(self.lengths), "how": how, **precision}


def _config(setting: Setting) -> dict:
    """config.json of bert-base-cased, with the sizes and dropout of the setting."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    drops = {"hidden_dropout_prob": setting.dropout, "attention_probs_dropout_prob": setting.dropout}
    return {
        "model_type": "bert", "vocab_size": VOCABULARY, **sizes, **SHAPES[setting.shape], **drops,
        "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu", "initializer_range": 0.02,
        "layer_norm_eps": 1e-12, "pad_token_id": 0, "id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1},
    }  # fmt: skip


def _model(setting: Setting, device: torch.device) -> LoadedModel:
    """A classifier on the device; initialised there, because a host takes seconds for bert-large."""
    import torch

    from bert_glue.model.classifier import LoadedModel, PaddedClassifier
    from bert_glue.model.encoder import PackedClassifier
    from bert_glue.model.families import FAMILIES
    from bert_glue.model.weights import initialise

    config = _config(setting)
    with torch.device(device):
        if setting.is_padded:
            from transformers import BertConfig, BertForSequenceClassification

            module = PaddedClassifier(BertForSequenceClassification(BertConfig.from_dict(config)))
        else:
            module = PackedClassifier(FAMILIES["bert"].shape(config, 2))
            initialise(module, config["initializer_range"])
    tokenizer = Namespace(gives_types=True, pads_left=False)  # all that collating asks
    why = "--padding max_length" if setting.is_padded else ""
    return LoadedModel(module, tokenizer, config, not setting.is_padded, why)


def _arguments(setting: Setting, folder: str, flags: dict[str, object]) -> Arguments:
    import torch

    from bert_glue.config.arguments import Arguments

    settings = {
        "model_name_or_path": "random weights", "task_name": "mrpc", "do_train": True, "output_dir": folder,
        "per_device_train_batch_size": setting.batch, "max_steps": setting.steps, "skip_steps": setting.skip,
        "save_strategy": "no", "logging_steps": setting.steps, "learning_rate": 2e-5, "disable_tqdm": True,
        "report_to": "none", "bf16": setting.precision == "bf16", "fp16": setting.precision == "fp16",
        "fp16_opt_level": setting.level, "max_seq_length": _LONGEST, "cuda_graph": setting.is_recorded,
        "padding": "max_length" if setting.is_padded else "auto",
    }  # fmt: skip
    if setting.is_compiled:  # on a host inductor would take longer than all steps
        backend = "inductor" if torch.accelerator.is_available() else "aot_eager"
        settings |= {"torch_compile": True, "torch_compile_backend": backend}
    return Arguments(**settings | flags)


def train(setting: Setting, log: ConsoleLog | None = None, **flags: object) -> TrainState:
    """Train as run_glue.py does, without evaluation and files.

    Args:
        log: hears of every step (`advance`).
        flags: further settings of `Arguments`, such as `logging_steps`.
    """
    from bert_glue.devices.distributed import DistributedContext
    from bert_glue.devices.rng import seed_generators
    from bert_glue.evaluation.evaluator import Evaluator
    from bert_glue.precision.plan import plan_precision
    from bert_glue.tasks import get_task
    from bert_glue.training.compile import compile_model
    from bert_glue.training.console import ConsoleLog, StopSignals, Trackers
    from bert_glue.training.embedding_rows import narrow
    from bert_glue.training.setup import build_collator, fine_tune, make_precision

    with tempfile.TemporaryDirectory() as folder:
        args, log = _arguments(setting, folder, flags), log or ConsoleLog(True, False)
        ranks = DistributedContext(args)
        seed_generators(args.seed)
        task, model = get_task(args.task_name), _model(setting, ranks.device.torch_device)
        splits = {"train": random_split(setting.batch * _BATCHES, *setting.lengths, _WORDS)}
        narrowed = narrow(args, model, splits)
        precision = make_precision(args, plan_precision(args, ranks.device), model.module, ranks)
        collate = build_collator(args, model, ranks, narrowed)
        evaluator = Evaluator(model.module, collate, setting.batch, ranks, precision)
        if setting.is_compiled:
            compile_model(args, model, evaluator, splits, log)
        return fine_tune(
            args, task, splits, model=model, evaluator=evaluator, narrowed=narrowed, log=log,
            trackers=Trackers(args, is_first=False), signals=StopSignals(is_watching=False),
        )  # fmt: skip


def our_figures(state: TrainState) -> dict[str, object]:
    """Rates, milliseconds of a step, and the peak memory since `reset_peak_memory`, of a run of `train`."""
    from bert_glue.model.attention import PATHS_TAKEN

    meter = state.observers.meter
    median, low, high = (1000 * float(np.percentile(meter.step_seconds, share)) for share in (50, 10, 90))
    return {
        "samples_per_second": meter.samples / meter.seconds,
        "real_tokens_per_second": meter.real_tokens / meter.seconds,
        "step_milliseconds": {"median": median, "p10": low, "p90": high},
        "timed_steps": meter.timed_steps,
        "padding_percent": 100 * (1 - meter.real_tokens / meter.computed_tokens),
        "model_tflops_per_second": meter.flops / meter.seconds / 1e12,
        "peak_bytes": state.ranks.device.peak_memory(),
        "attention": sorted(PATHS_TAKEN),
        "optimizer": state.learner.optimizer_name,
        "steps_said": state.step.summary(),
    }


def reset_peak_memory() -> None:
    """Count the peak from now on; without effect on a CPU."""
    import torch

    free_memory()
    if torch.accelerator.is_available():
        torch.get_device_module().reset_peak_memory_stats()


def train_ours(setting: Setting) -> dict[str, object]:
    """The figures of a run, whose memory is free again."""
    from bert_glue.model.attention import PATHS_TAKEN

    reset_peak_memory()
    PATHS_TAKEN.clear()
    state = train(setting)
    return our_figures(state)


def train_stock(setting: Setting, padding: str) -> dict[str, object]:
    """The same run by the stock Trainer, through `hf_recipe`'s settings, clock and summary.

    Args:
        padding: "max_length", the default of Hugging Face's run_glue.py, or "grouped", its fastest setting: batches of
            similar lengths, padded to their longest. Both have the fused AdamW and sdpa attention.
    """
    import torch
    import transformers as hf

    from benchmarks import hf_recipe

    reset_peak_memory()
    hf.set_seed(0)
    on_device = torch.accelerator.is_available()
    with torch.device(torch.accelerator.current_accelerator() if on_device else "cpu"):
        module = hf.BertForSequenceClassification(hf.BertConfig.from_dict(_config(setting)))
    args = Namespace(
        **{
            **hf_recipe.NUMBERS, "batch_size": setting.batch, "train_steps": setting.steps, "skip_steps": setting.skip,
            "learning_rate": 2e-5, "padding": padding, "precision": setting.precision, "use_cpu": not on_device,
        }
    )  # fmt: skip
    counts: list[tuple[int, int, int]] = []
    clock = hf_recipe.StepClock(setting.skip, on_device)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _stock_tokenizer(Path(folder))
        is_wide = padding == "max_length"
        collate = hf.default_data_collator if is_wide else hf.DataCollatorWithPadding(tokenizer)
        trainer = hf.Trainer(
            model=module, args=hf_recipe.training_arguments(args, folder),
            data_collator=hf_recipe.counting(collate, counts), train_dataset=_stock_rows(setting, is_wide),
            processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    found = hf_recipe.summarize(args, trainer, clock, counts)
    names = ("samples_per_second", "real_tokens_per_second", "padding_percent")
    return {
        **{name: found[name] for name in names},
        "timed_steps": setting.steps - setting.skip,
        "peak_bytes": torch.accelerator.max_memory_allocated() if on_device else hf_recipe.peak_rss_bytes(),
        "optimizer": str(trainer.args.optim),
        "attention": [module.config._attn_implementation],
        "transformers": hf.__version__,
    }


def _stock_tokenizer(folder: Path):
    """A tokenizer for padding alone."""
    import transformers as hf

    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) + "\n", encoding="utf-8")
    return hf.BertTokenizerFast(vocab=str(vocabulary))


def _stock_rows(setting: Setting, is_wide: bool) -> list[dict]:
    """The rows of ours as the stock script's `map` makes them; padded to the longest with `is_wide`."""
    split = random_split(setting.batch * _BATCHES, *setting.lengths, _WORDS)
    table, rows = split.table, []
    for at in range(len(split)):
        tokens = slice(table.offsets[at], table.offsets[at + 1])
        ids, types = table.ids[tokens].tolist(), table.types[tokens].tolist()
        filler = [0] * (_LONGEST - len(ids) if is_wide else 0)
        mask = [1] * len(ids) + filler
        label = int(split.labels[at])
        rows.append(
            {"input_ids": ids + filler, "token_type_ids": types + filler, "attention_mask": mask, "label": label}
        )
    return rows
