"""All that a run needs to continue bit for bit: into a checkpoint and back."""

from __future__ import annotations

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
    if checkpoint.verify(folder) != "":
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
        "layout": [[g.names, g.is_decayed, g.data.numel()] for g in run.precision.groups],
        "order": [run.order.rows, run.order.micro_batch, run.order.accumulation, run.order.seed],
        "world_size": run.ranks.world_size,
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
    now = json.loads(json.dumps(_state(run)))
    for key, meaning in (("layout", "model"), ("order", "data, batch size, accumulation or seed")):
        if state[key] != now[key]:
            raise CheckpointError(f"--resume_from_checkpoint {folder}: it was made with another {meaning}")
    tensors = load_file(folder / "optimizer.safetensors")
    _load_optimizer(run, tensors)
    run.precision.load_scale_state(state["loss_scale"])
    if run.narrowed:
        run.narrowed.decay = state["narrowed_decay"]
    run.progress = Progress(**{name: state[name] for name in asdict(Progress())})
    randoms = folder / f"random-{run.ranks.rank}.safetensors"
    if randoms.is_file():
        checkpoint.set_random_tensors(load_file(randoms), run.ranks.device)


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
