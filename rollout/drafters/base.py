"""The interface of a drafter, and what an engine tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftTree

# (slots int64 [N], positions int64 [N]) → [N, (taps + 1) · hidden], the tapped hidden states of these tokens
# and the inputs of the output head
TapReader = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class DraftContext:
    """The part of the batch that a drafter sees.

    Attributes:
        sequences: Active sequences; sequence i sits in slot i.
        taps: Function that reads the target's tapped hidden states of tokens; None when the engine keeps
            none. Those of sequence i are valid at positions ``0 .. len(tokens) - 2``.
    """

    sequences: Sequence[SequenceState]
    taps: TapReader | None


@dataclass(frozen=True, slots=True)
class VerifiedStep:
    """The inputs and result of a verification, before its tokens are committed.

    Attributes:
        sequences: Active sequences; sequence i sits in slot i.
        strategy: Strategy that the draft was made for.
        draft: Draft that was verified.
        logits: [R, V]; for each sequence in turn, after its last committed token and after each of its draft
            nodes.
        paths: Accepted nodes of each sequence, root first.
    """

    sequences: Sequence[SequenceState]
    strategy: Strategy
    draft: DraftTree
    logits: torch.Tensor
    paths: Sequence[Sequence[int]]


class Drafter(Protocol):
    """Proposes draft tokens; it may hold state for slots and for prompts, and nothing else.

    A drafter may guess wrong, but it must report truthfully how it drafts. This is the contract that
    losslessness needs: draft tokens are either a function of the committed tokens (``DraftTree.probs`` is
    None), or were drawn from exactly the distributions reported in ``DraftTree.probs``, and
    ``DraftTree.kind`` says how. Verifiers rely on the kind and reject the kinds that they do not cover.

    A class that `paceline.rollout.drafters.DRAFTERS` registers is constructed without arguments, or by its
    class method ``build(host, parts)``, see `paceline.rollout.drafters.parts`.

    A drafter may have a static method ``drafts(strategy, rules) -> DraftKind``, which states in advance the
    kind of the drafts for a `Strategy` (``rules`` are the `DraftRules` of model-based drafters). A verifier
    that does not cover them is then rejected when it is chosen, not at the first draft. A class attribute
    ``chains_only = True`` states that the drafter drafts nothing but chains. A method ``prepare(strategy)``
    is called for each strategy that may be chosen, before anything is timed. An attribute ``caught_up`` says
    after each draft whether much was read for it that earlier steps had left unread, see `has_caught_up`.
    """

    name: str
    needs_taps: bool

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Returns a draft for every sequence, within the strategy's depth and nodes."""
        ...

    def verified(self, step: VerifiedStep) -> None:
        """Notes the verification of a step, whether it verified this drafter's draft or another's."""
        ...

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Notes that the last ``count`` tokens of ``sequence`` were committed; at admission, its prompt."""
        ...

    def move(self, source: int, target: int) -> None:
        """Notes that the sequence in slot ``source`` now sits in slot ``target``."""
        ...

    def release(self, slot: int) -> None:
        """Notes that the slot is free."""
        ...

    def forget(self, sequence: SequenceState) -> None:
        """Notes that the sequence has left the engine: nothing more of it will be drafted."""
        ...


def has_caught_up(read: int, sequences: int, strategy: Strategy) -> bool:
    """Returns whether a drafter has read more than twice what a step of the strategy commits at most.

    Its time then says little about the strategy's next step.

    Args:
        read: Number of tokens of all sequences that were read for a draft.
        sequences: Number of sequences.
        strategy: Strategy of the draft.
    """
    return read > 2 * sequences * (strategy.depth + 1)


class StatelessSlots:
    """Base class of drafters that keep no state by slot."""

    needs_taps = False

    def verified(self, step: VerifiedStep) -> None:
        """Does nothing."""

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Does nothing."""

    def move(self, source: int, target: int) -> None:
        """Does nothing: no state is kept by slot."""

    def release(self, slot: int) -> None:
        """Does nothing: no state is kept by slot."""

    def forget(self, sequence: SequenceState) -> None:
        """Does nothing: no state is kept by sequence."""
