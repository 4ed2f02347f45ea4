"""Where traces are kept: in memory, and on disk once there are too many."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from paceline.rollout.api import DistillationTrace

_TENSORS = ("token_ids", "taps", "final", "refused", "refused_final")


class StoredTrace:
    """One trace, in memory or in a file.

    Attributes:
        length: Tokens of prompt and completion.
        num_prompt: Of the prompt.
        on_disk: Where it is.
    """

    def __init__(self, trace: DistillationTrace) -> None:
        self.length, self.num_prompt = len(trace.token_ids), trace.num_prompt
        self._trace: DistillationTrace | None = trace
        self._path: Path | None = None

    @property
    def on_disk(self) -> bool:
        return self._path is not None

    def spill(self, path: Path) -> None:
        """Moves it to a file.

        Raises:
            OSError: when the disk is full or not writable; it then stays in memory.
        """
        trace = self.get()
        tensors = {name: getattr(trace, name).contiguous() for name in _TENSORS}
        try:
            save_file(tensors, path)
        except Exception as error:  # safetensors reports a full disk by an error of its own
            path.unlink(missing_ok=True)
            raise OSError(f"{path}: {error}") from None
        self._trace, self._path = None, path

    def get(self) -> DistillationTrace:
        """The trace, read from its file where it is there."""
        if self._trace is not None:
            return self._trace
        assert self._path is not None
        tensors = load_file(self._path)
        return DistillationTrace(num_prompt=self.num_prompt, **tensors)

    def drop(self) -> None:
        """Removes its file; it is not used again."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
