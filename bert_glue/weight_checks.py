"""Checks of flags about a model: its tokenizer, which weights are trained, and where they are sent."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bert_glue.arguments import Arguments
from bert_glue.errors import Problem
from bert_glue.flag_values import shown


def tokenizer_problems(args: Arguments) -> Iterator[Problem]:
    """The choice between two tokenizers of one model, which transformers 5 no longer has."""
    if not args.use_fast_tokenizer:
        yield Problem(
            ("use_fast_tokenizer",),
            "--use_fast_tokenizer False: transformers 5 has one tokenizer for each model, and it runs whether it is "
            "written in Rust or in Python; leave the flag out",
        )


def trained_problems(args: Arguments) -> Iterator[Problem]:
    """Which weights are trained."""
    for name in ("lora_rank", "freeze_encoder"):
        if getattr(args, name) and not args.do_train:
            yield Problem((name, "do_train"), f"--{name} needs --do_train: a saved model has its adapters merged")
    if args.lora_rank is not None and args.freeze_encoder:
        yield Problem(
            ("lora_rank", "freeze_encoder"),
            "--freeze_encoder trains the head alone, --lora_rank adapters too: give one",
        )
    for name in ("lora_alpha", "lora_dropout", "lora_target_modules"):
        if args.lora_rank is None and getattr(args, name):
            yield Problem((name, "lora_rank"), f"--{name} needs --lora_rank")


_HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?"


def upload_problems(args: Arguments) -> Iterator[Problem]:
    """Of --push_to_hub and its place."""
    if args.push_to_hub and not args.do_train:
        yield Problem(("push_to_hub", "do_train"), "--push_to_hub needs --do_train: a trained model is sent")
    if args.push_to_hub and args.hub != "huggingface":
        yield Problem(("push_to_hub", "hub"), f"--push_to_hub sends to Hugging Face's hub, not to --hub {args.hub}")
    if args.hub_model_id and not re.fullmatch(_HUB_NAME, args.hub_model_id):
        yield Problem(("hub_model_id",), f"--hub_model_id {shown(args.hub_model_id)} is not NAME or OWNER/NAME")


def upload_notices(args: Arguments) -> Iterator[str]:
    """Flags of an upload that is not asked for: accepted, as Hugging Face's scripts do."""
    for name in ("hub_model_id", "hub_token", "hub_private_repo"):
        if getattr(args, name) and not args.push_to_hub:
            yield f"--{name} has no effect without --push_to_hub"
