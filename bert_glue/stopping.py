"""The vote of all ranks whether a run stops, added up with the gradients of each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bert_glue.flat import GradientBuffers
    from bert_glue.ranks import Ranks


class StopVote:
    """Whether a signal asked any rank to stop: all ranks must leave the loop after the same step.

    Args:
        ranks: that vote.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._previous: Callable[[], float] = lambda: 0.0

    def all_reduce(self, buffers: GradientBuffers, is_requested: bool) -> bool:
        """Add up the gradients of a step over all ranks, and this vote with them.

        Args:
            buffers: gradients of this rank; summed in place.
            is_requested: whether this rank was asked to stop.

        Returns:
            The same on all ranks: whether one of them was asked to stop. On devices that run behind the host it is the
            answer of the step before: reading this one's would make the host wait for the step, every step.
        """
        if self.ranks.world_size == 1:
            return is_requested
        buffers.stop_votes.fill_(float(is_requested))
        buffers.all_reduce(self.ranks)
        current = self.ranks.device.read_later(buffers.stop_votes)
        answer = current if self.ranks.device.is_host else self._previous
        self._previous = current
        return answer() > 0.0
