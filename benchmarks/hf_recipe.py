"""The plain Hugging Face recipe, with which bert_glue is compared: the stock Trainer with its stock settings.

    python benchmarks/hf_recipe.py --model FOLDER --task mrpc --data_path GLUE --epochs 1 --json out.json
    python benchmarks/hf_recipe.py --model_shape bert-base --vocab vocab.txt --padding grouped --task cola ...

`--padding max_length` is the default of Hugging Face's run_glue.py. `longest` pads each batch to its longest sample.
`grouped`, the fastest setting, also groups samples of similar length. Only the reader of the rows and the metrics
come from bert_glue. Trainer keeps its defaults, except that checkpoints, trackers and the progress bar are off and
it logs every 10 steps. `summarize` lists the keys of the JSON.

Do not compare a few steps with `grouped`: Trainer sorts within 50 batches, longest first, so a part of an epoch has
other lengths than the data. Compare whole epochs, or tokens per second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers as hf

if TYPE_CHECKING:
    from datasets import Dataset

    from bert_glue.data.sources import Split
    from bert_glue.tasks import GlueTask

# `python benchmarks/hf_recipe.py` puts benchmarks/ on the import path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import MODEL_SHAPES  # noqa: E402

# train_steps (-1: off) goes before epochs; the first skip_steps steps, at least one, count in no rate.
NUMBERS = {
    "max_seq_length": 128, "train_steps": -1, "epochs": 3.0, "batch_size": 32, "learning_rate": 5e-5,
    "warmup_steps": 0.0, "seed": 42, "skip_steps": 3,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of one run; wrong ones end the process with code 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", help="folder of a pretrained model with its tokenizer")
    add("--model_shape", choices=MODEL_SHAPES, help="random weights of this shape instead")
    add("--vocab", help="vocabulary file for --model_shape")
    add("--lower_case", action="store_true", help="--vocab is uncased")
    add("--task", required=True, help="GLUE task")
    add("--data_path", help="as for run_glue.py; default: the hub")
    add("--sample", action="store_true", help="generated sample data (not GLUE)")
    add("--padding", choices=("max_length", "longest", "grouped"), default="max_length")
    for name, default in NUMBERS.items():
        add(f"--{name}", type=type(default), default=default)
    add("--threads", type=int, help="CPU threads of torch; default: its own choice")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast, as in Trainer")
    add("--use_cpu", action="store_true", help="train on the host although a device is there")
    add("--token_cache", type=Path, help="existing folder that keeps tokenized rows; one per tokenizer")
    add("--eval", action="store_true", help="score the validation splits after training")
    add("--max_eval_samples", type=int, help="first rows only, of each validation split")
    add("--json", required=True, type=Path, help="file for the results")
    args = parser.parse_args(argv)
    if bool(args.model) == bool(args.model_shape) or bool(args.model_shape) != bool(args.vocab):
        parser.error("give either --model, or --model_shape with --vocab")
    if args.skip_steps < 1:
        parser.error("--skip_steps: at least 1; the first step pays for allocations and lazy imports")
    return args


def seconds_since_process_start() -> float:
    """Interpreter start and imports included, to 10 ms."""
    # psutil's create_time is up to 1 s off: the kernel rounds the date of boot.
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_rss_bytes() -> int:
    """Peak host memory of this program; getrusage would count what its parent held before exec."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


