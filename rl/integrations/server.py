"""An engine that serves requests as they come, and trains its drafter when none are there: for hosts whose rollouts are servers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import torch
from transformers import PreTrainedModel

from drafter_trainer.vocabulary import choose_vocabulary
from rl.config import RunConfig
from rl.groups import RankRollouts
from rl.rollouts import RolloutWorker
from rl.starting import copy_weights
from rollout import FinishReason, Request, Rollout, RolloutStats

_Flight = tuple[Request, "Future[Rollout]"]


class EngineServer:
    """One engine in a thread of its own.

    Args:
        config: From `rl.integrations.host.host_config`. With ``drafter.schedule: always`` the drafter is trained on what was drawn
            until the next request comes, `pause` is called, or the passes are through.
        policy: The server's own copy of the policy.
        tokenizer: Its tokenizer.
        say: Where one line about a problem goes.

    Attributes:
        version: Of the weights, as `weights_loaded` was told.
    """

    def __init__(self, config: RunConfig, policy: PreTrainedModel, tokenizer: Any, say: Callable[[str], None]) -> None:
        self.worker = RolloutWorker(config, policy, tokenizer)
        self.version = 0
        self._config, self._policy, self._say = config, policy, say
        self._inbox: list[_Flight] = []
        self._flying: list[_Flight] = []
        self._change = threading.Condition()
        self._engine_free = threading.Lock()  # held while the engine decodes, or its weights change
        self._paused = self._updating = self._closed = False
        self._thread = threading.Thread(target=self._serve, name="paceline-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Rollout]:
        """Adds a request to what is decoded; it joins those in flight at their next step."""
        future: Future[Rollout] = Future()
        with self._change:
            if self._closed:
                raise RuntimeError("the server is closed")
            self._inbox.append((request, future))
            self._change.notify_all()
        return future

    def cancel_all(self) -> int:
        """Ends what is in flight or waits; each comes back as it is, CANCELLED. Returns how many there were."""
        with self._change:
            waiting = self._take()
        for request, future in waiting:
            future.set_result(_cancelled(request))
        flights = list(self._flying)
        for request, _ in flights:
            self.worker.engine.cancel(request)
        return len(waiting) + len(flights)

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
        """Takes over whole weights, some or all of an update's, until `weights_loaded` ends it. Waits for what is in flight; new
        requests wait meanwhile: none is decoded with some weights old and some new.

        Raises:
            KeyError: for a name that the policy does not have.
        """
        with self._change:
            self._updating = True
        with self._engine_free:
            copy_weights(iter(weights), self._policy)

    def weights_loaded(self, version: int) -> None:
        """All of an update's weights have come, and are decoded with from now on."""
        with self._engine_free:
            self.worker.engine.refresh_weights()
            self.version = version
        with self._change:
            self._updating = False
            self._change.notify_all()

    def close(self) -> None:
        """Ends the thread, once what is in flight is over."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or (self._inbox and not self._held))
                if self._closed and not self._inbox:
                    return
            with self._engine_free:
                with self._change:  # a pause or new weights may have come before the engine was ours
                    first = [] if self._held else self._take()
                if first:
                    self._learn(self._decode(first))

    def _take(self) -> list[_Flight]:
        """Empties the inbox; with the condition held."""
        taken, self._inbox = self._inbox, []
        return taken

    def _decode(self, first: list[_Flight]) -> list[Rollout]:
        flying = self._flying = list(first)

        def arrivals() -> list[Request]:
            with self._change:
                come = [] if self._held else self._take()
            flying.extend(come)
            return [request for request, _ in come]

        def over(index: int, rollout: Rollout) -> None:
            flying[index][1].set_result(rollout)

        try:
            return self.worker.engine.generate([r for r, _ in first], on_finish=over, arrivals=arrivals)
        except Exception as error:  # whatever it was, nobody must wait for ever
            for _, future in flying:
                if not future.done():
                    future.set_exception(error)
            return []
        finally:
            self._flying = []

    def _learn(self, rollouts: list[Rollout]) -> None:
        """Trains the drafter on these until there is something else to do."""
        whole = [r for r in rollouts if r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)]
        if not whole or self._config.drafter.schedule == "never":
            return
        worker = self.worker
        if worker.needs_drafter:
            texts = [[*r.request.prompt_ids, *r.token_ids] for r in whole]
            vocabulary = choose_vocabulary(texts, self._config.drafter.draft_vocab_size, worker.engine.runner.vocab_size)
            worker.create_drafter(vocabulary)
        if worker.spot is None:
            return
        worker.learn_from(RankRollouts([], whole, 0.0), [0.0] * len(whole))
        report = worker.train_drafter(lambda: bool(self._inbox) or self._held or self._closed)
        if report.approved:
            worker.spot.adopt([p.detach() for p in worker.spot.approved.parameters()])
            problem = worker.take_over_drafter()
            if problem is not None:
                self._say(f"drafter: {problem}")


def _cancelled(request: Request) -> Rollout:
    return Rollout(request, [], [], FinishReason.CANCELLED, RolloutStats())
