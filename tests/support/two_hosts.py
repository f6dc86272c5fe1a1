"""Two hosts on one machine: network namespaces with addresses of their own, a cable between them that can be cut."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from types import TracebackType

# TEST-NET-1 (RFC 5737): never routed.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
CABLE = "cable0"


class KernelForbids(Exception):
    """No namespaces here."""


class TwoHosts:
    """A context; host 0 and 1 run commands given to `command`.

    Raises:
        KernelForbids: the kernel or a missing tool does not let us make them.
    """

    def __enter__(self) -> TwoHosts:
        self._stack = ExitStack()
        try:
            first = self._hold(["unshare", "--map-root-user", "--net"])
            self._inside = [self._enter(first)]
            second = self._hold([*self._inside[0], "unshare", "--net"])
            self._inside.append(self._enter(second))
            self._ip(0, "link", "add", CABLE, "type", "veth", "peer", "name", "end0")
            self._ip(0, "link", "set", "end0", "netns", str(second))
            self._ip(1, "link", "set", "end0", "name", CABLE)
            for host, address in enumerate(ADDRESSES):
                self._ip(host, "link", "set", "lo", "up")
                self._ip(host, "address", "add", f"{address}/24", "dev", CABLE)
                self._ip(host, "link", "set", CABLE, "up")
        except (OSError, subprocess.SubprocessError, KernelForbids) as error:
            self._stack.close()
            raise KernelForbids(str(error)) from error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _hold(self, prefix: list[str]) -> int:
        """Process id of a sleeper in a namespace of its own; the namespace ends with it."""
        holder = subprocess.Popen(
            [*prefix, "sh", "-c", "echo $$; exec sleep 1000"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._stack.callback(holder.wait)
        self._stack.callback(holder.kill)
        line = holder.stdout.readline()
        if not line:
            raise KernelForbids(holder.stderr.read())
        return int(line)

    @staticmethod
    def _enter(process: int) -> list[str]:
        return ["nsenter", f"--target={process}", "--user", "--net", "--preserve-credentials"]

    def _ip(self, host: int, *words: str) -> None:
        subprocess.run(self.command(host, "ip", *words), check=True, capture_output=True, timeout=10)

    def command(self, host: int, *words: str) -> list[str]:
        """A command as it is to be started to run on a host."""
        return [*self._inside[host], *words]

    def cut(self) -> None:
        """Simulates a pulled cable: nothing arrives any more, without an error."""
        self._ip(1, "link", "set", CABLE, "down")

    def mend(self) -> None:
        """Put the cable back."""
        self._ip(1, "link", "set", CABLE, "up")
        time.sleep(0.1)
