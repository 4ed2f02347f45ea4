"""A prefix cache across calls, which holds keys and values of finished sequences.

A conversation's next turn starts with everything said before, so only the new tokens have to be read. Entries
lie beside the slots and occupy none of them. They are evicted least recently used first, for other sequences
and when memory becomes short, and all of them when the policy's weights change. If a request's tokens diverge
from an entry, only the common part is reused, so text that was tokenized differently costs time but never a
wrong token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from paceline.rollout.model.kv_cache import SlotCache, available_bytes
from paceline.rollout.model.paged_cache import PagedCache
from paceline.rollout.sequence import SequenceState


@dataclass(slots=True, eq=False)
class _KeptSequence:
    """Holds the cache contents of one finished sequence.

    Attributes:
        tokens: Token ids, int64 [n].
        num_prompt: Length of the prompt in tokens. From the prompt's last token on, the taps include the
            inputs of the output head.
        lines: Keys and values, [layers, 2, kv_heads, n, head_dim].
        taps: Tapped features, [n, taps].
    """

    tokens: np.ndarray
    num_prompt: int
    lines: torch.Tensor
    taps: torch.Tensor

    def shared_with(self, tokens: np.ndarray, num_prompt: int) -> int:
        """Returns how many leading tokens a sequence with these tokens and this prompt length can reuse."""
        most = min(len(tokens), len(self.tokens))
        mismatches = np.flatnonzero(tokens[:most] != self.tokens[:most])
        same = int(mismatches[0]) if len(mismatches) else most
        return same if self.num_prompt <= num_prompt else min(same, num_prompt - 1)


class KeptPrefixes:
    """Keeps keys and values of an engine's finished sequences for reuse.

    Args:
        cache: Cache in which the sequences are decoded.

    Attributes:
        most_tokens: Maximum number of tokens kept; 0, the initial value, keeps nothing. A token takes as much
            memory as in a slot.
    """

    def __init__(self, cache: SlotCache | PagedCache) -> None:
        self._cache = cache
        self._kept: list[_KeptSequence] = []  # least recently used first
        self.most_tokens = 0

    @property
    def tokens(self) -> int:
        """The number of tokens currently kept."""
        return sum(len(kept.tokens) for kept in self._kept)

    def keep(self, sequence: SequenceState, slot: int) -> None:
        """Stores a slot's contents for a sequence: all tokens but the last, which was never read."""
        if len(sequence.tokens) > self.most_tokens:
            return
        tokens = np.array(sequence.tokens[:-1])
        # entries whose tokens this sequence contains completely are superseded by it
        self._kept = [k for k in self._kept if k.shared_with(tokens, len(tokens)) < len(k.tokens)]
        while self._kept and (self.tokens + len(tokens) > self.most_tokens or not self._fits(len(tokens))):
            del self._kept[0]
        if not self._fits(len(tokens)):
            return
        lines, taps = self._cache.read_slot(slot, len(tokens))
        self._kept.append(_KeptSequence(tokens, sequence.num_prompt, lines, taps))

    def _fits(self, tokens: int) -> bool:
        """Returns whether free memory holds this many tokens twice; the margin is for the forwards."""
        return 2 * tokens * self._cache.shape.token_bytes <= available_bytes(self._cache.device)

    def restore(self, sequence: SequenceState, slot: int, more_than: int) -> int:
        """Copies the longest prefix that a kept sequence shares with this one into a slot.

        Args:
            sequence: Sequence to prefill.
            slot: Slot of the sequence.
            more_than: Number of tokens that the prefix must exceed to be copied.

        Returns:
            The number of tokens copied, or 0.
        """
        # the last token must be read by a forward in any case, because its logits are needed
        wanted = np.array(sequence.tokens[:-1])
        counts = [kept.shared_with(wanted, sequence.num_prompt) for kept in self._kept]
        count = max(counts, default=0)
        if count <= more_than:
            return 0
        kept = self._kept.pop(counts.index(count))
        self._kept.append(kept)
        self._cache.write_slot(slot, kept.lines[:, :, :, :count], kept.taps[:count])
        return count

    def clear(self) -> None:
        """Drops everything that is kept."""
        self._kept.clear()
