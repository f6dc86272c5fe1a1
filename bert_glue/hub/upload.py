"""`--push_to_hub`: uploads the finished model and its card to the hub, once, at the end.

It uploads the model, its adapters, the card, scores and curves. It does not upload reports, predictions and run.json,
because they contain sentences of the data and paths of the machine.
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
    """Create or find the repository before hours of training. Returns its full name.

    Raises:
        MachineError: there is no token, or the hub is not reachable or refuses.
    """
    from bert_glue.hub.client import start_probe

    probe = start_probe()
    reason = probe.wait() if probe else "HF_HUB_OFFLINE is set"
    if reason is not None:
        raise MachineError(f"--push_to_hub: the hub is not reachable ({reason}); leave out the flag and upload later")
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return _client(args).create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
    except Exception as error:  # the client raises a dozen types of exceptions
        raise MachineError(
            f"--push_to_hub: the hub refuses {name}: {without_secrets(first_line(error), args)};"
            " nothing has been trained yet"
        ) from error


def push(args: Arguments, name: str) -> str:
    """Upload the folder's model. Returns the address of the commit.

    Raises:
        MachineError: the upload failed. The folder is complete, and the message says how to upload it.
    """
    message = f"{args.task_name or args.dataset_name or 'own data'}, seed {args.seed}"
    try:
        return _client(args).create_commit(name, _files(Path(args.output_dir)), commit_message=message).commit_url
    except Exception as error:
        raise MachineError(
            f"--push_to_hub: {args.output_dir} was not uploaded to {name}: {without_secrets(first_line(error), args)}; "
            f"all results are in the folder; `hf upload {name} {args.output_dir}` uploads them"
        ) from error


def _files(folder: Path) -> list[Any]:
    """The files to upload, for the client."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.utils import filter_repo_objects

    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    sent = filter_repo_objects(names, allow_patterns=_SENT)
    return [CommitOperationAdd(name, _content(folder / name)) for name in sent]


def _content(file: Path) -> Path | bytes:
    """A file, unchanged except for the base model of adapters if that is a local folder."""
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
        raise MachineError("there is no token; give --hub_token, set HF_TOKEN, or run `hf auth login`")
    disable_progress_bars()
    return HfApi(endpoint=constants.ENDPOINT, token=token)
