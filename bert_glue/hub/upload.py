"""`--push_to_hub`: the finished model and its card to the hub, once, at the end.

Sent are the model, its adapters, the card, scores and curves. Reports, predictions and run.json are not: they hold
sentences of the data and paths of the machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import Arguments, without_secrets
from bert_glue.errors import MachineError, first_line
from bert_glue.hub import client
from bert_glue.storage.files import json_object

_SENT = [
    "config.json", "bert_glue.json", "model*.safetensors*", "*token*.json", "vocab*", "merges.txt", "*.model",
    "README.md", "train_results.json", "eval_results.json", "train_loss.tsv", "curves.png", "adapter/adapter_*",
]  # fmt: skip


def claim(args: Arguments) -> str:
    """Make the repository, or find it, before hours of training; returns its full name.

    Raises:
        MachineError: no token, no way to the hub, or it refuses.
    """
    from bert_glue.hub.client import start_probe

    probe = start_probe()
    reason = probe.wait() if probe else "HF_HUB_OFFLINE is set"
    if reason is not None:
        raise MachineError(f"--push_to_hub: the hub is not reachable ({reason}); leave the flag out, and upload later")
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return _client(args).create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
    except Exception as error:  # the client raises a dozen kinds
        raise MachineError(
            f"--push_to_hub: the hub does not take {name}: {without_secrets(first_line(error), args)};"
            " nothing was trained yet"
        ) from error


def push(args: Arguments, name: str) -> str:
    """Send the folder's model; returns the address of the commit.

    Raises:
        MachineError: it was not sent; the folder is whole, and the message says how to send it.
    """
    message = f"{args.task_name or args.dataset_name or 'own data'}, seed {args.seed}"
    try:
        return _client(args).create_commit(name, _files(Path(args.output_dir)), commit_message=message).commit_url
    except Exception as error:
        raise MachineError(
            f"--push_to_hub: {args.output_dir} was not sent to {name}: {without_secrets(first_line(error), args)}; "
            f"all results are there: `hf upload {name} {args.output_dir}` sends them"
        ) from error


def _files(folder: Path) -> list[Any]:
    """What is sent, for the client."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sent = filter_repo_objects(names, allow_patterns=_SENT)
    return [CommitOperationAdd(name, _content(folder / name)) for name in sent]


def _content(file: Path) -> Path | bytes:
    """A file as it is, but for the base of adapters where that is a folder of this machine."""
    if file.name != "adapter_config.json":
        return file
    config = json_object(file)
    base = config.get("base_model_name_or_path")
    if base is None or not Path(base).exists():
        return file
    return json.dumps({**config, "base_model_name_or_path": None}, indent=2).encode()


def _client(args: Arguments) -> Any:
    client.use_ca_bundle()
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars

    token = args.hub_token or args.token or get_token()
    if token is None:
        raise MachineError("no token: give --hub_token, set HF_TOKEN, or run `hf auth login`")
    disable_progress_bars()
    return HfApi(endpoint=constants.ENDPOINT, token=token)
