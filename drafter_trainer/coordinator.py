"""Tells idle ranks when to train the drafter: while others decode, and while that costs these little.

The ranks share counters in a key-value store. No collective is used, and no rank waits for another.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist

from paceline.drafter_trainer.slowdown.neighbours import Neighbours, packed_change
from paceline.drafter_trainer.slowdown.pause_comparison import PauseComparison, PauseResult
from paceline.drafter_trainer.slowdown.training_price import WINDOW_SECONDS, TrainingPrice
from paceline.rollout.strategy import StepFeedback
from paceline.rollout.strategy.buckets import bucket_of

_HEARTBEAT_TIMEOUT_SECONDS = 60.0  # busy ranks that are silent for longer count as dead
_HEARTBEAT_INTERVAL_SECONDS = 1.0
_POLL_SECONDS = 0.02
_LOOK_SECONDS = 0.1  # between two looks at neighbours that train; a change costs the steps of one such time
_LOG_RATIO_UNITS = 1e6  # counters are integers
_WRITTEN = 10**9  # added to results, because a counter that was never written is 0
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

    Where ranks share a machine, training slows those that decode. Training ranks pause now and then; busy
    ones compare their decode steps (`PauseComparison`) and publish the results, from which every rank of the
    machine knows the price (`TrainingPrice`). Where it is too high, training stops for the rest of the step.

    Args:
        store: Key-value store shared by all ranks; None for a single rank, which is never idle while others
            are busy.
        world: Number of ranks.
        least_idle: Number of idle ranks from which on they train.
        clock: Function that returns the time in seconds, alike on all ranks of a machine; tests replace it.
        sleep: Function that waits for a number of seconds; tests replace it.
        max_slowdown: Largest share by which training may slow decode steps on the same machine.
        machine: Name of the machine; ranks with the same name are neighbours.

    Attributes:
        price: What training costs on this machine.
        held_back: Whether the price has ended this rank's training in this step.
        paused_seconds: Seconds of this step in which this rank's training paused.
    """

    def __init__(
        self,
        store: Store | None,
        world: int,
        least_idle: int = 1,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        *,
        max_slowdown: float = math.inf,
        machine: str = "",
    ) -> None:
        self._store, self._world, self._least_idle = store, world, least_idle
        self._clock, self._sleep, self._machine = clock, sleep, machine
        self._step = 0
        self._seen_beats = -1
        self._last_heard = self._last_sent = self._last_look = clock()
        self._problem: str | None = None
        self.price = TrainingPrice(max_slowdown)
        self._comparison = PauseComparison(WINDOW_SECONDS)
        self._results_read = 0
        self._began_training = -math.inf
        self._beside_busy = self.held_back = False
        self.paused_seconds = 0.0

    def begin(self, step: int, most_saved: float = 1.0) -> None:
        """Marks the rank as busy with the rollouts of RL step ``step``.

        Args:
            step: Number of the step.
            most_saved: Share of the decoding time that good drafts would save, see
                `paceline.rollout.strategy.Selector.most_saved`.
        """
        self.update_price()  # with results of the step before
        self._step = step
        self._seen_beats, self._last_heard = -1, self._clock()
        self.price.begin(step, most_saved)
        self._comparison = PauseComparison(WINDOW_SECONDS)
        self._results_read = 0
        self.held_back, self.paused_seconds = False, 0.0
        self._change(busy=1)

    def beat(self) -> None:
        """Sends a heartbeat while the rank decodes, at most one a second however often it is called."""
        now = self._clock()
        if now - self._last_sent >= _HEARTBEAT_INTERVAL_SECONDS:
            self._last_sent = now
            self._add("beats", 1)

    def decoded(self, step: StepFeedback) -> None:
        """Measures what training costs this busy rank; called after each decode step.

        Args:
            step: Measurements of the step.
        """
        if self._store is None:
            return
        now = self._clock()
        # drafts of other lengths are other work, and so are contexts of another bucket
        longest = max(step.drafted, default=0)
        work = (step.strategy, step.active, longest, bucket_of(step.active, step.context))
        self._comparison.add(now, work, step.total_seconds)
        interval = _LOOK_SECONDS if self._comparison.beside_training else _HEARTBEAT_INTERVAL_SECONDS
        if now - self._last_look < interval:
            return
        neighbours = self._neighbours()
        result = None if neighbours is None else self._comparison.look(now, neighbours)
        if result is not None:
            self._publish(result)

    def idle(self) -> None:
        """Marks the rank as idle: its rollouts are finished."""
        self._last_heard = self._clock()
        self._add("idle", 1)
        self._change(busy=-1)

    def may_train(self) -> bool:
        """Returns whether idle ranks may train now: enough are idle, and a busy one is still alive."""
        return self._idle_ranks() >= self._least_idle

    def others_busy(self) -> bool:
        """Returns whether some rank is still busy and, as far as this rank knows, alive."""
        return self._idle_ranks() >= 0

    def wait_until_training(self) -> None:
        """Blocks until idle ranks may train, or no rank is busy any more."""
        while self.others_busy() and not self.may_train():
            self._sleep(_POLL_SECONDS)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Counts the rank as training while the block runs, in which `must_stop` is called."""
        self._began_training, self._last_look = self._clock(), -math.inf
        self._change(training=1)
        try:
            yield
        finally:
            self._change(training=-1)

    def must_stop(self) -> bool:
        """Returns whether training must stop: no other rank is busy, or those beside it lose too much.

        It returns late while training has to pause.
        """
        if self._clock() - self._last_look >= _HEARTBEAT_INTERVAL_SECONDS:
            neighbours = self._neighbours()
            self._beside_busy = neighbours is not None and neighbours.busy > 0
            self.update_price()
        if self._beside_busy and self._pause_due():
            self._pause()
        self.held_back = self._beside_busy and self.price.too_high
        return self.held_back or not self.may_train()

    def update_price(self) -> None:
        """Adds the results to the price that busy ranks of the machine have published in this step."""
        while value := self._add(self._of_machine(f"result/{self._results_read + 1}"), 0):
            self._results_read += 1
            self.price.add((value - _WRITTEN) / _LOG_RATIO_UNITS)

    def take_problem(self) -> str | None:
        """Returns a one-line description of what went wrong, once; None if nothing did."""
        problem, self._problem = self._problem, None
        return problem

    def _pause_due(self) -> bool:
        return self.price.pause_due(self._clock(), self._began_training)

    def _pause(self) -> None:
        """Waits while training should pause, so that busy ranks see how they decode without it."""
        began = self._clock()
        self._change(paused=1)
        while self._pause_due() and self.may_train():
            self._sleep(_POLL_SECONDS)
        self._change(paused=-1)
        self.price.paused()
        self.paused_seconds += self._clock() - began

    def _publish(self, result: PauseResult) -> None:
        """Publishes the result of a pause, unless another busy rank has.

        Results of one pause are not independent: whatever else the machine did then is in all of them.
        """
        if self._add(self._of_machine(f"pause/{result.pause}"), 1) == 1:
            number = self._add(self._of_machine("results"), 1)
            value = _WRITTEN + round(result.log_ratio * _LOG_RATIO_UNITS)
            self._add(self._of_machine(f"result/{number}"), value)

    def _neighbours(self) -> Neighbours | None:
        """Returns what the ranks of this machine do; None without a reachable store."""
        self._last_look = self._clock()
        counter = self._add(self._of_machine("neighbours"), 0)
        return None if counter is None else Neighbours.unpack(counter)

    def _change(self, busy: int = 0, training: int = 0, paused: int = 0) -> None:
        """Tells the other ranks of this machine what this one begins or ends, see `packed_change`."""
        change = packed_change(busy=busy, training=training, paused=paused)
        self._add(self._of_machine("neighbours"), change)

    def _of_machine(self, name: str) -> str:
        return f"{self._machine}/{name}"

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
        if self._store is None:
            return None
        try:
            return self._store.add(f"{self._step}/{name}", amount)
        except (RuntimeError, ValueError, OSError) as error:
            self._store = None
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
