"""When a sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rollout.api import FinishReason
from rollout.sequence import SequenceState

TextDecoder = Callable[[Sequence[int]], str]


class StopCondition:
    """Judges a sequence after each committed token.

    Args:
        sequence: The sequence.
        decode_text: Token ids → text; used only where the request has stop strings.
    """

    def __init__(self, sequence: SequenceState, decode_text: TextDecoder | None) -> None:
        self._sequence = sequence
        self._decode = decode_text
        self._stop_tokens = frozenset(sequence.request.params.stop_token_ids)
        self._strings = sequence.request.params.stop_strings
        # A token is at least one byte of the text, so the end of a stop string lies within as many tokens as it has bytes;
        # a few more keep a character whole that is spread over tokens at the window's start.
        self._window = max((len(s.encode()) for s in self._strings), default=0) + 4

    def reason(self) -> FinishReason | None:
        """Why the sequence ends with its last token, or None."""
        sequence = self._sequence
        if sequence.tokens[-1] in self._stop_tokens or self._meets_stop_string():
            return FinishReason.STOP
        if sequence.remaining <= 0:
            return FinishReason.LENGTH
        return FinishReason.PAUSED if sequence.segment_over else None

    def _meets_stop_string(self) -> bool:
        if not self._strings or self._decode is None:
            return False
        start = max(self._sequence.num_prompt, len(self._sequence.tokens) - self._window)
        text = self._decode(self._sequence.tokens[start:])
        return any(s in text for s in self._strings)