class StepClock(hf.TrainerCallback):
    """Reads the clock around every step.

    On a device a reading is an event in its stream, so that measuring adds no waiting; only the first
    step, the end of the skipped steps and the end of training wait for the device.
    """

    def __init__(self, skip_steps: int, on_device: bool) -> None:
        self.skip_steps, self.on_device = skip_steps, on_device
        self.begins, self.ends = [], []
        self.first_step_s = self.trained_s = self.window_start = self.window_s = None

    def _reading(self) -> Any:
        if not self.on_device:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def _waited(self) -> float:
        if self.on_device:
            torch.accelerator.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.begins.append(self._reading())

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(self._reading())
        if len(self.ends) == self.skip_steps:
            self.window_start = self._waited()
        if len(self.ends) == 1:
            self._waited()
            self.first_step_s = seconds_since_process_start()

    def on_train_end(self, args, state, control, **kwargs):
        now = self._waited()
        self.trained_s = seconds_since_process_start()
        if len(self.ends) > self.skip_steps:
            self.window_s = now - self.window_start

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two readings."""
        return start.elapsed_time(end) / 1000 if self.on_device else end - start


def counting(collate: Callable, counts: list[tuple[int, int, int]]) -> Callable:
    """The same collator, adding (samples, real tokens, computed tokens) of each batch to `counts`."""

    def collate_and_count(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(features)
        mask = batch["attention_mask"]
        counts.append((len(mask), int(mask.sum()), mask.numel()))
        return batch

    return collate_and_count


def load_model(args: argparse.Namespace, task: GlueTask) -> tuple[Any, Any]:
    """(tokenizer, classifier): pretrained, or random weights of a shape."""
    if args.model:
        tokenizer = hf.AutoTokenizer.from_pretrained(args.model)
        config = hf.AutoConfig.from_pretrained(args.model, num_labels=task.num_labels)
        return tokenizer, hf.AutoModelForSequenceClassification.from_pretrained(args.model, config=config)
    # transformers 5 calls it `vocab`; `vocab_file` is swallowed without a word and leaves 5 tokens.
    tokenizer = hf.BertTokenizerFast(vocab=args.vocab, do_lower_case=args.lower_case)
    sizes = {"vocab_size": len(tokenizer), "num_labels": task.num_labels}
    config = hf.BertConfig(**sizes, **MODEL_SHAPES[args.model_shape])
    return tokenizer, hf.AutoModelForSequenceClassification.from_config(config)


def tokenized(args: argparse.Namespace, tokenizer, task: GlueTask, split: Split) -> Dataset:
    """One split as a tokenized `datasets` table, made by `map` as in Hugging Face's script."""
    from datasets import Dataset

    columns = dict(zip(task.columns, split.texts, strict=True))
    table = Dataset.from_dict({**columns, "label": split.labels})
    how = {"padding": "max_length" if args.padding == "max_length" else False, "truncation": True}

    def tokenize(rows: dict[str, list]) -> dict[str, list]:
        return tokenizer(*(rows[column] for column in columns), max_length=args.max_seq_length, **how)

    name = f"{task.name}-{split.name}-{args.padding}-{args.max_seq_length}-{len(split)}.arrow"
    cache = args.token_cache and str(args.token_cache / name)
    return table.map(tokenize, batched=True, cache_file_name=cache)


def training_arguments(args: argparse.Namespace, output_dir: str) -> hf.TrainingArguments:
    """Trainer's settings: what is not named here has its default (fused AdamW, linear decay, clip 1.0)."""
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 10}
    return hf.TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        max_steps=args.train_steps,
        warmup_steps=args.warmup_steps,  # below 1: share of all steps
        train_sampling_strategy="group_by_length" if args.padding == "grouped" else "random",
        seed=args.seed,
        bf16=args.precision == "bf16",
        use_cpu=args.use_cpu or not torch.accelerator.is_available(),  # else bf16 asks for a device
        **quiet,
    )


def scorer(task: GlueTask):
    """Trainer's `compute_metrics` for the task."""
    from bert_glue.evaluation.metrics import compute_metrics

    # Loads scikit-learn now: 2 s that would otherwise count as evaluation time of Trainer.
    compute_metrics(task, np.arange(2), np.arange(2))

    def score(prediction: hf.EvalPrediction) -> dict[str, float | None]:
        logits = prediction.predictions
        answers = logits.reshape(-1) if task.is_regression else np.argmax(logits, axis=1)
        return dict(compute_metrics(task, answers, prediction.label_ids))

    return score


def evaluate(trainer: hf.Trainer, counts: list, split: str, table: Dataset) -> dict[str, Any]:
    """Scores and rates of one validation split; collating and scoring are in the seconds."""
    first_batch, start = len(counts), time.perf_counter()
    found = trainer.evaluate(table, metric_key_prefix=split)
    seconds = time.perf_counter() - start
    trainers_own = ("_runtime", "_per_second", "_time", "epoch")
    scores = {key.removeprefix(f"{split}_"): found[key] for key in found if not key.endswith(trainers_own)}
    _, real_tokens, computed_tokens = map(sum, zip(*counts[first_batch:], strict=True))
    rates = {"samples": len(table), "seconds": seconds, "samples_per_second": len(table) / seconds}
    return {"metrics": scores, "real_tokens": real_tokens, "computed_tokens": computed_tokens, **rates}


