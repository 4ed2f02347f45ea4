"""The interface of a verifier: a pure function, and the drafts that its theorem covers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch

from paceline.rollout.trees import DraftKind, DraftTree
from paceline.rollout.verify.outcome import Uniforms, Verification

VerifierFunction = Callable[[torch.Tensor, DraftTree, Uniforms], Verification]


class Verifier(Protocol):
    """Verifies drawn drafts and states which of them it does not cover; an engine requires both."""

    def refusal(self, kind: DraftKind, chain: bool) -> str | None:
        """Returns, in one line, why such chains or trees are not covered; None if they are."""
        ...

    def __call__(self, target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms, /) -> Verification:
        """Returns the outcome of the verification.

        Raises:
            ValueError: The draft is not covered.
        """
        ...


@dataclass(frozen=True, slots=True)
class StatedVerifier:
    """A verifying function together with the drafts that its theorem covers; it rejects all others.

    Attributes:
        name: Name in error messages.
        function: Verifies a draft, given the target's probabilities float32 [B, N + 1, V], the draft and the
            random numbers.
        covers: Kinds of trees for which the output keeps the target's distribution. Chains have no siblings,
            so that every verifier covers drawn chains of any kind.
        trees: Whether the function reads trees at all.
    """

    name: str
    function: VerifierFunction = field(repr=False)
    covers: frozenset[DraftKind]
    trees: bool = True

    def refusal(self, kind: DraftKind, chain: bool) -> str | None:
        """Returns why drafts of this kind are not covered, see `Verifier.refusal`."""
        if kind is DraftKind.FIXED:
            return (
                f"{self.name} verification is for drawn drafts, but this draft is fixed: use "
                f"verify_deterministic"
            )
        if chain:
            return None
        if not self.trees:
            return (
                f"{self.name} verification reads chains, but this draft is a tree: use verifier recursive, "
                f"or draft chains"
            )
        if kind in self.covers:
            return None
        return (
            f"{self.name} verification does not cover siblings {kind}: use verifier recursive, or draft "
            f"chains"
        )

    def __call__(self, target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
        """Verifies the draft with the function, see `Verifier.__call__`."""
        refusal = self.refusal(draft.kind, draft.parents is None)
        if refusal is not None:
            raise ValueError(refusal)
        return self.function(target_probs, draft, uniforms)


def verifier(
    name: str, covers: Collection[DraftKind] = (), trees: bool = True
) -> Callable[[VerifierFunction], StatedVerifier]:
    """Decorates a verifying function as a `StatedVerifier`.

    The arguments are the attributes of that class.
    """

    def decorate(function: VerifierFunction) -> StatedVerifier:
        return StatedVerifier(name, function, frozenset(covers), trees)

    return decorate
