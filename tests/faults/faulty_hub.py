"""The loopback hub with faults, for data sets and models, with or without TLS."""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import loopback_hub


class FaultyHandler(loopback_hub._Handler):
    """`server.fault` is what happens to the files whose path ends with `server.target`, `server.times` times."""

    def _file(self, rest: str) -> None:
        server = self.server
        if self.command == "GET" and rest.endswith(server.target):
            server.hits[rest] += 1
            if server.hits[rest] <= server.times:
                getattr(self, f"_{server.fault}")((server.root / rest.partition("/")[2]).read_bytes())
                return
        super()._file(rest)

    def _begin(self, length: int, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", f'"{loopback_hub._etag(body)}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()

    def _cut(self, body: bytes) -> None:
        """The connection ends in the middle, and a requested Range is ignored."""
        self._begin(len(body), body)
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def _error(self, body: bytes) -> None:
        self._send(500, b"internal error", "text/plain")

    def _truncated(self, body: bytes) -> None:
        """Half of the file, as if that were all."""
        self._begin(len(body) // 2, body)
        self.wfile.write(body[: len(body) // 2])

    def _wrong(self, body: bytes) -> None:
        """As many bytes, one of them another."""
        other = bytearray(body)
        other[len(other) // 2] ^= 1
        self._begin(len(body), body)
        self.wfile.write(other)

    def _slow(self, body: bytes) -> None:
        """In twenty pieces over two seconds."""
        self._begin(len(body), body)
        for at in range(20):
            self.wfile.write(body[len(body) * at // 20 : len(body) * (at + 1) // 20])
            self.wfile.flush()
            time.sleep(0.1)


@contextmanager
def serve(
    root: Path,
    name: str,
    commit: str,
    fault: str = "",
    target: str = "",
    times: int = 0,
    certificate: Path | None = None,
) -> Iterator[ThreadingHTTPServer]:
    """Serves `root`.

    Args:
        fault: cut, error, truncated, wrong or slow.
        target: end of the path of the files it happens to.
        times: how often it happens to each of them.
        certificate: PEM with key, for https.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), FaultyHandler)
    server.daemon_threads = True
    server.root, server.name, server.commit, server.asked = root, name, commit, []
    server.models = {name: root}
    server.fault, server.target, server.times, server.hits = fault, target, times, Counter()
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    server.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody vouches for; (certificate, certificate with key), by openssl."""
    key, certificate, both = (folder / name for name in ("key.pem", "certificate.pem", "both.pem"))
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
        "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    both.write_text(key.read_text() + certificate.read_text())
    return certificate, both
