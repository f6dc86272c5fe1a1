"""All that a run needs to continue bit for bit: into a checkpoint and back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from bert_glue import checkpoint
from bert_glue.errors import CheckpointError
from bert_glue.training import Progress, Run


def whole_weights(run: Run) -> dict[str, torch.Tensor]:
    """The model under transformers' names, fp32 masters where there are some, the table whole."""
    precision = run.precision
    if precision.plan.level == "O2":
        masters = {}
        for group, master in zip(precision.groups, precision.masters, strict=True):
            masters |= group.views(master)
        low = {name: p.data for name, p in run.model.module.named_parameters()}
        for name, p in run.model.module.named_parameters():
            p.data = masters.get(name, p.data)
        tensors = run.model.tensors()
        for name, p in run.model.module.named_parameters():
            p.data = low[name]
    else:
        tensors = run.model.tensors()
    if run.narrowed is not None:
        table = next(name for name in tensors if name.endswith("word_embeddings.weight"))
        tensors[table] = run.narrowed.widen(tensors[table])
    return tensors


def save_checkpoint(run: Run) -> None:
    """Write `checkpoint-<step>` and delete what `save_total_limit` no longer keeps.

    Raises:
        CheckpointError: it could not be written; earlier ones are untouched.
    """
    from safetensors.torch import save_file

    randoms = run.ranks.gather(checkpoint.random_tensors(run.ranks.device))
    if not run.ranks.is_first:
        run.ranks.wait()
        return
    weights, state = whole_weights(run), _optimizer_tensors(run)

    def write(folder: Path) -> None:
        run.model.save(folder, weights)
        save_file(state, folder / "optimizer.safetensors")
        for rank, tensors in enumerate(randoms):
            save_file(tensors, folder / f"random-{rank}.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps(_state(run)), encoding="utf-8")

    size = sum(t.numel() * t.element_size() for t in (*weights.values(), *state.values()))
    folder = run.output_dir / f"checkpoint-{run.progress.step}"
    checkpoint.publish(folder, write, size + (1 << 20))
    best = f"checkpoint-{run.progress.best_step}"
    checkpoint.keep_newest(run.output_dir, run.args.save_total_limit, best)
    run.ranks.wait()


def _state(run: Run) -> dict:
    """trainer_state.json: progress, loss scale, and what must not differ on resume."""
    return {
        **asdict(run.progress),
        "loss_scale": run.precision.scale_state(),
        "narrowed_decay": run.narrowed.decay if run.narrowed else 1.0,
        "world_size": run.ranks.world_size,
        "same": _must_be_same(run),
    }


def _must_be_same(run: Run) -> dict[str, object]:
    """What a resumed run shares with the first one, by the name a user knows it by."""
    words = run.narrowed.rows.numpy().tobytes() if run.narrowed else b""
    shapes = {name: list(shape) for g in run.precision.groups for name, shape in zip(g.names, g.shapes, strict=True)}
    if run.narrowed:
        shapes.pop("words.weight")
    return {
        "model": shapes,
        "optimizer": type(run.optimizer).__name__,
        "training rows": run.order.rows,
        "batch size of all ranks": run.order.micro_batch,
        "--gradient_accumulation_steps": run.order.accumulation,
        "--seed": run.args.seed,
        "seed of the order": run.order.seed,
        "--dataloader_drop_last": run.order.drop_last,
        "grouping by length": run.order.lengths is not None,
        "data (words in use; --do_eval, --do_predict and --max_*_samples count)": hashlib.sha256(words).hexdigest(),
    }


def _optimizer_tensors(run: Run) -> dict[str, torch.Tensor]:
    """Flat buffers and the optimizer's tensors, on the host."""
    tensors = {f"parameters.{n}": m.detach().cpu().clone() for n, m in enumerate(run.precision.masters)}
    for number, state in run.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            value = value if torch.is_tensor(value) else torch.tensor(value)
            tensors[f"state.{number}.{name}"] = value.detach().cpu().contiguous().clone()
    return tensors


def resume(run: Run, folder: Path) -> None:
    """Continue from a checkpoint, bit for bit.

    Raises:
        CheckpointError: it does not verify, or belongs to other data, model or batch sizes.
    """
    from safetensors.torch import load_file

    reason = checkpoint.verify(folder)
    if reason:
        raise CheckpointError(f"--resume_from_checkpoint {folder}: {reason}")
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    other = [_difference(key, state["same"].get(key), now) for key, now in _must_be_same(run).items()]
    if any(other):
        differences = "; ".join(filter(None, other))
        raise CheckpointError(f"--resume_from_checkpoint {folder}: it was made with another {differences}")
    tensors = load_file(folder / "optimizer.safetensors")
    _load_optimizer(run, tensors)
    run.precision.load_scale_state(state["loss_scale"])
    if run.narrowed:
        run.narrowed.decay = state["narrowed_decay"]
    run.progress = Progress(**{name: state[name] for name in asdict(Progress())})
    randoms = folder / f"random-{run.ranks.rank}.safetensors"
    if randoms.is_file():
        checkpoint.set_random_tensors(load_file(randoms), run.ranks.device)


def _difference(key: str, then: object, now: object) -> str:
    """`key` with both values if they are short; "" where they are equal."""
    if then == now:
        return ""
    return f"{key} ({then}, now {now})" if len(f"{then}{now}") < 60 else key


@torch.no_grad()
def _load_optimizer(run: Run, tensors: dict[str, torch.Tensor]) -> None:
    for number, (master, group) in enumerate(zip(run.precision.masters, run.precision.groups, strict=True)):
        master.copy_(tensors[f"parameters.{number}"])
        if run.precision.plan.level == "O2":
            group.data.copy_(master)
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        kind, number, *rest = name.split(".", 2)
        if kind == "state":
            states.setdefault(int(number), {})[rest[0]] = value
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": states})
