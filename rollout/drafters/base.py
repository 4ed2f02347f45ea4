"""What every drafter answers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rollout.sequence import SequenceState
from rollout.trees.chain import DraftTree


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter sees of the batch.

    Attributes:
        sequences: Sequence i sits in slot i.
        taps: [slots, capacity, taps + 1, hidden], the target's tapped hidden states; those of sequence i are valid at
            positions ``0 .. len(tokens) - 2``. The last of the second-to-last dimension is what the output head read.
            None when the engine keeps none.
    """

    sequences: Sequence[SequenceState]
    taps: torch.Tensor | None


class Drafter(Protocol):
    """Proposes tokens. Holds state for slots (and for prompts) only; it may be wrong, never unfaithful.

    The contract that losslessness needs: a draft token is either a function of what is committed (``DraftTree.probs`` is None)
    or was drawn from the very distribution reported in ``DraftTree.probs``.
    """

    name: str
    needs_taps: bool

    def propose(self, context: DraftContext, depth: int) -> DraftTree:
        """Up to ``depth`` draft tokens for every sequence of the batch."""
        ...

    def observe(self, sequence: SequenceState, count: int) -> None:
        """The last ``count`` tokens of ``sequence`` were just committed (its whole prompt, at admission)."""
        ...

    def move(self, source: int, target: int) -> None:
        """The sequence in slot ``source`` now sits in slot ``target``."""
        ...

    def release(self, slot: int) -> None:
        """The slot is free."""
        ...

    def forget(self, sequence: SequenceState) -> None:
        """The sequence was handed out: nothing more of it will be drafted."""
        ...
