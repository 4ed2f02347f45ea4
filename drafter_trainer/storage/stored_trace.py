"""Storage of one trace: in memory, or on disk once memory is full."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from paceline.rollout.api import DistillationTrace

_TENSORS = ("token_ids", "taps", "final", "refused", "refused_final")


class StoredTrace:
    """A trace that is held in memory or in a file.

    Attributes:
        length: Number of tokens of prompt and completion.
        num_prompt: Number of tokens of the prompt.
    """

    def __init__(self, trace: DistillationTrace) -> None:
        self.length, self.num_prompt = len(trace.token_ids), trace.num_prompt
        self._trace: DistillationTrace | None = trace
        self._path: Path | None = None

    @property
    def on_disk(self) -> bool:
        """Whether the trace is in a file."""
        return self._path is not None

    def spill(self, path: Path) -> None:
        """Moves the trace to a file.

        Raises:
            OSError: The disk is full or not writable; the trace then stays in memory.
        """
        trace = self.get()
        tensors = {name: getattr(trace, name).contiguous() for name in _TENSORS}
        try:
            save_file(tensors, path)
        except Exception as error:  # safetensors raises its own error for a full disk
            path.unlink(missing_ok=True)
            raise OSError(f"{path}: {error}") from None
        self._trace, self._path = None, path

    def get(self) -> DistillationTrace:
        """Returns the trace, reading its file if it is on disk."""
        if self._trace is not None:
            return self._trace
        assert self._path is not None
        tensors = load_file(self._path)
        return DistillationTrace(num_prompt=self.num_prompt, **tensors)

    def drop(self) -> None:
        """Removes the trace's file, if any; the trace must not be used afterwards."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
