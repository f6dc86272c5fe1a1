"""apex.amp: initialize, scale_loss, master_params, state_dict, load_state_dict."""

from __future__ import annotations

import types
from contextlib import contextmanager

import torch
import torch.nn.functional as F

CALLS: list[dict] = []  # arguments of each initialize
_scaler = None
_patched: dict = {}


class _Scaler:
    def __init__(self, loss_scale, first: float, window: int, least, most: float):
        self.dynamic = loss_scale == "dynamic"
        self.scale = first if self.dynamic else float(loss_scale)
        self.window, self.least, self.most, self.unskipped = window, least, most, 0

    def update(self, overflowed: bool) -> bool:
        if overflowed and self.dynamic:
            self.scale = max(self.least or 0.0, self.scale / 2)
            self.unskipped = 0
            return True
        self.unskipped += 1
        if self.dynamic and self.unskipped == self.window:
            self.scale, self.unskipped = min(self.most, self.scale * 2), 0
        return False


def initialize(
    models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None, patch_torch_functions=None,
    keep_batchnorm_fp32=None, master_weights=None, loss_scale=None, cast_model_outputs=None, num_losses=1,
    verbosity=1, dynamic_init_scale=2.0**16, scale_growth_factor=2.0, scale_backoff_factor=0.5, scale_window=2000,
    min_loss_scale=None, max_loss_scale=2.0**24, combine_grad=None, combine_ddp=None, ddp_replica_count=4,
    user_cast_preferred=None, check_combined_tensors=None,
):  # fmt: skip
    global _scaler
    given = {name: value for name, value in locals().items() if name not in ("models", "optimizers")}
    CALLS.append(given)
    undo()
    is_fused = getattr(optimizers, "is_npu_fused_optimizer", False)
    if is_fused and opt_level not in ("O1", "O2"):
        raise RuntimeError("npu fused optimizer can only be used when opt_level='O1' or opt_level='O2'")
    if any(p.dtype != torch.float32 for p in models.parameters()):
        raise RuntimeError("the incoming model must be fp32")
    if loss_scale is None:
        loss_scale = {"O0": 1.0, "O1": "dynamic", "O2": "dynamic", "O3": 1.0}[opt_level]
    _scaler = _Scaler(loss_scale, dynamic_init_scale, scale_window, min_loss_scale, max_loss_scale)
    if opt_level in ("O2", "O3"):
        models.half()
        _cast_forward(models)
    if opt_level == "O1":
        _patch_functions()
    if optimizers is None:
        return models
    _process(optimizers, opt_level == "O2", bool(combine_grad or is_fused))
    return models, optimizers


def _cast_forward(model) -> None:
    forward = model.forward

    def cast(*args, **kwargs):
        lower = lambda value: value.half() if torch.is_tensor(value) and value.is_floating_point() else value  # noqa: E731
        return forward(*map(lower, args), **{name: lower(value) for name, value in kwargs.items()}).float()

    model.forward = cast


def _patch_functions() -> None:
    """O1: torch's own functions cast what they are given, whoever calls them."""

    def casting(name: str, dtype: torch.dtype):
        original = _patched.setdefault(name, getattr(F, name))

        def call(*args, **kwargs):
            to = lambda v: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v  # noqa: E731
            return original(*map(to, args), **{key: to(value) for key, value in kwargs.items()})

        setattr(F, name, call)

    casting("linear", torch.float16)
    casting("layer_norm", torch.float32)


def undo() -> None:
    """Take the patches of O1 off again (tests only; real amp has none)."""
    while _patched:
        setattr(F, *_patched.popitem())


def _process(optimizer, has_masters: bool, combines: bool) -> None:
    amp = optimizer.amp = types.SimpleNamespace(
        has_masters=has_masters, combines=combines, pairs=None, stash={}, is_scaled=False, flat=[]
    )
    step, zero = optimizer.step, optimizer.zero_grad

    def new_step(self, closure=None):
        result = step()
        for p, master in amp.pairs:
            if p is not master:
                p.data.copy_(master.data)
                _clear(amp, master)
        return result

    def new_zero_grad(self):
        _start(optimizer)
        if combines:
            for flat in amp.flat:
                flat.zero_()
        elif not has_masters:
            zero()
        for p, master in amp.pairs if has_masters and not combines else ():
            if p.grad is not None:
                p.grad.zero_()
            master.grad = None

    optimizer.step = types.MethodType(new_step, optimizer)
    optimizer.zero_grad = types.MethodType(new_zero_grad, optimizer)
    optimizer.clip_optimizer_grad_norm_fused = types.MethodType(clip_optimizer_grad_norm_fused, optimizer)


def _clear(amp, p) -> None:
    if amp.combines:
        p.grad.zero_()
    else:
        p.grad = None


def _start(optimizer) -> None:
    """Masters appear at the first use, as in apex, and from the half weights."""
    amp = optimizer.amp
    if amp.pairs is not None:
        return
    amp.pairs = []
    for group in optimizer.param_groups:
        for at, p in enumerate(group["params"]):
            master = p
            if amp.has_masters and p.dtype == torch.float16:
                master = group["params"][at] = p.detach().clone().float().requires_grad_()
            amp.pairs.append((p, master))
    if amp.combines:
        for members in {0: [p for p, _ in amp.pairs], 1: [m for p, m in amp.pairs if m is not p]}.values():
            if members:
                flat = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype)
                for p, view in zip(members, flat.split([p.numel() for p in members]), strict=True):
                    p.grad = view.view_as(p)
                amp.flat.append(flat)


def clip_optimizer_grad_norm_fused(self, max_norm, norm_type=2):
    """Clip the combined gradients that the optimizer reads."""
    flat = self.amp.flat[-1]
    norm = flat.norm(norm_type)
    flat.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


@contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
    amp = optimizers.amp
    _start(optimizers)
    if not amp.has_masters and not _scaler.dynamic and _scaler.scale == 1.0:
        yield loss.float()
        return
    if not delay_unscale and not amp.is_scaled:
        for p, _ in amp.pairs:
            if not amp.has_masters:
                amp.stash[p] = None if p.grad is None else p.grad.clone()
            _clear(amp, p)
    yield loss.float() * _scaler.scale
    amp.is_scaled = delay_unscale
    if delay_unscale:
        return
    overflowed = False
    for p, master in amp.pairs:
        if p.grad is None:
            continue
        overflowed |= not bool(torch.isfinite(p.grad).all())
        new = p.grad.float() / _scaler.scale
        before = amp.stash.pop(p, None) if p is master else master.grad
        new = new.to(master.dtype) if before is None else before + new.to(master.dtype)
        if master.grad is None:
            master.grad = new
        else:
            master.grad.copy_(new)
    if _scaler.update(overflowed):
        real = optimizers.step

        def skip(closure=None):
            optimizers.step = real

        optimizers.step = skip


def master_params(optimizer):
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict(destination=None):
    return {"loss_scaler0": {"loss_scale": _scaler.scale, "unskipped": _scaler.unskipped}}


def load_state_dict(state_dict):
    _scaler.scale = state_dict["loss_scaler0"]["loss_scale"]
    _scaler.unskipped = state_dict["loss_scaler0"]["unskipped"]
