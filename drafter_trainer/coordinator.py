"""Tracks which ranks have finished decoding, so that idle ranks may train the drafter.

The ranks share counters in a key-value store. No collective is used, and no rank waits for another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

_HEARTBEAT_TIMEOUT_SECONDS = 60.0  # busy ranks that are silent for longer count as dead
_HEARTBEAT_INTERVAL_SECONDS = 1.0
_POLL_SECONDS = 0.02
_CONNECT_TIMEOUT_SECONDS = 10.0


class Store(Protocol):
    """The part of `torch.distributed.Store` that is used here."""

    def add(self, key: str, amount: int) -> int:
        """Adds ``amount`` to the counter ``key`` and returns its new value."""


class Coordinator:
    """Tells a rank when it may train the drafter and when it must stop.

    Each rank is busy (decoding), idle (its rollouts are finished), or training. A rank counts itself as idle
    in the store. Training may begin once ``least_idle`` ranks are idle, and it ends when all are, because the
    RL step then continues. Busy ranks send a heartbeat once a second; while none has arrived for a minute,
    nothing is trained. Once the store cannot be reached, nothing is trained for the rest of the run. In both
    cases the step's own collectives decide whether the run continues.

    Args:
        store: Key-value store shared by all ranks; None for a single rank, which is never idle while others
            are busy.
        world: Number of ranks.
        least_idle: Number of idle ranks from which on they train.
        clock: Function that returns the time in seconds; tests replace it.
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
        self._seen_beats = -1
        self._last_heard = self._last_sent = clock()
        self._store_lost = False
        self._problem: str | None = None

    def begin(self, step: int) -> None:
        """Marks the rank as busy with the rollouts of RL step ``step``."""
        self._step = step
        self._seen_beats, self._last_heard = -1, self._clock()

    def beat(self) -> None:
        """Sends a heartbeat while the rank decodes, at most one a second however often it is called."""
        now = self._clock()
        if now - self._last_sent >= _HEARTBEAT_INTERVAL_SECONDS:
            self._last_sent = now
            self._add("beats", 1)

    def idle(self) -> None:
        """Marks the rank as idle: its rollouts are finished."""
        self._last_heard = self._clock()
        self._add("idle", 1)

    def may_train(self) -> bool:
        """Returns whether idle ranks may train now: enough are idle, and a busy one is still alive."""
        return self._idle_ranks() >= self._least_idle

    def others_busy(self) -> bool:
        """Returns whether some rank is still busy and, as far as this rank knows, alive."""
        return self._idle_ranks() >= 0

    def wait_until_training(self) -> None:
        """Blocks until idle ranks may train, or no rank is busy any more."""
        while self.others_busy() and not self.may_train():
            time.sleep(_POLL_SECONDS)

    def take_problem(self) -> str | None:
        """Returns a one-line description of what went wrong, once; None if nothing did."""
        problem, self._problem = self._problem, None
        return problem

    def _idle_ranks(self) -> int:
        """Returns how many ranks are idle while another is busy and alive.

        Returns -1 if no rank is busy and alive, or if the store cannot be reached.
        """
        count = self._add("idle", 0)
        return count if count is not None and count < self._world and self._alive() else -1

    def _alive(self) -> bool:
        """Returns whether a busy rank sent a heartbeat within `_HEARTBEAT_TIMEOUT_SECONDS`."""
        beats = self._add("beats", 0)
        if beats is not None and beats != self._seen_beats:
            self._seen_beats, self._last_heard = beats, self._clock()
        return self._clock() - self._last_heard < _HEARTBEAT_TIMEOUT_SECONDS

    def _add(self, name: str, amount: int) -> int | None:
        """Adds to a counter of this step and returns its value; None without a reachable store."""
        if self._store is None or self._store_lost:
            return None
        try:
            return self._store.add(f"{self._step}/{name}", amount)
        except (RuntimeError, ValueError, OSError) as error:
            self._store_lost = True
            reason = (str(error).splitlines() or ["no reason given"])[0]
            self._problem = (
                f"the ranks' key-value store cannot be reached ({reason}); the drafter is no longer trained"
            )
            return None


def connect_store(world: int) -> Store | None:
    """Opens another connection to the key-value store that the process group was created with.

    The connection has its own short timeout, so that a store that has gone away does not delay a step.

    Args:
        world: Number of ranks.

    Returns:
        The store; None for a single rank, or where the store cannot be reached.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if world == 1 or host is None or port is None:
        return None
    # a launcher keeps the store when it restarts its ranks, so counters carry the number of the restart
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(
            host,
            int(port),
            is_master=False,
            timeout=timedelta(seconds=_CONNECT_TIMEOUT_SECONDS),
            wait_for_workers=False,
        )
        return dist.PrefixStore(f"paceline/{attempt}", store)
    except (RuntimeError, ValueError):
        return None
