"""`--hub modelscope`: fetches models and data sets from ModelScope with its own package, and never from the other hub.

Its cache (MODELSCOPE_CACHE), its address (MODELSCOPE_DOMAIN) and its token (MODELSCOPE_API_TOKEN or --token) are the
package's own. HF_HUB_OFFLINE=1 means offline here too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bert_glue.config.arguments import without_secrets
from bert_glue.errors import MachineError, UserError, first_line
from bert_glue.hub.client import MODEL_FILES, PICKLED_WEIGHTS, has_safetensors, start_probe

_WAYS_OUT = "give a local folder, set MODELSCOPE_CACHE to a cache filled elsewhere, or leave out --hub"


def _package() -> tuple[Callable[..., str], Callable[[], str]]:
    if find_spec("modelscope") is None:
        raise MachineError("--hub modelscope: the package modelscope is not installed (pip install modelscope)")
    try:
        from modelscope.hub.snapshot_download import snapshot_download
        from modelscope.hub.utils.utils import get_endpoint
    except Exception as error:
        raise MachineError(f"--hub modelscope: modelscope cannot be imported ({error})") from error
    return snapshot_download, get_endpoint


def fetch(name: str, kind: str, patterns: list[str], args: Any, error_type: type[UserError]) -> Path:
    """The repository's files that match `patterns`, downloaded or cached.

    Raises:
        MachineError: the package is not installed.
        error_type: the files are neither on the hub nor in its cache.
    """
    download, endpoint_of = _package()
    endpoint = endpoint_of()
    probe = start_probe(endpoint)
    reason = probe.wait() if probe else "HF_HUB_OFFLINE is set"
    revision = None if args.model_revision == "main" or kind != "model" else args.model_revision
    try:
        folder = download(
            name, revision=revision, cache_dir=args.cache_dir, repo_type=kind, allow_patterns=patterns,
            token=args.token, local_files_only=reason is not None,
        )  # fmt: skip
    except Exception as error:  # the package raises two dozen types of exceptions
        why = f"ModelScope {endpoint} failed: {without_secrets(first_line(error), args)}"
        if reason is not None:
            why = f"ModelScope {endpoint} is not used ({reason}) and its cache has no copy"
        raise error_type(f"--hub modelscope: {kind} {name}: {why}; {_WAYS_OUT}") from error
    return Path(folder)


def fetch_model(name: str, args: Any) -> Path:
    """The folder of a model's files.

    Args:
        args: `model_revision`, `cache_dir`, `token` and `trust_remote_code` are read.

    Raises:
        MachineError: the package is not installed, or the model cannot be fetched.
    """
    code = ["*.py"] if args.trust_remote_code else []
    folder = fetch(name, "model", MODEL_FILES + code, args, MachineError)
    return folder if has_safetensors(folder) else fetch(name, "model", PICKLED_WEIGHTS, args, MachineError)
