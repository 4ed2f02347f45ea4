"""What every drafter answers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftTree


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter sees of the batch.

    Attributes:
        sequences: Sequence i sits in slot i.
        taps: [slots, capacity, taps + 1, hidden], the target's tapped hidden states; those of sequence i are
            valid at positions ``0 .. len(tokens) - 2``. The last of the second-to-last dimension is what the
            output head read. None when the engine keeps none.
    """

    sequences: Sequence[SequenceState]
    taps: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """What a verification saw, before its tokens are committed.

    Attributes:
        sequences: Sequence i sits in slot i.
        strategy: What was asked for.
        draft: What was verified.
        logits: [R, V]; for each sequence in turn, after its last committed token and after each of its draft
            nodes.
        paths: The accepted nodes of each sequence, root first.
    """

    sequences: Sequence[SequenceState]
    strategy: Strategy
    draft: DraftTree
    logits: torch.Tensor
    paths: Sequence[Sequence[int]]


class Drafter(Protocol):
    """Proposes tokens. Holds state for slots (and for prompts) only; it may be wrong, never unfaithful.

    The contract that losslessness needs: draft tokens are either a function of what is committed
        (``DraftTree.probs`` is None)
    or were drawn from the very distributions reported in ``DraftTree.probs``, and ``DraftTree.kind`` says
    how. Verifiers take the kind at its word and refuse the ones that they do not cover.

    A drafter may have a static method ``drafts(strategy, rules) -> DraftKind``, which says beforehand of what
    kind the drafts for a `Strategy` are (``rules`` are the `DraftRules` of model-based drafters). A verifier
    that does not cover them is then refused where it is chosen, not at the first draft; and
    ``chains_only = True`` says that it drafts nothing but chains.
    """

    name: str
    needs_taps: bool

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """A draft of at most the strategy's depth and nodes for every sequence of the batch."""
        ...

    def verified(self, step: VerifiedStep) -> None:
        """A step was verified, of this drafter's draft or another's."""
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


class StatelessSlots:
    """Answers of a drafter that keeps nothing by slot."""

    needs_taps = False

    def verified(self, step: VerifiedStep) -> None:
        """Nothing to learn from it."""

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Nothing to learn from it."""

    def move(self, source: int, target: int) -> None:
        """Nothing is kept by slot."""

    def release(self, slot: int) -> None:
        """Nothing is kept by slot."""

    def forget(self, sequence: SequenceState) -> None:
        """Nothing is kept by sequence."""
