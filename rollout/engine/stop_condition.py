"""Stop conditions of a sequence: stop tokens, stop strings and length limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.rollout.api import FinishReason, SamplingParams
from paceline.rollout.sequence import SequenceState
from paceline.rollout.values import error_line

TextDecoder = Callable[[Sequence[int]], str]


class StopCondition:
    """Checks after each committed token whether a sequence is finished.

    Args:
        params: Sampling parameters of the request.
        decode_text: Function from token ids to text; called only if there are stop strings.
    """

    def __init__(self, params: SamplingParams, decode_text: TextDecoder | None) -> None:
        self._decode = decode_text
        self._stop_tokens = frozenset(params.stop_token_ids)
        self._strings = params.stop_strings
        # A token is at least one byte of text, so a stop string spans at most as many tokens as it has bytes.
        # The extra tokens keep a character intact that is split over several tokens at the window's start.
        self._window = max((len(s.encode(errors="replace")) for s in self._strings), default=0) + 4

    def reason(self, sequence: SequenceState) -> FinishReason | None:
        """Returns the reason why the sequence ends with its last token, or None if it continues.

        If the text decoder raises, the sequence fails with a one-line error.
        """
        try:
            stopped = self._has_stop_string(sequence)
        except Exception as error:  # the caller's decoder may raise anything; other sequences must continue
            sequence.error = f"decode_text failed: {error_line(error)}"
            return FinishReason.FAILED
        if sequence.tokens[-1] in self._stop_tokens or stopped:
            return FinishReason.STOP
        if sequence.remaining <= 0:
            return FinishReason.LENGTH
        return FinishReason.PAUSED if sequence.segment_finished else None

    def _has_stop_string(self, sequence: SequenceState) -> bool:
        """Returns whether the text of the last tokens contains a stop string."""
        if not self._strings or self._decode is None:
            return False
        start = max(sequence.num_prompt, len(sequence.tokens) - self._window)
        text = self._decode(sequence.tokens[start:])
        return any(s in text for s in self._strings)
