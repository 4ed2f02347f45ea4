"""The files of a depth control: what it learned, for the next start, and its status, for other processes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.rollout.backends.adaptive.depth_control import DepthControl

STATE, STATUS = "depths.json", "status.json"

# vLLM kills its engine core without letting it finish, so files are written as soon as nothing is decoded.
_STATUS_SECONDS = 1.0  # between two writes of the status while decoding; each takes a tenth of a millisecond
_IDLE_SECONDS = 2.0  # between two writes of the state while nothing is decoded
_BUSY_SECONDS = 300.0  # the same between decode steps, which wait for it


class ControlFiles:
    """Saves the state and the status of a control, and restores the state.

    A file that cannot be read or written is reported in a line, and decoding goes on without it.

    Args:
        control: The control.
        state: Directory of ``depths.json``, which also has the learned schedule; None saves no state.
        status: Directory of ``status.json``; None writes no status.
        identity: What the times were measured with, such as model and version; a state with another identity
            is not restored.
    """

    def __init__(
        self, control: DepthControl, state: Path | None, status: Path | None, identity: Mapping[str, str]
    ) -> None:
        self._control, self._identity = control, dict(identity)
        self._state = None if state is None else state / STATE
        self._status = None if status is None else status / STATUS
        self._state_at = self._status_at = float("-inf")

    def restore(self) -> None:
        """Restores the state of an earlier start, if there is one of the same identity.

        A first status is written too: it says that this scheduler runs.
        """
        self._write_status()
        if self._state is None or not self._state.is_file():
            return
        try:
            saved = json.loads(self._state.read_text(encoding="utf-8"))
            if saved["identity"] != self._identity:
                raise ValueError(f"it was learned with {saved['identity']}, not with {self._identity}")
            self._control.load_state(saved["control"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._control.say(f"{self._state}: not restored, depths are learned anew ({error!r})")
        else:
            self._control.say(f"{self._state}: restored, the schedule is {self._control.schedule()}")

    def update(self, now: float, busy: bool) -> None:
        """Writes what is due.

        Args:
            now: Seconds on the clock of all calls.
            busy: Whether sequences are waiting for the next step.
        """
        if not busy or now - self._status_at >= _STATUS_SECONDS:
            self._status_at = now
            self._write_status()
        if now - self._state_at >= (_BUSY_SECONDS if busy else _IDLE_SECONDS):
            # what was just restored is not worth writing
            first, self._state_at = self._state_at == float("-inf"), now
            if not first:
                self._write_state()

    def close(self) -> None:
        """Writes both files."""
        self._write_status()
        self._write_state()

    def _write_status(self) -> None:
        if self._status is not None and not self._written(self._status, self._control.status()):
            self._status = None

    def _write_state(self) -> None:
        control = self._control
        content = {
            "schedule": control.schedule(),
            "identity": self._identity,
            "control": control.state(),
        }
        if self._state is not None and not self._written(self._state, content):
            self._state = None

    def _written(self, path: Path, content: dict[str, Any]) -> bool:
        """Replaces a file at once, so that no reader finds half of it, and returns whether it could."""
        beside = path.with_suffix(f".{os.getpid()}")  # several servers may share the directory
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(content), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            self._control.say(f"{path}: not written, and not tried again ({error})")
            return False
        return True
