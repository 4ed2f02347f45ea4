"""An engine that serves requests as they come, and trains its drafter when none are there: for hosts whose
rollouts are servers.
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

from paceline.drafter_trainer.vocabulary import choose_vocabulary
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.models.initial import copy_weights
from paceline.rl.types import RankRollouts
from paceline.rollout import FinishReason, Request, Rollout, RolloutStats

_LEARNING_FAILURES = 3  # in a row, after which the drafter stays as it is


@dataclass(slots=True, eq=False)
class _Flight:
    """A request with who waits for it. The request is a copy: one object that is submitted twice is cancelled
    apart.
    """

    request: Request
    future: Future[Rollout]
    ended: bool = False  # `EngineServer.cancel_all` named it

    def answer(self, rollout: Rollout) -> None:
        """Hands over the rollout, unless whoever waited has cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(rollout)

    def fail(self, error: BaseException) -> None:
        """Hands over an error, unless there is an answer already or nobody waits."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineServer:
    """One engine in a thread of its own.

    Whatever happens to one request, or while the drafter learns, the others are served: a future that its
    owner cancels ends its request and nothing else. After weights that could not be taken over, requests fail
    with the reason until a whole update comes.

    Args:
        config: From `paceline.rl.integrations.host.host_config`. With ``drafter.schedule: always`` the
            drafter is trained on what was drawn until the next request comes, `pause` is called, or the
            passes are through.
        policy: The server's own copy of the policy.
        tokenizer: Its tokenizer.
        say: Where one line about a problem goes.

    Attributes:
        version: Of the weights, as `weights_loaded` was told.
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
        """Adds a request to what is decoded; it joins those in flight at their next step. Cancelling the
        future ends it.

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
        """Ends what is in flight or waits; each comes back as it is, CANCELLED. Returns how many there
        were.
        """
        with self._change:
            waiting = self._take()
            flying = len(self._flying)
            for flight in self._flying.values():
                flight.ended = True
        for flight in waiting:
            flight.answer(_cancelled(flight.request))
        return len(waiting) + flying

    def pause(self) -> None:
        """Returns once the engine does nothing; requests wait until `resume`."""
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
        """Whether requests must wait: for `resume`, or for the rest of an update's weights."""
        return self._paused or self._updating

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes over whole weights, some or all of an update's, until `weights_loaded` ends it. Waits for
        what is in flight; new
        requests wait meanwhile: none is decoded with some weights old and some new.

        An exception ends the update. Where it had replaced weights already, requests fail until an update has
        brought all of those anew.

        Raises:
            ValueError: for a name that the policy does not have, or another shape.
        """
        with self._change:
            self._updating = True
        try:
            with self._engine_free:
                copy_weights(self._noted(weights), self._policy)
        except BaseException as error:
            self._end_update(f"{type(error).__name__}: {error}" if self._replaced else None)
            raise

    def _noted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Passes weights on, and notes each once it is replaced."""
        for name, tensor in weights:
            yield name, tensor
            self._replaced.add(name)
            self._received.add(name)

    def weights_loaded(self, version: int) -> None:
        """All of an update's weights have come, and are decoded with from now on.

        Raises:
            ValueError: when an earlier update had failed and this one has not brought all that it had
                replaced.
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
        """Lets requests go on, or fail for ``broken``."""
        with self._change:
            self._broken = None if broken is None else " ".join(broken.split())
            self._received = set()
            self._updating = False
            self._change.notify_all()

    def close(self) -> None:
        """Ends the thread, once what is in flight is over. Requests that `pause` or an update holds back come
        back CANCELLED.
        """
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _run(self) -> None:
        """Serves until `close`; whatever ends it, nobody waits for ever."""
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
                with self._change:  # a pause or new weights may have come before the engine was ours
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
        """Empties the inbox of requests that somebody still waits for; with the condition held."""
        taken, self._inbox = self._inbox, []
        cancelled = [flight for flight in taken if flight.future.cancelled()]
        for flight in cancelled:
            flight.future.set_running_or_notify_cancel()  # tells who waits on it by concurrent.futures.wait
        return [flight for flight in taken if flight not in cancelled] if cancelled else taken

    def _decode(self, first: list[_Flight]) -> list[Rollout]:
        engine = self.worker.engine
        places = itertools.count()

        def take_off(flights: list[_Flight]) -> list[Request]:
            for flight in flights:
                self._flying[next(places)] = flight
            return [flight.request for flight in flights]

        def arrivals() -> list[Request]:
            with self._change:
                come = take_off([] if self._held else self._take())
                for flight in self._flying.values():
                    if flight.ended or flight.future.cancelled():
                        engine.cancel(flight.request)
            return come

        def over(index: int, rollout: Rollout) -> None:
            with self._change:
                flight = self._flying.pop(index)
            flight.answer(rollout)

        try:
            with self._change:
                requests = take_off(first)
            return engine.generate(requests, on_finish=over, arrivals=arrivals)
        except Exception as error:  # whatever it was, nobody must wait for ever
            with self._change:
                left = list(self._flying.values())
            for flight in left:
                flight.fail(error)
            return []
        finally:
            with self._change:
                self._flying.clear()

    def _learn(self, rollouts: list[Rollout]) -> None:
        """Trains the drafter on these until there is something else to do. A failure costs the drafter, never
        the serving.
        """
        whole = [r for r in rollouts if r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)]
        if not whole or self._config.drafter.schedule == "never" or self._failures >= _LEARNING_FAILURES:
            return
        try:
            self._train_drafter(whole)
            self._failures = 0
        except Exception as error:
            self._failures += 1
            last = "; it is not trained any more" if self._failures == _LEARNING_FAILURES else ""
            self._say(
                f"drafter: training failed ({type(error).__name__}: {' '.join(str(error).split())}){last}"
            )

    def _train_drafter(self, whole: list[Rollout]) -> None:
        drafter = self.drafter
        if drafter.missing:
            texts = [[*r.request.prompt_ids, *r.token_ids] for r in whole]
            vocabulary = choose_vocabulary(
                texts, self._config.drafter.draft_vocab_size, self.worker.engine.runner.vocab_size
            )
            drafter.create(vocabulary)
        if drafter.spot is None:
            return
        drafter.learn_from(RankRollouts([], whole, 0.0), [0.0] * len(whole))
        report = drafter.train(lambda: bool(self._inbox) or self._held or self._closed)
        if report.approved:
            drafter.spot.adopt([p.detach() for p in drafter.spot.approved.parameters()])
            problem = drafter.swap_in()
            if problem is not None:
                self._say(f"drafter: {problem}")


def _cancelled(request: Request) -> Rollout:
    return Rollout(request, [], [], FinishReason.CANCELLED, RolloutStats())
