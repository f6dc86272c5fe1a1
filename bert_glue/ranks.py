"""The processes of one run, on accelerate's PartialState: torchrun's variables, collectives, waiting."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from bert_glue.arguments import Arguments
from bert_glue.device import Device, resolve_device


class Ranks:
    """This process among its peers.

    Args:
        rank: 0 to `world_size - 1`; rank 0 writes files and log lines.
        world_size: processes of the run.
        device: of this process.
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
        if world > 1:
            from accelerate.state import PartialState

            state = PartialState(
                cpu=self.device.is_host,
                backend=args.ddp_backend or self.device.collective_backend,
                timeout=timedelta(seconds=args.ddp_timeout),
            )
            self.rank, self.world_size = state.process_index, state.num_processes

    @property
    def is_first(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0

    def sum(self, tensors: list[torch.Tensor]) -> None:
        """Add each tensor over all ranks, in place, in one collective a tensor."""
        if self.world_size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """Until every rank is here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """End the process group, if there is one."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
