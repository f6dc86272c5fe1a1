"""The processes of one run, by accelerate's PartialState: meeting, collectives and barriers."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from bert_glue.config.arguments import Arguments
from bert_glue.devices.device import Device, resolve_device
from bert_glue.devices.rank_environment import read_rank_environment
from bert_glue.errors import RankError

_GRACE_SECONDS = 1.0  # for torch's own message, which names more, where it keeps its bound
_RELEASE_SECONDS = 0.05  # microseconds are enough on a host at rest


class DistributedContext:
    """This process among the ranks of its run.

    Attributes:
        rank: 0 to `world_size - 1`; rank 0 writes files and log lines.
        world_size: processes of the run.
        device: device of this process.

    Raises:
        UsageError: a variable of `read_rank_environment` is missing or not valid.
        RankError: from every method that waits for other ranks, if one of them has ended or does not answer within
            `--ddp_timeout` seconds (in the second case nccl and hccl end the process themselves).
    """

    def __init__(self, args: Arguments):
        place = read_rank_environment(os.environ)
        world = place.world_size
        # The reference launches eight processes with the same `--device 0`, so each rank chooses its own device.
        requested = args.device if world == 1 or ":" not in args.device and not args.device.isdigit() else "auto"
        self.device: Device = resolve_device(requested, place.local_rank, args.use_cpu)
        self.device.activate(args.tf32)
        self.rank, self.world_size = 0, 1
        self.timeout, self._is_lost = args.ddp_timeout, False
        self._backend = args.ddp_backend or self.device.collective_backend
        if world > 1:
            self.rank, self.world_size = place.rank, world
            os.environ.update(place.variables())  # accelerate and torch read them; srun sets others
            # Imported before the timer runs, which a slow disk would use up. The functions have the group that there is
            # at their import as a default argument. Held by them, gloo's threads outlive `close`, and one that frees a
            # tensor while the interpreter ends aborts the process [ran].
            import accelerate.state  # noqa: F401
            import torch.distributed.nn.functional  # noqa: F401

            with self._ends_in_time():
                self._together("meeting them", self._meet, args)

    def _meet(self, args: Arguments) -> None:
        from accelerate.state import PartialState

        PartialState(
            cpu=self.device.is_host,
            backend=self._backend,
            timeout=timedelta(seconds=args.ddp_timeout),
        )

    @contextmanager
    def _ends_in_time(self) -> Iterator[None]:
        """End the process with exit code 7 if the block takes longer than `--ddp_timeout`.

        torch's store waits without a limit for a listener that accepts and never answers. It waits in C++, where no
        exception reaches it, so a timer ends the process. Nothing is open at this time that would have to be closed.
        """

        def end() -> None:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            print(
                f"error: rank {self.rank} of {self.world_size} did not meet the other ranks within --ddp_timeout "
                f"{self.timeout} s: {where} does not answer; does another program listen there?",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(RankError.exit_code)

        timer = threading.Timer(self.timeout + _GRACE_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _together(self, what: str, operation: Callable, *given: Any) -> None:
        """Call an operation in which all ranks take part."""
        began = time.monotonic()
        try:
            operation(*given)
        except RuntimeError as error:
            self._is_lost = True
            reason = str(error).strip().splitlines()[0][:300]
            raise RankError(
                f"rank {self.rank} of {self.world_size} lost the other ranks while {what}, after "
                f"{time.monotonic() - began:.1f} s (--ddp_timeout {self.timeout} s): {reason}"
            ) from error

    @property
    def is_first(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        """Add each tensor over all ranks, in place, in one collective a tensor."""
        if self.world_size > 1:
            for tensor in tensors:
                self._together("adding up numbers", torch.distributed.all_reduce, tensor)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The `value` of every rank, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        self._together("exchanging values", torch.distributed.all_gather_object, gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        if self.world_size > 1:
            barrier = partial(torch.distributed.barrier, **self.device.barrier_options(self._backend))
            self._together("waiting", barrier)

    def close(self) -> None:
        """End the process group, if there is one and all ranks are still in it."""
        if self.world_size > 1 and torch.distributed.is_initialized() and not self._is_lost:
            # The group's destructor joins its threads while this one holds the interpreter lock (seen with torch 2.6
            # and gloo). A thread that still has to release the tensors of the last collective needs that lock, and
            # both would wait for ever. The pause gives it the lock first.
            time.sleep(_RELEASE_SECONDS)
            torch.distributed.destroy_process_group()
