"""Keys and values of sequences that have ended, kept for requests of later calls that begin with the same
tokens.

A conversation's next turn begins with all that was said before, so only what is new has to be read. What is
kept lies beside the slots and takes none of them. It is given up, the longest unused first, for other
sequences and when memory becomes short; all of it when the policy's weights change. A request whose tokens
part from a kept sequence uses what comes before that place: text that was tokenized anew costs time, never a
    wrong token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from paceline.rollout.model.kv_cache import SlotCache, available_bytes
from paceline.rollout.sequence import SequenceState


@dataclass(slots=True, eq=False)
class _Kept:
    """What a slot held of one sequence.

    Attributes:
        tokens: int64 [n].
        num_prompt: Length of the prompt: from its last token on, taps have what the output head read.
        lines: [layers, 2, kv_heads, n, head_dim].
        taps: [n, taps].
    """

    tokens: np.ndarray
    num_prompt: int
    lines: torch.Tensor
    taps: torch.Tensor

    def shared_with(self, tokens: np.ndarray, num_prompt: int) -> int:
        """How many of its first tokens a sequence with this prompt can take over."""
        most = min(len(tokens), len(self.tokens))
        parted = np.flatnonzero(tokens[:most] != self.tokens[:most])
        same = int(parted[0]) if len(parted) else most
        return same if self.num_prompt <= num_prompt else min(same, num_prompt - 1)


class KeptPrefixes:
    """What is kept of an engine's sequences.

    Args:
        cache: Where they are decoded.

    Attributes:
        most_tokens: Tokens kept at most; 0, as at first, keeps nothing. Each takes as much memory as in a
            slot.
    """

    def __init__(self, cache: SlotCache) -> None:
        self._cache = cache
        self._kept: list[_Kept] = []  # the longest unused first
        self.most_tokens = 0

    @property
    def tokens(self) -> int:
        """Tokens that are kept now."""
        return sum(len(kept.tokens) for kept in self._kept)

    def keep(self, sequence: SequenceState, slot: int) -> None:
        """Keeps what the slot holds of a sequence: all tokens but the last, which was never read."""
        if len(sequence.tokens) > self.most_tokens:
            return
        tokens = np.array(sequence.tokens[:-1])
        # it has all of theirs
        self._kept = [k for k in self._kept if k.shared_with(tokens, len(tokens)) < len(k.tokens)]
        while self._kept and (self.tokens + len(tokens) > self.most_tokens or not self._fits(len(tokens))):
            del self._kept[0]
        if not self._fits(len(tokens)):
            return
        views = [
            self._cache.lines(layer)[:, slot, :, : len(tokens)] for layer in range(self._cache.shape.layers)
        ]
        self._kept.append(
            _Kept(
                tokens, sequence.num_prompt, torch.stack(views), self._cache.taps[slot, : len(tokens)].clone()
            )
        )

    def _fits(self, tokens: int) -> bool:
        """Whether free memory holds so many tokens twice: the forwards need some as well."""
        return 2 * tokens * self._cache.shape.token_bytes <= available_bytes(self._cache.device)

    def restore(self, sequence: SequenceState, slot: int, more_than: int) -> int:
        """Copies into a slot what the kept sequence that is most alike has in common with this one, if that
        is more than ``more_than`` tokens. Returns how many; 0 where nothing was copied.
        """
        # the last one is read in any case: its logits are what comes next
        wanted = np.array(sequence.tokens[:-1])
        counts = [kept.shared_with(wanted, sequence.num_prompt) for kept in self._kept]
        count = max(counts, default=0)
        if count <= more_than:
            return 0
        kept = self._kept.pop(counts.index(count))
        self._kept.append(kept)
        for layer, lines in enumerate(kept.lines):
            self._cache.lines(layer)[:, slot, :, :count] = lines[:, :, :count]
        self._cache.taps[slot, :count] = kept.taps[:count]
        return count

    def clear(self) -> None:
        """Gives up everything."""
        self._kept.clear()