def summarize(args: argparse.Namespace, trainer: hf.Trainer, clock: StepClock, counts: list) -> dict:
    """What training did; counts, seconds and rates.

    A step's `forward_to_update_s` is on_step_begin to on_step_end; its `seconds` start at the end of the
    step before, so that collating is in it (null for the first). `window_*` and the rates are of all
    steps after --skip_steps, null where none was left.
    """
    counts = counts[: len(clock.ends)]
    keys = ("samples", "real_tokens", "computed_tokens")
    steps = [dict(zip(keys, count, strict=True)) for count in counts]
    for i, step in enumerate(steps):
        step["forward_to_update_s"] = clock.seconds(clock.begins[i], clock.ends[i])
        step["seconds"] = clock.seconds(clock.ends[i - 1], clock.ends[i]) if i else None
    window = {key: sum(step[key] for step in steps[args.skip_steps :]) for key in keys}
    return {
        "steps": steps,
        "window_seconds": clock.window_s,
        **{f"window_{key}": total for key, total in window.items()},
        **{f"{key}_per_second": clock.window_s and total / clock.window_s for key, total in window.items()},
        "padding_percent": 100 * (1 - sum(c[1] for c in counts) / sum(c[2] for c in counts)),
        "process_start_to_first_step_s": clock.first_step_s,
        "process_start_to_trained_s": clock.trained_s,
        "train_loss": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        **{"device": str(trainer.args.device), "threads": torch.get_num_threads()},
        "epochs_done": trainer.state.epoch,
    }


def run(args: argparse.Namespace, output_dir: str) -> dict[str, Any]:
    """Rows -> tokens -> model -> train -> evaluate; returns what goes into the JSON."""
    from bert_glue.config.arguments import Arguments
    from bert_glue.data.sources import load_task_data

    torch.set_num_threads(args.threads or torch.get_num_threads())
    hf.set_seed(args.seed)
    settings = Arguments(task_name=args.task, data_path=args.data_path, sample=args.sample)
    data = load_task_data(settings, frozenset({"train", "evaluation"} if args.eval else {"train"}))
    tokenizer, model = load_model(args, data.task)
    splits = {n: s if n == "train" or not args.max_eval_samples else s.take(args.max_eval_samples)
              for n, s in data.splits.items()}  # fmt: skip
    tables = {name: tokenized(args, tokenizer, data.task, split) for name, split in splits.items()}
    collate = hf.default_data_collator if args.padding == "max_length" else hf.DataCollatorWithPadding(tokenizer)
    counts: list[tuple[int, int, int]] = []
    on_device = torch.accelerator.is_available() and not args.use_cpu
    clock = StepClock(args.skip_steps, on_device)
    trainer = hf.Trainer(
        model=model,
        args=training_arguments(args, output_dir),
        data_collator=counting(collate, counts),
        train_dataset=tables.pop("train"),
        processing_class=tokenizer,
        compute_metrics=scorer(data.task) if args.eval else None,
        callbacks=[clock],
    )
    trainer.train()
    report = {"source": data.source, "settings": vars(args)}
    report |= summarize(args, trainer, clock, counts)
    report["training_peak_rss_bytes"] = peak_rss_bytes()
    report["peak_device_bytes"] = torch.accelerator.max_memory_allocated() if on_device else None
    report["evaluation"] = {name: evaluate(trainer, counts, name, table) for name, table in tables.items()}
    report["peak_rss_bytes"] = peak_rss_bytes()
    report["ru_maxrss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return report | {"process_start_to_end_s": seconds_since_process_start()}


def main() -> int:
    """Runs the recipe and writes the JSON."""
    args = parse()
    with tempfile.TemporaryDirectory() as output_dir:
        report = run(args, output_dir)
    args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print({name: report[name] for name in ("samples_per_second", "padding_percent", "peak_rss_bytes")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
