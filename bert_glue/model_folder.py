"""From `--model_name_or_path` to a local folder, and its config.json."""

from __future__ import annotations

from pathlib import Path

from bert_glue import hub_files
from bert_glue.arguments import Arguments
from bert_glue.errors import MachineError, first_line
from bert_glue.model_bounds import check_config
from bert_glue.weights import check_not_lfs_pointer
from bert_glue.whole_file import json_object


def model_folder(name: str, args: Arguments) -> Path:
    """A local folder as it is, or the hub's files of a model name, downloaded or cached.

    Raises:
        MachineError: neither a folder nor to be had from the hub; the message says what to do.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MachineError(f"--model_name_or_path {name}: no such folder")
    if args.hub == "modelscope":
        from bert_glue import modelscope_hub

        return modelscope_hub.fetch_model(name, args)
    from bert_glue.hub_data import start_probe

    # The hub's client waits for minutes on a server that accepts and never answers.
    probe = start_probe()
    unreachable = probe.wait() if probe else "HF_HUB_OFFLINE is set"
    try:
        return hub_files.fetch_model(name, args, is_offline=unreachable is not None)
    except Exception as error:  # the hub client raises a dozen kinds; each means "not to be had"
        why = unreachable or first_line(error)
        if isinstance(error, hub_files.DamagedFileError):
            why = str(error)
        raise MachineError(
            f"--model_name_or_path {name}: neither a local folder nor to be had from the hub ({why}); "
            "put config.json, the tokenizer's files and model.safetensors into a folder and give its path, "
            "or set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 with a warm cache"
        ) from error


def read_config(folder: Path) -> dict:
    """config.json of a model folder.

    Raises:
        MachineError: missing, a Git-LFS pointer, not JSON, or without a model_type and not BERT's.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise MachineError(
            f"{folder} holds adapters alone; give the folder of the merged model, one above if it is ours"
        )
    if not path.is_file():
        raise MachineError(f"{folder} has no config.json")
    check_not_lfs_pointer(path)
    try:
        config = json_object(path)
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read: {error}") from error
    check_config(config, path)
    if not config.get("model_type"):
        if not _is_bert_shaped(config):
            raise MachineError(f'{path} has no model_type; add it, for example "model_type": "bert"')
        config["model_type"] = "bert"
    return config


def guessed_type(folder: Path) -> list[str]:
    """A line for the log where `read_config` took a config.json without model_type for BERT's."""
    stored = json_object(folder / "config.json")
    named = "config.json has no model_type; its keys are BERT's, so the model is read as BERT"
    return [] if stored.get("model_type") else [named]


# The sizes in Google's bert_config.json, and keys by which relatives with the same sizes are told.
_BERT_KEYS = {
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "type_vocab_size", "vocab_size",
}  # fmt: skip
_RELATIVES_KEYS = {
    "bos_token_id", "embedding_size", "eos_token_id", "max_2d_position_embeddings", "max_relative_position",
    "relative_attention", "task_type_vocab_size",
}  # fmt: skip


def _is_bert_shaped(config: dict) -> bool:
    """True for a config of BERT alone: its derivatives have the same keys, and name their class or have more keys."""
    architectures = config.get("architectures") or ["Bert"]
    return (
        config.keys() >= _BERT_KEYS
        and config["type_vocab_size"] > 1
        and not config.keys() & _RELATIVES_KEYS
        and all(str(name).startswith("Bert") for name in architectures)
    )
