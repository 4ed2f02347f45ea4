"""Serves requests as they arrive with one engine, and trains its drafter when there are none.

This is for hosts whose rollouts run in servers.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.models.initial import copy_weights
from paceline.rl.types import RankRollouts
from paceline.rollout import FinishReason, Request, Rollout, RolloutStats

_MAX_TRAINING_FAILURES = 3  # in a row, after which the drafter is no longer trained


@dataclass(slots=True, eq=False)
class _Flight:
    """A request with the future of its rollout.

    The request is a copy, so that an object that is submitted twice can be cancelled once.
    """

    request: Request
    future: Future[Rollout]
    cancelled: bool = False  # by `EngineServer.cancel_all`

    def answer(self, rollout: Rollout) -> None:
        """Resolves the future with the rollout, unless its owner has cancelled it."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(rollout)

    def fail(self, error: BaseException) -> None:
        """Resolves the future with an error, unless it is resolved or cancelled already."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineServer:
    """Runs one engine in a thread of its own.

    A failing request or a failure in the drafter's training does not affect other requests. A future that its
    owner cancels ends its own request only. After an update of weights that failed, requests fail with the
    reason until a whole update arrives.

    Args:
        config: The recipe from `paceline.rl.integrations.host.host_config`. With ``drafter.schedule: always``
            the drafter is trained on finished rollouts until the next request arrives, `pause` is called, or
            the passes are finished.
        policy: The server's own copy of the policy.
        tokenizer: The policy's tokenizer.
        say: Receives one line for each problem.

    Attributes:
        version: The version of the weights that `weights_loaded` was given.
    """

    def __init__(
        self, config: RunConfig, policy: PreTrainedModel, tokenizer: Any, say: Callable[[str], None]
    ) -> None:
        self.worker = RolloutWorker(config, policy, tokenizer)
        self.drafter = RankDrafter(config, policy, self.worker)
        self.version = 0
        self._config, self._policy, self._say = config, policy, say
        self._inbox: list[_Flight] = []
        self._flying: dict[int, _Flight] = {}  # those that are decoded, by their place in the engine's call
        self._change = threading.Condition()
        self._engine_free = threading.Lock()  # held while the engine decodes, or its weights change
        self._paused = self._updating = self._closed = False
        # weights that this update, or those since the last whole one, have replaced
        self._replaced: set[str] = set()
        self._received: set[str] = set()  # those that this update has
        self._broken: str | None = None  # why the weights are neither the old nor the new ones
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="paceline-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Rollout]:
        """Submits a request; it joins those in flight at their next decode step.

        Returns:
            The future of its rollout. Cancelling it ends the request.

        Raises:
            RuntimeError: when the server is closed.
        """
        flight = _Flight(replace(request), Future())
        with self._change:
            if self._closed:
                raise RuntimeError("the server is closed")
            self._inbox.append(flight)
            self._change.notify_all()
        return flight.future

    def cancel_all(self) -> int:
        """Ends all requests, which return what they have with reason CANCELLED. Returns their number."""
        with self._change:
            waiting = self._take()
            flying = len(self._flying)
            for flight in self._flying.values():
                flight.cancelled = True
        for flight in waiting:
            flight.answer(_cancelled(flight.request))
        return len(waiting) + flying

    def pause(self) -> None:
        """Waits until the engine is idle; requests then wait until `resume`."""
        with self._change:
            self._paused = True
        with self._engine_free:
            return

    def resume(self) -> None:
        """Goes on after `pause`."""
        with self._change:
            self._paused = False
            self._change.notify_all()

    @property
    def _held(self) -> bool:
        """Whether requests must wait, for `resume` or for the rest of an update's weights."""
        return self._paused or self._updating

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads some or all of an update's whole weights; `weights_loaded` ends the update.

        It waits for requests in flight, and new ones wait until the update ends, so that none is decoded with
        a mix of old and new weights. An exception ends the update. If it had replaced weights already,
        requests fail until an update has sent all of these again.

        Args:
            weights: Names and whole tensors.

        Raises:
            ValueError: for a name that the policy does not have, or a tensor of another shape.
        """
        with self._change:
            self._updating = True
        try:
            with self._engine_free:
                copy_weights(self._recorded(weights), self._policy)
        except BaseException as error:
            self._end_update(f"{type(error).__name__}: {error}" if self._replaced else None)
            raise

    def _recorded(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields weights, and records the name of each once it is replaced."""
        for name, tensor in weights:
            yield name, tensor
            self._replaced.add(name)
            self._received.add(name)

    def weights_loaded(self, version: int) -> None:
        """Ends an update of weights; requests are decoded with them from now on.

        Args:
            version: The version of the weights.

        Raises:
            ValueError: when an earlier update failed and this one lacks weights that it had replaced.
        """
        missing = self._replaced - self._received
        if self._broken is not None and missing:
            self._end_update(self._broken)
            raise ValueError(
                f"an update failed ({self._broken}), and this one lacks {sorted(missing)[0]}: send all "
                "weights"
            )
        try:
            with self._engine_free:
                self.worker.engine.refresh_weights()
                self.version = version
        except BaseException as error:
            self._end_update(f"{type(error).__name__}: {error}")
            raise
        self._replaced = set()
        self._end_update(None)

    def _end_update(self, broken: str | None) -> None:
        """Lets requests continue, or fail with the reason ``broken``."""
        with self._change:
            self._broken = None if broken is None else " ".join(broken.split())
            self._received = set()
            self._updating = False
            self._change.notify_all()

    def close(self) -> None:
        """Finishes the requests in flight and ends the thread.

        Requests that wait for `resume` or for an update return CANCELLED.
        """
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        """Serves until `close`; whatever ends the thread, every future is resolved."""
        problem: BaseException = RuntimeError("the server is closed")
        try:
            self._serve()
        except BaseException as error:
            problem = error
            self._say(f"the engine's thread ended: {type(error).__name__}: {error}")
        finally:
            with self._change:
                self._closed = True
                left = self._take()
            for flight in left:
                flight.fail(RuntimeError(f"the server has ended: {problem}"))

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or (self._inbox and not self._held))
                if self._closed and (not self._inbox or self._held):
                    held = self._take()
                    break
            with self._engine_free:
                with self._change:  # a pause or new weights may have come before the lock was acquired
                    first = [] if self._held else self._take()
                if first and self._broken is None:
                    self._learn(self._decode(first))
            if self._broken is not None:
                for flight in first:
                    flight.fail(
                        RuntimeError(
                            f"the last update of weights failed ({self._broken}): send all weights again"
                        )
                    )
        for flight in held:
            flight.answer(_cancelled(flight.request))

    def _take(self) -> list[_Flight]:
        """Empties the inbox and returns the requests that are not cancelled. Call it with the lock held."""
        taken, self._inbox = self._inbox, []
        cancelled = [flight for flight in taken if flight.future.cancelled()]
        for flight in cancelled:
            flight.future.set_running_or_notify_cancel()  # concurrent.futures.wait needs it
        return [flight for flight in taken if flight not in cancelled] if cancelled else taken

    def _decode(self, first: list[_Flight]) -> list[Rollout]:
        engine = self.worker.engine
        places = itertools.count()

        def start(flights: list[_Flight]) -> list[Request]:
            for flight in flights:
                self._flying[next(places)] = flight
            return [flight.request for flight in flights]

        def arrivals() -> list[Request]:
            with self._change:
                arrived = start([] if self._held else self._take())
                for flight in self._flying.values():
                    if flight.cancelled or flight.future.cancelled():
                        engine.cancel(flight.request)
            return arrived

        def finished(index: int, rollout: Rollout) -> None:
            with self._change:
                flight = self._flying.pop(index)
            flight.answer(rollout)

        try:
            with self._change:
                requests = start(first)
            return engine.generate(requests, on_finish=finished, arrivals=arrivals)
        except Exception as error:  # every future must be resolved
            with self._change:
                left = list(self._flying.values())
            for flight in left:
                flight.fail(error)
            return []
        finally:
            with self._change:
                self._flying.clear()

    def _learn(self, rollouts: list[Rollout]) -> None:
        """Trains the drafter on finished rollouts until a request arrives; a failure is only reported."""
        finished = [r for r in rollouts if r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)]
        if (
            not finished
            or self._config.drafter.schedule == "never"
            or self._failures >= _MAX_TRAINING_FAILURES
        ):
            return
        try:
            self._train_drafter(finished)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            last = "; it is not trained any more" if self._failures == _MAX_TRAINING_FAILURES else ""
            self._say(
                f"drafter: training failed ({type(error).__name__}: {' '.join(str(error).split())}){last}"
            )

    def _train_drafter(self, finished: list[Rollout]) -> None:
        drafter, batch = self.drafter, RankRollouts([], finished, 0.0)
        if drafter.missing:
            drafter.create(drafter.choose_vocabulary(batch.texts))
        if drafter.spot is None:
            return
        drafter.learn_from(batch, [0.0] * len(finished))
        report = drafter.train(lambda: bool(self._inbox) or self._held or self._closed)
        if report.approved:
            problem = drafter.serve_approved()
            if problem is not None:
                self._say(f"drafter: {problem}")


def _cancelled(request: Request) -> Rollout:
    return Rollout(request, [], [], FinishReason.CANCELLED, RolloutStats())
