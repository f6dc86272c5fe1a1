"""Whole packed models of this device, at each precision, against transformers' padded ones in float64."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F

from benchmarks.common import StageRows
from benchmarks.gpu_stages.attention import DTYPES, LENGTHS, relative_error
from bert_glue.data.packing import PackedLayout
from bert_glue.devices.device import Device, resolve_device
from bert_glue.model.attention import PATHS_TAKEN

PRECISIONS = (("O0", "fp32"), ("O1", "bf16"), ("O2", "bf16"), ("O2", "fp16"), ("O3", "bf16"))
FAMILIES = ("bert", "roberta", "albert", "modernbert")
_LIMITS = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 1e-2}  # as in attention.py


def _stock(model_type: str, layers: int) -> torch.nn.Module:
    """transformers' classifier in float64, of width 256, with weights that move the logits."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": layers}
    ids = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 1}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    own = {"modernbert": {"local_attention": 32}, "albert": {"embedding_size": 128, **drops}}.get(model_type, drops)
    config = AutoConfig.for_model(
        model_type, num_labels=3, vocab_size=200, max_position_embeddings=514, type_vocab_size=2,
        initializer_range=0.05, **sizes, **ids, **own,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval().double()


def _batch(tail: int) -> tuple[dict, dict]:
    """The same rows packed, with `tail` tokens of filler, and padded as transformers wants them."""
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 200, (n,), generator=draw) for n in LENGTHS]
    types = [(torch.arange(n) >= (n + 1) // 2).long() for n in LENGTHS]
    layout, filler = PackedLayout(LENGTHS, tail), torch.ones(tail).long()
    packed = {
        "input_ids": torch.cat([*rows, filler])[None], "token_type_ids": torch.cat([*types, 0 * filler])[None],
        "position_ids": torch.from_numpy(layout.positions)[None], "layout": layout,
    }  # fmt: skip
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(n).long() for n in LENGTHS], batch_first=True)
    padded = {"input_ids": pad(rows, batch_first=True, padding_value=1), "attention_mask": mask}
    return packed, {**padded, "token_type_ids": pad(types, batch_first=True)}


def check_models(rows: StageRows) -> None:
    """Logits and gradients of packed models at each precision against transformers' padded ones in float64."""
    device = resolve_device("auto")
    labels = torch.arange(len(LENGTHS)) % 3
    packed, padded = _batch(tail=11)
    for model_type in FAMILIES[:1] if rows.is_tiny else FAMILIES:
        stock = _stock(model_type, 1 if rows.is_tiny else 4)
        accepted = inspect.signature(stock.forward).parameters
        logits = stock(**{name: x for name, x in padded.items() if name in accepted}).logits
        F.cross_entropy(logits, labels).backward()
        gradients = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
        for level, precision in PRECISIONS:
            known = {"family": model_type, "level": level, "precision": precision}
            if device.supports(DTYPES[precision]) and rows.has_time(8, "packed against padded", **known):
                with rows.row("packed against padded", **known) as found:
                    PATHS_TAKEN.clear()
                    found |= model_errors(stock, packed, labels, logits, gradients, (level, precision), device)
                    found["path"] = sorted(PATHS_TAKEN)
                    found["ok"] = max(found["logits"], found["gradients"]) < _LIMITS[precision]


def model_errors(stock, packed, labels, logits, gradients, how: tuple[str, str], device: Device) -> dict[str, object]:
    """Errors of the packed model with the weights of `stock`, at one level and precision."""
    from bert_glue.model.encoder import PackedClassifier
    from bert_glue.model.families import FAMILIES as DESCRIBED
    from bert_glue.model.weights import load_packed, packed_tensors
    from bert_glue.precision.native import NativePrecision
    from bert_glue.precision.plan import PrecisionPlan

    (level, precision), place = how, device.torch_device
    config, weights = stock.config.to_dict(), {name: x.float() for name, x in stock.state_dict().items()}
    family = DESCRIBED[config["model_type"]]
    module = PackedClassifier(family.shape(config, 3))
    load_packed(module, family, weights, resize_head=False)
    scale = 1024.0 if precision == "fp16" else 1.0
    state = NativePrecision(PrecisionPlan(level, DTYPES[precision], scale), module.to(place).train())
    inputs = {name: x.to(place) if torch.is_tensor(x) else x for name, x in packed.items()}
    state.zero_gradients()
    with state.autocast():
        ours = module(**inputs, dropout_masks=None).float()
    state.backward(F.cross_entropy(ours, labels.to(place)))
    values = {}
    for group in state.groups:
        values |= {name: grad.float() / scale for name, grad in group.views(group.grad).items()}
    theirs = packed_tensors(module, family, values)
    flat = [torch.cat([of[name].double().flatten().cpu() for name in gradients]) for of in (theirs, gradients)]
    errors = {name: relative_error(theirs[name], x) for name, x in gradients.items() if x.norm() > 1e-6}
    worst = max(errors, key=errors.get)
    return {
        "logits": relative_error(ours, logits), "gradients": relative_error(*flat),
        "worst_gradient": [worst, errors[worst]],
    }  # fmt: skip
