"""Exports a finished run as ONNX, with the command for an Ascend OM model: `python -m bert_glue.export RUN --onnx`

The graph takes the output of transformers' tokenizers: `input_ids`, `attention_mask` and, if the model has token types,
`token_type_ids`, each `[batch, seq_len]` int64 of any size. It returns `logits` `[batch, labels]`. If onnxruntime is
installed, its logits are compared with torch's for several shapes, and a model that differs is not kept. Then it and
its variants (`--fp16`, `--int8`) run on the validation rows of the run, see `onnx_variants`.
`<name>.atc.sh` beside it has CANN's command. atc itself is part of CANN and is not run here.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bert_glue.config.command_line import CommandParser
from bert_glue.errors import MachineError, UserError, exit_code_of, print_lines, printable, run_program
from bert_glue.launch.requirements import refuse_unusable
from bert_glue.storage.files import write_whole, written_aside
from bert_glue.tasks import MULTI_LABEL

if TYPE_CHECKING:
    import torch

    from bert_glue.model.classifier import LoadedModel

_OPSET = 18  # the oldest that torch's exporter writes without converting
_TRACED_OPSET = 17  # the newest that the tracer writes
_ROWS = 256  # validation rows that the graphs are compared on
_SHAPES = ((1, 8), (3, 17), (8, 64))  # batch, seq_len
_TOLERANCE = 1e-4  # of logits, fp32
_LENGTHS = (32, 64, 96, 128)  # atc compiles the graph for each; its documentation advises three or four


def load(name: str, problem_type: str | None = None) -> LoadedModel:
    """A fine-tuned classifier as transformers' own module, on the host, in fp32.

    Args:
        problem_type: `--problem_type`, for a model whose config.json has none.

    Raises:
        MachineError: the folder does not exist or has no fine-tuned classifier.
        UsageError: config.json has another problem_type, or the number of outputs does not fit it.
    """
    from transformers.utils.logging import disable_progress_bar

    from bert_glue.config.arguments import Arguments
    from bert_glue.model.folder import model_folder, task_of_model
    from bert_glue.model.loading import load_model

    disable_progress_bar()  # of reading one file
    args = Arguments(model_name_or_path=name, padding="longest", problem_type=problem_type)
    model = load_model(args, task_of_model(model_folder(name, args), problem_type)[0])
    if model.fresh:
        raise MachineError(f"{name} has no classifier; fine-tune it first")
    # Eager attention is traced as plain matrix products, for which every runtime has kernels. transformers before 4.50
    # cannot switch; there the exporter writes out the fused operator.
    if hasattr(model.module.stock, "set_attn_implementation"):
        model.module.stock.set_attn_implementation("eager")
    model.module.eval()
    return model


def input_names(model: LoadedModel) -> list[str]:
    """Inputs of the graph, in order."""
    has_types = "token_type_ids" in model.module.accepted and model.tokenizer.gives_types
    return ["input_ids", "attention_mask", *(["token_type_ids"] if has_types else [])]


def example(model: LoadedModel, batch: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Random inputs `[batch, seq_len]`. Every row except the first ends in padding."""
    import torch

    generator = torch.Generator().manual_seed(batch * 1000 + seq_len)
    seq_len = min(seq_len, model.position_limit)
    lengths = torch.tensor([seq_len, *(max(1, seq_len - 3 * row) for row in range(1, batch))])
    mask = (torch.arange(seq_len) < lengths[:, None]).long()
    pad = model.pad_id
    ids = torch.randint(0, model.config["vocab_size"], (batch, seq_len), generator=generator)
    ids[ids == pad] = pad + 1
    inputs = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if "token_type_ids" in input_names(model):
        inputs["token_type_ids"] = (torch.arange(seq_len) >= seq_len // 2).long().expand(batch, -1) * mask
    return inputs


def write_onnx(model: LoadedModel, path: Path) -> str:
    """Exports the module into `path`, with dynamic batch and length.

    Returns:
        What exported it: torch's exporter, which needs the package onnxscript, or the older tracer.
    """
    import torch

    names = input_names(model)

    class Positional(torch.nn.Module):
        """Accepts the inputs by position, as both exporters pass them."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model.module

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            return self.inner(**dict(zip(names, values, strict=True)))

    # The wrapper must be in evaluation mode too: the tracer restores the mode it finds, including dropout.
    module, inputs = Positional().eval(), tuple(example(model, 2, 16).values())
    with warnings.catch_warnings(), _without_remarks(), torch.no_grad():
        warnings.simplefilter("ignore")  # remarks on constants; `worst_difference` checks the result
        if find_spec("onnxscript") is None:
            axes = {name: {0: "batch", 1: "seq_len"} for name in names} | {"logits": {0: "batch"}}
            torch.onnx.export(
                module, inputs, str(path), input_names=names, output_names=["logits"], dynamic_axes=axes,
                opset_version=_TRACED_OPSET, dynamo=False,
            )  # fmt: skip
            return "torch's tracer, because onnxscript is not installed"
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq_len", max=model.position_limit)}
        program = torch.onnx.export(
            module, inputs, input_names=names, output_names=["logits"], dynamic_shapes=(tuple(sizes for _ in names),),
            opset_version=_OPSET, dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
        program.save(str(path))
    return "torch's exporter"


@contextmanager
def _without_remarks() -> Iterator[None]:
    """torch's exporter logs what it does not find, torchvision among it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def metadata(model: LoadedModel) -> dict[str, str]:
    """What a program needs beside the graph: labels in the order of the logits, and the limits of the tokenizer."""
    config, description = model.config, model.description
    longest = model.row_limit(int(description.get("max_seq_length") or model.position_limit))
    values = {
        "labels": list(config["id2label"].values()) if isinstance(config["id2label"], dict) else config["id2label"],
        "problem_type": config["problem_type"],
        "inputs": input_names(model),
        "max_seq_length": longest,
        "max_positions": model.position_limit,
        "pad_token_id": model.pad_id,
        "padding_side": "left" if model.tokenizer.pads_left else "right",
    }
    if calibration := description.get("calibration"):
        values["calibration"] = calibration
    return {
        f"bert_glue.{name}": value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }


def add_metadata(path: Path, values: dict[str, str]) -> None:
    """Write texts into the metadata of a graph; the OM model that atc makes of it does not keep them."""
    import onnx

    graph = onnx.load(str(path))
    onnx.helper.set_model_props(graph, values)
    onnx.save(graph, str(path))


def worst_difference(model: LoadedModel, path: Path) -> float:
    """Largest difference of onnxruntime's logits from torch's over several batch sizes and lengths."""
    import numpy as np
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, seq_len in _SHAPES:
        inputs = example(model, batch, seq_len)
        with torch.no_grad():
            ours = model.module(**inputs).numpy()
        theirs = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
        worst = max(worst, float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf"))
    return worst


def atc_script(path: Path, names: list[str], batch: int) -> str:
    """A script with CANN's command that makes `<path>.om`, compiled for the lengths of `_LENGTHS`."""
    shapes = ";".join(f"{name}:{batch},-1" for name in names)
    # One number for each -1 above, in the order of the inputs.
    lengths = ";".join(",".join([str(length)] * len(names)) for length in _LENGTHS)
    return (
        "#!/usr/bin/env bash\n"
        f"# {path.name} -> {path.stem}.om; needs CANN (source its set_env.sh first). npu-smi info shows SOC_VERSION.\n"
        "# Rows are padded to the next of the lengths below, with attention_mask 0.\n"
        "set -euo pipefail\n"
        'cd "$(dirname "${BASH_SOURCE[0]}")"\n'
        f"atc --framework=5 --model={path.name!r} --output={path.stem!r} --input_format=ND \\\n"
        f'  --input_shape="{shapes}" \\\n'
        f'  --dynamic_dims="{lengths}" \\\n'
        '  --soc_version="${SOC_VERSION:?such as Ascend910B3}" "$@"\n'
    )


def export(
    name: str, path: Path, batch: int, variants: tuple[str, ...] = (), problem_type: str | None = None
) -> list[str]:
    """Writes the graph, its variants and the script. Returns lines for the user.

    Args:
        batch: rows per batch in the OM model.
        variants: `onnx_variants.FP16`, `INT8`.
        problem_type: `--problem_type`, for a model whose config.json has none.

    Raises:
        MachineError: the folder has no classifier, a package is missing, or the graph's logits differ from torch's.
        UsageError: the model has another problem_type.
        CheckpointError: a file cannot be written.
    """
    from bert_glue import onnx_variants
    from bert_glue.storage.files import plain_errors

    for package in ("onnx", *(["onnxruntime"] if variants else [])):
        if find_spec(package) is None:
            raise MachineError(
                f"--onnx: the package {package} is not installed (pip install onnx onnxruntime onnxscript)"
            )
    model = load(name, problem_type)
    with plain_errors(path):
        # The file is created first, because torch gives no reason if it cannot write.
        with written_aside(path) as aside:
            how = write_onnx(model, aside)
            checked = "not checked, because onnxruntime is not installed"
            if find_spec("onnxruntime"):
                worst = worst_difference(model, aside)
                if not worst <= _TOLERANCE:
                    raise MachineError(f"{path} was not kept: its logits differ from torch's by {worst:g}")
                checked = f"in onnxruntime, logits equal torch's to {worst:.1e} for {len(_SHAPES)} shapes"
            add_metadata(aside, metadata(model))
        for kind in variants:
            with written_aside(onnx_variants.variant_path(path, kind)) as aside:
                onnx_variants.write_variant(path, aside, kind)
        script = path.with_suffix(".atc.sh")
        write_whole(script, atc_script(path, input_names(model), batch))
    lines = [f"wrote {path} ({how}; {checked})"]
    lines += [f"wrote {onnx_variants.variant_path(path, kind)}" for kind in variants]
    lines.append(f"wrote {script} (atc's command for an OM model; not run here)")
    lines += [f"note: {note}" for note in model.notes]
    if find_spec("onnxruntime"):
        lines += _on_own_rows(name, model, path, variants)
    if model.config["problem_type"] == MULTI_LABEL:
        lines.append("several labels a row: the sigmoid of each logit is the probability of its class")
    if model.description.get("calibration"):
        lines.append(
            "note: the graph gives logits without the calibration of --calibrate; its metadata has temperature and "
            "threshold under bert_glue.calibration"
        )
    return lines


def _on_own_rows(name: str, model: LoadedModel, path: Path, variants: tuple[str, ...]) -> list[str]:
    """The table of `onnx_variants.compare`, or the reason why there is none."""
    import torch

    from bert_glue import onnx_variants

    try:
        task, split = onnx_variants.own_rows(Path(name), model, _ROWS)
    except UserError as error:
        return [onnx_variants.why_no_rows(error)]
    graphs = {"onnx": path} | {kind: onnx_variants.variant_path(path, kind) for kind in variants}
    found = onnx_variants.compare(model, input_names(model), graphs, task, split)
    return onnx_variants.table(found, task, len(split), torch.get_num_threads())


def main(argv: list[str]) -> int:
    """Exit code: 0, 2 usage, 4 no classifier or a graph that differs, 6 not written."""
    parser = CommandParser(
        same={"model_name_or_path": "RUN", "output_dir": "onnx", "per_device_eval_batch_size": "batch",
              "per_device_train_batch_size": "batch"},
        prog="python -m bert_glue.export",
        description=(__doc__ or "").split("\n")[0],
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="output folder of a run, a checkpoint, or a hub name")
    parser.add_argument("--onnx", nargs="?", const="", metavar="FILE", help="default: model.onnx in RUN")
    parser.add_argument("--batch", type=int, default=1, help="rows per batch in the OM model; default: 1")
    parser.add_argument("--fp16", action="store_true", help="also write model.fp16.onnx: weights and products in fp16")
    parser.add_argument(
        "--int8", action="store_true", help="also write model.int8.onnx: products quantised dynamically"
    )
    parser.add_problem_type()
    args = parser.parse_args(argv)
    if args.onnx is None:
        parser.error("nothing to do: give --onnx")
    if args.batch < 1:
        parser.error(f"--batch {args.batch} is not in [1, inf)")
    path = Path(args.onnx or Path(args.run) / "model.onnx")
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):  # bytes that the locale cannot decode
        parser.error(f"--onnx {printable(str(path))}: torch takes names in UTF-8 alone; give another FILE")

    def write() -> int:
        refuse_unusable()
        from bert_glue import onnx_variants

        variants = [kind for kind in (onnx_variants.FP16, onnx_variants.INT8) if getattr(args, kind)]
        print_lines(*export(args.run, path, args.batch, tuple(variants), args.problem_type))
        return 0

    return exit_code_of(write)


if __name__ == "__main__":
    run_program(main)
