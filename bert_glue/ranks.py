"""The processes of one run, on accelerate's PartialState: torchrun's variables, collectives, waiting."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from bert_glue.arguments import Arguments
from bert_glue.device import Device, resolve_device
from bert_glue.errors import RankError


class Ranks:
    """This process among its peers.

    Args:
        rank: 0 to `world_size - 1`; rank 0 writes files and log lines.
        world_size: processes of the run.
        device: of this process.

    Raises:
        RankError: by every method that waits for the others, when one of them ended or did not answer
            within `--ddp_timeout` seconds (nccl and hccl end the process themselves in the second case).
    """

    def __init__(self, args: Arguments):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        # A single process with --device npu:3 must not be moved by a stale LOCAL_RANK.
        # The reference sets RANK but no LOCAL_RANK: on its one host they are the same.
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) if world > 1 else 0
        # The reference launches eight processes with the same `--device 0`: ranks choose their own.
        requested = args.device if world == 1 or ":" not in args.device and not args.device.isdigit() else "auto"
        self.device: Device = resolve_device(requested, local, args.use_cpu)
        self.device.activate(args.tf32)
        self.rank, self.world_size = 0, 1
        self.timeout, self._is_lost = args.ddp_timeout, False
        if world > 1:
            self.rank, self.world_size = int(os.environ.get("RANK", local)), world
            os.environ.setdefault("LOCAL_RANK", str(local))  # accelerate asks for it
            self._together("meeting them", self._meet, args)

    def _meet(self, args: Arguments) -> None:
        from accelerate.state import PartialState

        PartialState(
            cpu=self.device.is_host,
            backend=args.ddp_backend or self.device.collective_backend,
            timeout=timedelta(seconds=args.ddp_timeout),
        )

    def _together(self, what: str, operation: Callable, *given: Any) -> None:
        """Call an operation that all ranks take part in."""
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

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Add each tensor over all ranks, in place, in one collective a tensor."""
        if self.world_size > 1:
            for tensor in tensors:
                self._together("adding up numbers", torch.distributed.all_reduce, tensor)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        self._together("exchanging values", torch.distributed.all_gather_object, gathered, value)
        return gathered

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            self._together("waiting", torch.distributed.barrier)

    def close(self) -> None:
        """End the process group, if there is one and all ranks are still in it."""
        if self.world_size > 1 and torch.distributed.is_initialized() and not self._is_lost:
            torch.distributed.destroy_process_group()


class StepSum:
    """What all ranks add up in an optimizer step, in one collective: the gradients, and who was asked to stop."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._alone = torch.zeros(1, device=ranks.device.torch_device)
        self._before: Callable[[], float] = lambda: 0.0

    def __call__(self, buffers: list[torch.Tensor], asks_to_stop: bool) -> bool:
        """Add the buffers over all ranks, in place.

        Args:
            buffers: `[elements]` each, mostly one; the last element of the last one is free. May be empty.
            asks_to_stop: whether this rank was asked to stop.

        Returns:
            The same on all ranks: whether one of them was asked to stop. On devices that are given work ahead
            it is the answer of the step before, so that the host need not wait for this one.
        """
        if self.ranks.world_size == 1:
            return asks_to_stop
        vote = buffers[-1][-1:] if buffers else self._alone
        vote.fill_(float(asks_to_stop))
        self.ranks.sum(buffers or [vote])
        now = self.ranks.device.read_later(vote)
        answer, self._before = (now if self.ranks.device.is_host else self._before), now
        return answer() > 0.0
