"""Packs what the ranks of a machine do into one counter, so that it is read as of one moment."""

from __future__ import annotations

from typing import NamedTuple

# bits of each field, for 4,095 ranks on a machine; 27 bits of a signed 64-bit counter remain for changes
_BITS = 12
_FIELD = (1 << _BITS) - 1


class Neighbours(NamedTuple):
    """What the ranks of one machine do in an RL step.

    Attributes:
        busy: Number of ranks that decode.
        training: Number of ranks that train the drafter, those that pause included.
        paused: Number of ranks whose training pauses.
        changes: Number of changes of the other fields so far. If it is equal at two moments, nothing has
            changed between them.
    """

    busy: int
    training: int
    paused: int
    changes: int

    @classmethod
    def unpack(cls, counter: int) -> Neighbours:
        """Returns the fields of a counter to which `packed_change` was added."""
        busy, training, paused = (counter >> _BITS * field & _FIELD for field in range(3))
        return cls(busy, training, paused, counter >> 3 * _BITS)


def packed_change(*, busy: int = 0, training: int = 0, paused: int = 0) -> int:
    """Returns what to add to the counter for one change.

    Args:
        busy: Number of ranks that begin to decode, negative for those that end.
        training: Number of ranks that begin to train, negative for those that end.
        paused: Number of ranks whose training begins to pause, negative for those that resume it.
    """
    return busy + (training << _BITS) + (paused << 2 * _BITS) + (1 << 3 * _BITS)
