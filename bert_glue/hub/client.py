"""Fetches files from the hub with a limited number of requests, and uses them only if their hash is the hub's.

The hub's client compares sizes, not hashes. It retries forever if a server cuts each answer after the first 10 MB. It
names a cached file by its ETag: SHA-256 for large files, git's SHA-1 for the others.
"""

from __future__ import annotations

import http.client
import os
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from bert_glue.storage.files import file_hash

PROBE_SECONDS = 3.0
# Answers of a proxy that cannot reach the hub. Any other answer comes from the hub itself.
_GATEWAY_STATUS = (407, 502, 503, 504)


class _Probe(threading.Thread):
    """Requests the hub's front page. Afterwards `reason` says why it is not reachable; None if it is.

    Runs in a daemon thread, because name resolution has no time limit.
    """

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        self.endpoint = endpoint
        self.deadline = time.monotonic() + PROBE_SECONDS
        self.reason: str | None = f"no answer within {PROBE_SECONDS:g} s"

    def run(self) -> None:
        """Any answer is enough. urllib honours the proxy variables and SSL_CERT_FILE, as the hub's client does."""
        request = urllib.request.Request(self.endpoint, method="HEAD", headers={"User-Agent": "bert-glue"})
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            self.reason = None
        except urllib.error.HTTPError as error:
            self.reason = f"HTTP {error.code} {error.reason}" if error.code in _GATEWAY_STATUS else None
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.reason = str(getattr(error, "reason", error)) or type(error).__name__

    def wait(self) -> str | None:
        """The reason why the hub is not reachable, or None. Returns at the latest when the time is up."""
        self.join(max(0.0, self.deadline - time.monotonic()))
        return self.reason


def start_probe(endpoint: str | None = None) -> _Probe | None:
    """A running probe of an address, by default the hub's; None in offline mode."""
    use_ca_bundle()
    from huggingface_hub import constants

    asked = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if constants.HF_HUB_OFFLINE or asked:
        return None
    probe = _Probe(endpoint or constants.ENDPOINT)
    probe.start()
    return probe


MOST_REQUESTS = 10  # for one file in one run, including resumed requests
# A model's own files at the top of its repository. Folders hold other formats of the same model.
MODEL_FILES = ["*.json", "*.txt", "*.model", "bpe.codes", "*.safetensors"]
PICKLED_WEIGHTS = ["pytorch_model*.bin"]
IN_FOLDERS = ["*/*"]
_PAUSES = (1.0, 3.0)  # seconds before the second and the third attempt
T = TypeVar("T")


class DamagedFileError(Exception):
    """A cached file does not have the hub's hash. The message names it and the remedy."""


# urllib and httpx read the first, requests the second, curl the third.
_CA_BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def use_ca_bundle() -> None:
    """Make urllib and every version of the hub's client trust the authority that one of the variables names."""
    bundle = next(filter(None, map(os.environ.get, _CA_BUNDLES)), None)
    for name in _CA_BUNDLES if bundle else ():
        os.environ.setdefault(name, bundle)


@cache
def _default_client() -> Any:
    """The client as `huggingface_hub` creates it. Read once, because each of our clients is created from it."""
    from huggingface_hub import get_session

    return get_session()


def prepare_client() -> None:
    """Limit the requests of all later calls of `huggingface_hub`."""
    import huggingface_hub

    default = _default_client()  # before the hub asks our factory for one
    asked: Counter[str] = Counter()

    def count(request: Any) -> None:
        address = str(request.url).partition("?")[0]
        asked[address] += request.method == "GET" and "/resolve/" in address
        if asked[address] > MOST_REQUESTS:
            raise OSError(f"{address} was cut off {MOST_REQUESTS} times")

    if hasattr(huggingface_hub, "set_client_factory"):
        huggingface_hub.set_client_factory(lambda: _counting_client(default, count))
    else:  # below 1.0, on requests
        huggingface_hub.configure_http_backend(lambda: _counting_session(default, count))


def _counting_client(default: Any, count: Callable[[Any], None]) -> Any:
    """A client of httpx like the hub's own that reports each request before it is sent."""
    hooks = {**default.event_hooks, "request": [*default.event_hooks["request"], count]}
    return type(default)(event_hooks=hooks, follow_redirects=default.follow_redirects, timeout=default.timeout)


def _counting_session(default: Any, count: Callable[[Any], None]) -> Any:
    """A session of requests like the hub's own that reports each request when its answer begins."""
    session = type(default)()
    session.adapters = default.adapters
    session.hooks["response"].append(lambda response, **_: count(response.request))
    return session


def with_retries(action: Callable[[], T]) -> T:
    """The result of `action`. Retries if the server failed (HTTP 5xx), which the client does not do."""
    for pause in _PAUSES:
        try:
            return action()
        except Exception as error:
            if not _is_server_error(error):
                raise
            time.sleep(pause)
    return action()


def _is_server_error(error: BaseException | None) -> bool:
    """Whether the error, or one of its causes, is an answer of 500 to 599."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if 500 <= status < 600:
            return True
        error = error.__cause__ or error.__context__
    return False


def damaged(files: Iterable[Path]) -> list[Path]:
    """The cached files whose content does not have the hash in their name."""
    return [file for file in files if file.is_file() and not _is_sound(file.resolve())]


def _is_sound(blob: Path) -> bool:
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        return file_hash(blob) == blob.name
    if re.fullmatch("[0-9a-f]{40}", blob.name):  # git's own hash, or the plain one of a mirror
        header = f"blob {blob.stat().st_size}\0".encode()
        return blob.name in (file_hash(blob, "sha1", header), file_hash(blob, "sha1"))
    return True  # not in the cache's layout, so its hash is not known


def check(files: Iterable[Path]) -> None:
    """Raises DamagedFileError if a cached file does not have the hash that the hub gave."""
    bad = damaged(files)
    if bad:
        raise DamagedFileError(
            f"{bad[0]} does not have the hash that the hub gave; delete {bad[0].resolve()} and start again"
        )


def has_safetensors(folder: Path) -> bool:
    """Whether a fetched folder has weights that are not pickled."""
    return any(folder.glob("model*.safetensors"))


def fetch_model(name: str, args: Any, is_offline: bool) -> Path:
    """The folder of a model's files from the hub or its cache, verified. Damaged files are fetched once more.

    Pickled weights are fetched only if there are no others, and code only with --trust_remote_code.

    Args:
        args: `model_revision`, `cache_dir`, `token` and `trust_remote_code` are read.

    Raises:
        DamagedFileError: a file is still damaged.
        Exception: any error of the hub's client.
    """
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str], again: bool) -> Path:
        found = with_retries(
            lambda: snapshot_download(
                name,
                revision=args.model_revision,
                cache_dir=args.cache_dir,
                token=args.token,
                allow_patterns=patterns,
                ignore_patterns=IN_FOLDERS,
                etag_timeout=5,
                local_files_only=is_offline,
                force_download=again,
            )
        )
        return Path(found)

    prepare_client()
    folder = fetch(MODEL_FILES + (["*.py"] if args.trust_remote_code else []), again=False)
    if not has_safetensors(folder):
        folder = fetch(PICKLED_WEIGHTS, again=False)
    bad = damaged(folder.iterdir())
    if bad and not is_offline:
        fetch([path.name for path in bad], again=True)
    check(folder.iterdir())
    return folder
