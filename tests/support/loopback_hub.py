"""A hub of one data set and some models on 127.0.0.1: what `datasets` and `huggingface_hub` ask for, and no more.

Serves generated parquet files with the official columns and ClassLabel features of `nyu-mll/glue`, so
that the hub path is tested with the real client libraries and without a network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import yaml

# config -> (text columns, label names in the hub's order or None for scores, split -> labels)
CONFIGS = {
    "mrpc": (
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        {"train": [1, 0, 1, 1], "validation": [0, 1], "test": [-1, -1, -1]},
    ),
    "stsb": (
        ("sentence1", "sentence2"),
        None,
        {"train": [5.0, 0.0, 2.5], "validation": [3.75], "test": [-1.0, -1.0]},
    ),
    # Not the order of the task table: a loader that trusts numbers instead of names is caught.
    "mnli": (
        ("premise", "hypothesis"),
        ("contradiction", "entailment", "neutral"),
        {
            "train": [0, 1, 2],
            "validation_matched": [1, 1],
            "validation_mismatched": [2, 0],
            "test_matched": [-1],
            "test_mismatched": [-1, -1],
        },
    ),
    "ax": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), {"test": [-1, -1]}),
    # broken on purpose: an unlabelled row in a labelled split
    "rte": (
        ("sentence1", "sentence2"),
        ("entailment", "not_entailment"),
        {"train": [0, 1, -1], "validation": [1], "test": [-1]},
    ),
}


def make_repository(folder: Path, configs: dict = CONFIGS) -> None:
    """Writes README.md and <config>/<split>-00000-of-00001.parquet."""
    cards, infos = [], []
    for config, (columns, names, splits) in configs.items():
        label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
        features = datasets.Features(
            {
                **dict.fromkeys(columns, datasets.Value("string")),
                "label": label,
                "idx": datasets.Value("int32"),
            }
        )
        (folder / config).mkdir(parents=True)
        sizes = []
        for split, labels in splits.items():
            rows = {column: [f"{config} {split} {column} {row}" for row in range(len(labels))] for column in columns}
            rows |= {"label": labels, "idx": list(range(len(labels)))}
            data = datasets.Dataset.from_dict(rows, features=features)
            data.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
            sizes.append({"name": split, "num_bytes": 1, "num_examples": len(labels)})
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        cards.append({"config_name": config, "data_files": files})
        infos.append({"config_name": config, "features": features._to_yaml_list(), "splits": sizes})
    head = yaml.safe_dump({"dataset_info": infos, "configs": cards})
    (folder / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")


class _Handler(BaseHTTPRequestHandler):
    """Answers from the repository folder in `server`; every other address is 404."""

    def log_message(self, *_: object) -> None:
        self.server.asked.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:  # noqa: N802 (name given by http.server)
        path = unquote(urlsplit(self.path).path).strip("/")
        base, commit = self.server.name, self.server.commit
        model = next((m for m in self.server.models if f"{path}/".startswith((f"{m}/", f"api/models/{m}/"))), None)
        self.root = self.server.models.get(model, self.server.root)
        if model:
            self._model(model, path)
        elif path.startswith(f"datasets/{base}/resolve/"):
            self._file(path.removeprefix(f"datasets/{base}/resolve/"))
        elif path in (f"api/datasets/{base}", f"api/datasets/{base}/revision/{commit}"):
            # datasets 3.0 looks through the list of files
            files = [file.relative_to(self.root).as_posix() for file in sorted(self.root.rglob("*")) if file.is_file()]
            known = {"id": base, "sha": commit, "private": False, "tags": [], "downloads": 0}
            self._json({**known, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"api/datasets/{base}/tree/{commit}"):
            self._tree(path.removeprefix(f"api/datasets/{base}/tree/{commit}").strip("/"))
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _model(self, name: str, path: str) -> None:
        place = f"api/models/{name}"
        if path.startswith(f"{name}/resolve/"):
            self._file(path.removeprefix(f"{name}/resolve/"))
        elif path.startswith(f"{place}/tree/"):
            self._tree("")
        elif path in (place, f"{place}/revision/main", f"{place}/revision/{self.server.commit}"):
            files = [{"rfilename": file.name} for file in sorted(self.root.iterdir())]
            known = {"id": name, "modelId": name, "sha": self.server.commit, "private": False, "tags": []}
            self._json({**known, "siblings": files})
        else:
            self._missing("RepoNotFound")

    def do_POST(self) -> None:  # noqa: N802
        asked, self.root = self._body(), self.server.root
        path = urlsplit(self.path).path
        if path in self.server.fails:
            self._send(self.server.fails[path], b'{"error": "the service says no"}', "application/json")
        elif self._is_upload(path):
            self._upload(path, asked)
        elif urlsplit(self.path).path.endswith(f"/paths-info/{self.server.commit}"):
            paths = _asked_paths(asked)
            found = [self.root / path for path in paths if (self.root / path).exists()]
            self._json([self._entry(path) for path in found])
        else:
            self._missing("RepoNotFound")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _is_upload(self, path: str) -> bool:
        return path in ("/api/repos/create", "/api/validate-yaml") or path.endswith(("/preupload/main", "/commit/main"))

    def _upload(self, path: str, asked: bytes) -> None:
        """What `create_repo` and `create_commit` ask for; files come whole, in the commit."""
        self.server.tokens.append(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            name = json.loads(asked)["name"]
            self.server.created.append(json.loads(asked))
            self._json({"url": f"{self.server.url}/someone/{name}", "name": f"someone/{name}"})
        elif path == "/api/validate-yaml":
            yaml.safe_load(json.loads(asked)["content"].split("---")[1])
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(asked)["files"]]
            self._json({"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        else:
            lines = [json.loads(line) for line in asked.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.server.sent |= {file["path"]: base64.b64decode(file["content"]) for file in added}
            place = path.removeprefix("/api/models/").removesuffix("/commit/main")
            self._json({"commitUrl": f"{self.server.url}/{place}/commit/1", "commitOid": "1", "success": True})

    def _file(self, rest: str) -> None:
        revision, _, name = rest.partition("/")
        file = self.root / name
        if revision not in (self.server.commit, "main"):
            self._missing("RevisionNotFound")
        elif not file.is_file():
            self._missing("EntryNotFound")
        else:
            self._send(200, file.read_bytes(), "application/octet-stream")

    def _tree(self, folder: str) -> None:
        root = self.root / folder
        if root.is_dir():
            self._json([self._entry(path) for path in sorted(root.iterdir())])
        else:
            self._missing("EntryNotFound")

    def _entry(self, path: Path) -> dict:
        name = path.relative_to(self.root).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "oid": _etag(path.read_bytes()), "size": path.stat().st_size}

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _missing(self, code: str) -> None:
        self._send(404, b"", "text/plain", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "ETag": f'"{_etag(body)}"'}
        for name, value in {**headers, "X-Repo-Commit": self.server.commit, **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _asked_paths(body: bytes) -> list[str]:
    if body.startswith(b"{"):
        return json.loads(body)["paths"]
    return parse_qs(body.decode())["paths"]  # huggingface_hub 0.26 sends a form


@contextmanager
def serve(root: Path, name: str, commit: str, models: dict[str, Path] | None = None) -> Iterator[ThreadingHTTPServer]:
    """Serves `root` as the data set `name`; the server's `url` is for HF_ENDPOINT, and `asked` is the log of requests.

    Models: names and their folders, each file as of `commit`.
    Uploads: `created` repositories, `sent` files, `tokens`; `fails` maps a path to the status of its refusal.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.name, server.commit, server.asked = root, name, commit, []
    server.models = models or {}
    server.tokens, server.created, server.sent, server.fails = [], [], {}, {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
