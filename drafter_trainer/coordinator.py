"""Which ranks have nothing left to decode: over a key-value store, without a collective and without
waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

_PATIENCE_SECONDS = 60.0  # without a sign of life from any busy rank
_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.02
_CONNECT_SECONDS = 10.0


class Store(Protocol):
    """What is needed of `torch.distributed.Store`: a counter that returns its new value."""

    def add(self, key: str, amount: int) -> int: ...


class Coordinator:
    """Tells a rank when it may train the drafter and when it must stop.

    Each rank is busy (decoding), idle (done with its rollouts), or training. Ranks count themselves idle in
    the store; training may begin once ``least_idle`` are, and ends when all are, because the step then goes
    on. Busy ranks let themselves be heard once a
    second: if none is heard for a minute, or the store cannot be reached, there is no training in this step
        (in any step, once the
    store is lost), and the step's own collectives decide what becomes of the run.

    Args:
        store: Shared by all ranks; None for a rank alone, which is never idle while others are busy.
        world: Number of ranks.
        least_idle: Idle ranks from which on they train.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        store: Store | None,
        world: int,
        least_idle: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._world, self._least_idle, self._clock = store, world, least_idle, clock
        self._step = 0
        self._beats = -1
        self._heard = self._beaten = clock()
        self._lost = False
        self._problem: str | None = None

    def begin(self, step: int) -> None:
        """The rank is busy with the rollouts of this RL step."""
        self._step = step
        self._beats, self._heard = -1, self._clock()

    def beat(self) -> None:
        """The rank is still decoding; call as often as you like."""
        now = self._clock()
        if now - self._beaten >= _BEAT_SECONDS:
            self._beaten = now
            self._add("beats", 1)

    def idle(self) -> None:
        """The rank has finished its rollouts."""
        self._heard = self._clock()
        self._add("idle", 1)

    def may_train(self) -> bool:
        """Whether ranks train now: enough are idle, not all, and those that are busy are alive."""
        return self._idle_ranks() >= self._least_idle

    def waits(self) -> bool:
        """Whether some rank is still busy, and alive as far as is known."""
        return self._idle_ranks() >= 0

    def wait_until_training(self) -> None:
        """Returns once ranks train, or none is busy any more."""
        while self.waits() and not self.may_train():
            time.sleep(_POLL_SECONDS)

    def take_problem(self) -> str | None:
        """One line about what went wrong, once."""
        problem, self._problem = self._problem, None
        return problem

    def _idle_ranks(self) -> int:
        """How many ranks are idle while another is busy and alive; -1 where none is, or nothing is known."""
        count = self._add("idle", 0)
        return count if count is not None and count < self._world and self._alive() else -1

    def _alive(self) -> bool:
        beats = self._add("beats", 0)
        if beats is not None and beats != self._beats:
            self._beats, self._heard = beats, self._clock()
        return self._clock() - self._heard < _PATIENCE_SECONDS

    def _add(self, name: str, amount: int) -> int | None:
        if self._store is None or self._lost:
            return None
        try:
            return self._store.add(f"{self._step}/{name}", amount)
        except (RuntimeError, ValueError, OSError) as error:
            self._lost = True
            reason = (str(error).splitlines() or ["no reason given"])[0]
            self._problem = f"the ranks' store cannot be reached ({reason}); the drafter is no longer trained"
            return None


def connect_store(world: int) -> Store | None:
    """A connection of this rank's own to the store that the process group was made with, with a timeout of
    its own: a store that is gone must not hold up a step. None for a rank alone.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world == 1 or host is None or port is None:
        return None
    # a launcher that restarts its ranks keeps the store
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(
            host,
            int(port),
            is_master=False,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"paceline/{attempt}", store)
    except (RuntimeError, ValueError):
        return None
