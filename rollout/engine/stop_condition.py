"""When a sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.rollout.api import FinishReason, SamplingParams
from paceline.rollout.sequence import SequenceState
from paceline.rollout.values import error_line

TextDecoder = Callable[[Sequence[int]], str]


class StopCondition:
    """Judges a sequence after each committed token.

    Args:
        params: Of its request.
        decode_text: Token ids → text; used only where there are stop strings.
    """

    def __init__(self, params: SamplingParams, decode_text: TextDecoder | None) -> None:
        self._decode = decode_text
        self._stop_tokens = frozenset(params.stop_token_ids)
        self._strings = params.stop_strings
        # A token is at least one byte of the text, so the end of a stop string lies within as many tokens as
        # it has bytes; a few more keep a character whole that is spread over tokens at the window's start.
        self._window = max((len(s.encode(errors="replace")) for s in self._strings), default=0) + 4

    def reason(self, sequence: SequenceState) -> FinishReason | None:
        """Why the sequence ends with its last token, or None. Where the text decoder fails, the sequence
        fails, with its line.
        """
        try:
            met = self._meets_stop_string(sequence)
        except Exception as error:  # of the caller's own decoder; the other sequences go on
            sequence.error = f"decode_text failed: {error_line(error)}"
            return FinishReason.FAILED
        if sequence.tokens[-1] in self._stop_tokens or met:
            return FinishReason.STOP
        if sequence.remaining <= 0:
            return FinishReason.LENGTH
        return FinishReason.PAUSED if sequence.segment_over else None

    def _meets_stop_string(self, sequence: SequenceState) -> bool:
        if not self._strings or self._decode is None:
            return False
        start = max(sequence.num_prompt, len(sequence.tokens) - self._window)
        text = self._decode(sequence.tokens[start:])
        return any(s in text for s in self._strings)
