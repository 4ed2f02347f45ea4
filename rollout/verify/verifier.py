"""What a verifier is: a pure function, and the drafts that its theorem covers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from paceline.rollout.trees import DraftKind, DraftTree
from paceline.rollout.verify.outcome import Uniforms, Verification

VerifierFunction = Callable[[torch.Tensor, DraftTree, Uniforms], Verification]


class Verifier(Protocol):
    """Verifies drawn drafts, and says which it does not: an engine takes nothing less."""

    def refusal(self, kind: DraftKind, chain: bool) -> str | None:
        """Why drafts of this kind, chains or trees, are not verified, in one line; None where they are."""
        ...

    def __call__(self, target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms, /) -> Verification:
        """The outcome; ValueError for a draft that is not verified."""
        ...


@dataclass(frozen=True, slots=True)
class StatedVerifier:
    """A verifying function together with what its theorem covers; everything else is refused.

    Attributes:
        name: For messages.
        function: Takes the target's probabilities float32 [B, N + 1, V], the draft and the random numbers.
        covers: Kinds of trees whose output keeps the target's distribution. A chain has no siblings, so that
            a drawn chain of any kind is covered by every verifier.
        trees: Whether it reads trees at all.
    """

    name: str
    function: VerifierFunction = field(repr=False)
    covers: frozenset[DraftKind]
    trees: bool = True

    def refusal(self, kind: DraftKind, chain: bool) -> str | None:
        if kind is DraftKind.FIXED:
            return (
                f"{self.name} verification is for drawn drafts, this one is fixed: follow the target's own "
                f"draws instead"
            )
        if chain:
            return None
        if not self.trees:
            return (
                f"{self.name} verification reads chains, this draft is a tree: verify with recursive, or "
                f"draft chains"
            )
        if kind in self.covers:
            return None
        return (
            f"{self.name} verification does not cover siblings {kind}: verify with recursive, or draft chains"
        )

    def __call__(self, target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
        refusal = self.refusal(draft.kind, draft.parents is None)
        if refusal is not None:
            raise ValueError(refusal)
        return self.function(target_probs, draft, uniforms)


def verifier(
    name: str, covers: Collection[DraftKind] = (), trees: bool = True
) -> Callable[[VerifierFunction], StatedVerifier]:
    """Makes a function a `StatedVerifier`; arguments as there."""

    def made(function: VerifierFunction) -> StatedVerifier:
        return StatedVerifier(name, function, frozenset(covers), trees)

    return made
