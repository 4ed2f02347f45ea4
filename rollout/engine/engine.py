"""The rollout engine: admit → propose → verify → commit."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.rollout.api import FinishReason, Request, Rollout
from paceline.rollout.drafters.base import Drafter, VerifiedStep
from paceline.rollout.engine.batch_verification import verify_batch
from paceline.rollout.engine.entropies import drawn_entropies
from paceline.rollout.engine.outputs import finished_rollout, snapshot
from paceline.rollout.engine.rejections import record_rejections
from paceline.rollout.engine.request_validation import (
    EngineBusyError,
    RequestLimits,
    failed_rollout,
    validate_request,
)
from paceline.rollout.engine.scheduler import Scheduler
from paceline.rollout.engine.speculation import Speculation
from paceline.rollout.engine.stop_condition import StopCondition, TextDecoder
from paceline.rollout.engine.timing import StepClock
from paceline.rollout.graphs.graph_pool import CudaCapturer, PlainCapturer
from paceline.rollout.length_estimate import LengthEstimate
from paceline.rollout.model.kept_prefixes import KeptPrefixes
from paceline.rollout.model.prefill import PromptLogits, prefill, split_prefill
from paceline.rollout.model.runner import Chunk, ModelRunner
from paceline.rollout.native import upload
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy import PLAIN, StepFeedback, Strategy
from paceline.rollout.text_limits import TextLimit
from paceline.rollout.trees import MAX_NODES, DraftTree, no_draft
from paceline.rollout.values import as_int, as_list, short_repr
from paceline.rollout.verify import Verifier

_NOT_FINITE = (
    "the policy's logits are not finite (NaN or infinite): check the gradient norm of the last update and "
    "lower the learning rate"
)
# receives (index, snapshot) of each request that reached a mark; returns requests to add
OnMark = Callable[[list[tuple[int, Rollout]]], Sequence[Request]]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Records one decode step, for timelines.

    Attributes:
        at: Seconds since the call began.
        active: Number of active sequences.
        strategy: Strategy that ran, as text.
        committed: Number of tokens committed.
        feedback: Measurements that the strategy selector received.
    """

    at: float
    active: int
    strategy: str
    committed: int
    feedback: StepFeedback


class RolloutEngine:
    """Decodes rollouts losslessly on the trainer's own parameters, and speculates where that saves time.

    Args:
        model: The trainer's unwrapped causal LM; docs/models.md lists the tested families.
        dtype: Compute dtype. Parameters of this dtype are shared with the trainer.
        max_slots: Maximum number of sequences decoded together.
        max_context: Maximum number of tokens of prompt and completion together. It is lowered, with a
            warning, if the model limits the length of its texts.
        max_nodes: Maximum number of draft tokens per sequence that one forward verifies.
        tap_layers: Layers whose inputs are kept for drafters and traces; empty keeps nothing.
        collect_traces: Whether to attach a `DistillationTrace` to every rollout. Needs ``tap_layers``.
        collect_entropies: Whether to record the entropy that each token was sampled under
            (`Rollout.entropies`).
        decode_text: Function from token ids to text, needed only for stop strings. It should keep special
            tokens, or a stop string that is one never matches: ``lambda ids: tokenizer.decode(ids,
            skip_special_tokens=False)``.
        kv_memory_bytes: Memory limit of the KV cache; None for the free memory, of a GPU what the plan of its
            memory leaves. If it is less than ``max_slots`` × ``max_context`` needs, fewer sequences are
            admitted, and sequences are preempted when they outgrow it.
        prefill_tokens: Maximum number of prompt tokens that one forward reads; longer prompts are read in
            pieces.
        lengths: Predictor of completion lengths for the order of admission; None learns from observed
            lengths.
        graphs: Whether to decode through captured graphs (`paceline.rollout.graphs.graph_pool`); None does so
            on CUDA. Without CUDA, True pads to the same buckets but runs them uncaptured, for tests.
        other_memory: Bytes that the trainer and drafters take of a GPU at their peak, by what takes them;
            None leaves them a fifth of it (`paceline.rollout.model.memory_plan`).
        budgets: Rule that distributes a strategy's draft tokens over the batch: ``uniform``, or
            ``length_aware`` to give more to sequences with more left to decode.

    Attributes:
        policy_version: Number of calls of `refresh_weights` so far.
        kept: Keys and values of finished sequences, kept for later calls. It keeps nothing until its
            ``most_tokens`` is set.
        records: Decode steps of the last call.
        prefill_seconds: Seconds spent in the last call on reading prompts and sampling the first tokens after
            them.

    Raises:
        MemoryError: The cache cannot hold one sequence of ``max_context``, or a GPU what is planned on it;
            the message has the numbers.
        ValueError: The model cannot run in the engine, or an argument is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_slots: int = 32,
        max_context: int = 1024,
        max_nodes: int = 8,
        tap_layers: Sequence[int] = (),
        collect_traces: bool = False,
        collect_entropies: bool = False,
        decode_text: TextDecoder | None = None,
        kv_memory_bytes: int | None = None,
        prefill_tokens: int = 512,
        lengths: LengthEstimate | None = None,
        graphs: bool | None = None,
        other_memory: Mapping[str, int] | None = None,
        budgets: str = "uniform",
    ) -> None:
        if collect_traces and not tap_layers:
            raise ValueError(
                "collect_traces needs tap_layers: write tap_layers=default_tap_layers(num_layers)"
            )
        if not 1 <= max_nodes <= MAX_NODES:
            raise ValueError(f"max_nodes is {max_nodes}: write an integer from 1 to {MAX_NODES}")
        self.max_nodes = max_nodes
        self.collect_traces, self.collect_entropies = collect_traces, collect_entropies
        self.runner = ModelRunner(
            model,
            dtype=dtype,
            slots=max_slots,
            capacity=self.capacity_for(max_context, max_nodes),
            tap_layers=tap_layers,
            limit_bytes=kv_memory_bytes,
            prefill_tokens=prefill_tokens,
            others=other_memory,
        )
        self.max_context = _supported_context(max_context, type(model).__name__, self.runner.limit)
        self.scheduler = Scheduler(max_slots, lengths)
        self.prefill_tokens = prefill_tokens
        self.policy_version = 0
        if model.device.type == "cuda" if graphs is None else graphs:
            capturer = CudaCapturer(model.device) if model.device.type == "cuda" else PlainCapturer()
            self.runner.capture_graphs(max_nodes + 1, capturer, precapture=model.device.type == "cuda")
        self.speculation = Speculation(self.runner, max_slots, max_nodes, budgets)
        self.records: list[StepRecord] = []
        self.prefill_seconds = 0.0
        self.kept = KeptPrefixes(self.runner.cache)
        self._prompts = PromptLogits()
        self._decode_text = decode_text
        self._cancelled: set[int] = set()
        self._stops: dict[int, StopCondition] = {}
        self._lock = threading.Lock()
        self._device = model.device

    @staticmethod
    def capacity_for(max_context: int, max_nodes: int) -> int:
        """Returns the tokens a slot must hold: the context, a draft past its end, and a place for padding."""
        return max_context + max_nodes + 2

    @property
    def fusion(self) -> str:
        """A one-line summary of the decoder layers that run fused."""
        return self.runner.view.fusion

    @property
    def drafters(self) -> dict[str, Drafter]:
        """The available drafters by name."""
        return self.speculation.drafters

    def add_drafter(self, drafter: Drafter) -> None:
        """Makes a drafter available to strategies under its name; see `Speculation.add_drafter`."""
        with self._exclusive("add_drafter"):
            self.speculation.add_drafter(drafter)

    def use_strategy(self, strategy: Strategy | str) -> None:
        """Fixes every step's strategy, or adapts it (``"adaptive"``); see `Speculation.use_strategy`."""
        with self._exclusive("use_strategy"):
            self.speculation.use_strategy(strategy)

    def adapt(self, arms: Sequence[Strategy] = (), **options: Any) -> None:
        """Selects each step's strategy from measured times; see `Speculation.adapt`."""
        with self._exclusive("adapt"):
            self.speculation.adapt(arms, **options)

    def verify_with(self, verifier: Verifier | str | None) -> None:
        """Sets the verifier of sampled drafts; see `Speculation.verify_with`."""
        with self._exclusive("verify_with"):
            self.speculation.verify_with(verifier)

    def refresh_weights(self) -> None:
        """Makes the engine use the policy's updated weights; call it after each update.

        It renews casts and packed copies, which do not share memory with the policy, and drops kept prefixes.
        """
        with self._exclusive("refresh_weights"):
            self.runner.refresh_weights()
            self.kept.clear()
            self.policy_version += 1

    def prompt_states(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns the policy's hidden state after each prompt, for predictions about its completion.

        Args:
            prompts: Token ids of each prompt, at least one and fewer than the context.

        Returns:
            Inputs of the output head after the last token, float32 [len(prompts), hidden].

        Raises:
            EngineBusyError: Requests are in flight.
        """
        with self._exclusive("prompt_states"):
            states = [self.runner.prompt_states(part) for part in self._prefill_batches(prompts)]
        return torch.cat(states) if states else torch.empty(0, self.runner.hidden_size)

    def read_traces(self, rollouts: Sequence[Rollout]) -> None:
        """Attaches the traces of ``collect_traces`` to finished rollouts that another engine has decoded.

        It runs one forward of the current policy over each rollout. Needs ``tap_layers``.

        Args:
            rollouts: Rollouts whose ``trace`` is set.

        Raises:
            EngineBusyError: Requests are in flight.
        """
        with self._exclusive("read_traces"):
            completed = [(i, replace(r.request, resume=r)) for i, r in enumerate(rollouts) if r.token_ids]
            waiting = [SequenceState(request, i, self.max_context) for i, request in completed]
            for part in self._prefill_batches([s.tokens[:-1] for s in waiting]):
                batch, waiting = waiting[: len(part)], waiting[len(part) :]
                chunks = [
                    Chunk(slot, tokens, 0, s.num_prompt - 1)
                    for slot, (tokens, s) in enumerate(zip(part, batch, strict=True))
                ]
                for pieces in split_prefill(chunks, self.prefill_tokens):
                    self.runner.prefill(pieces)
                for slot, s in enumerate(batch):
                    rollouts[s.index].trace = self.runner.trace(s, slot)

    @contextmanager
    def _exclusive(self, call: str) -> Iterator[None]:
        """Reserves the engine for one call across all threads: two calls at once would share slots."""
        if not self._lock.acquire(blocking=False):
            raise EngineBusyError(
                f"{call} was called while the engine serves another call: wait for it (exhaust or close() a "
                "stream), pass more requests through generate's arrivals, or use another engine"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _prefill_batches(self, texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Splits texts into batches that one forward reads and the cache holds.

        The cache is laid out for each batch before it is yielded.
        """
        waiting, cache = list(texts), self.runner.cache
        while waiting:
            count = 1
            for more in range(2, min(len(waiting), self.scheduler.slots) + 1):
                lengths = [len(text) for text in waiting[:more]]
                if sum(lengths) > self.prefill_tokens or not cache.fits(lengths):
                    break
                count = more
            part, waiting = waiting[:count], waiting[count:]
            cache.reserve([len(text) for text in part], active=0)
            yield part

    def generate(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None = None,
        token_budget: int | None = None,
        on_finish: Callable[[int, Rollout], None] | None = None,
        segment: int | None = None,
        mark: int | None = None,
        on_mark: OnMark | None = None,
        arrivals: Callable[[], Sequence[Request]] | None = None,
    ) -> list[Rollout]:
        """Decodes requests and returns their rollouts in the order of ``requests``.

        A request that fails does not raise: its rollout has finish reason FAILED.

        Args:
            requests: Requests to serve.
            on_step: Function called after each decode step. An exception that it raises ends the call and
                leaves the engine usable.
            token_budget: Approximate number of tokens to commit in this call; unfinished requests then come
                back PAUSED.
            on_finish: Function called with a request's index and rollout as soon as it is finished, while
                others are still decoded.
            segment: Maximum number of tokens per request in this call; requests that reach it come back
                PAUSED.
            mark: Number of tokens of each request between calls of ``on_mark``.
            on_mark: Function called with the index and a snapshot of each request that has just reached a
                mark; these requests continue. The requests it returns are added to the call. One that resumes
                a snapshot branches off there, and its shared prefix is copied instead of being read again.
            arrivals: Function called after each decode step that returns newly arrived requests, which are
                added to the call.

        Raises:
            EngineBusyError: The engine is serving another call, on this thread or another.
            ValueError: A limit is not a valid integer.
        """
        rollouts: dict[int, Rollout] = {}
        with closing(self._run(requests, on_step, token_budget, segment, mark, on_mark, arrivals)) as run:
            for index, rollout in run:
                rollouts[index] = rollout
                if on_finish is not None:
                    on_finish(index, rollout)
        return [rollouts[index] for index in sorted(rollouts)]

    def stream(self, requests: Sequence[Request], token_budget: int | None = None) -> Iterator[Rollout]:
        """Yields each rollout as it finishes.

        The engine serves nothing else until the stream is exhausted, closed (by ``close()`` or at the end of
        a loop over it) or garbage-collected; requests that are unfinished then are dropped.

        Args:
            requests: Requests to serve.
            token_budget: Approximate number of tokens to commit; unfinished requests then come back PAUSED.

        Raises:
            EngineBusyError: Raised at the first rollout if the engine is serving another call.
        """
        with closing(self._run(requests, None, token_budget)) as run:
            for _, rollout in run:
                yield rollout

    def cancel(self, request: Request) -> None:
        """Ends a request in flight before its next step.

        It may be called from a callback, the consumer of `stream` or another thread. The request's tokens so
        far come back with finish reason CANCELLED. Does nothing for a request that has finished.
        """
        self._cancelled.add(id(request))

    def _run(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None,
        token_budget: int | None,
        segment: int | None = None,
        mark: int | None = None,
        on_mark: OnMark | None = None,
        arrivals: Callable[[], Sequence[Request]] | None = None,
    ) -> Generator[tuple[int, Rollout], None, None]:
        """Validates the call, decodes under the engine's lock and frees all slots at the end."""
        _check_bounds(token_budget=token_budget, segment=segment, mark=mark)
        request_list = as_list(requests)
        if request_list is None:
            raise ValueError(f"requests is {short_repr(requests)}: pass a list of paceline.rollout.Request")
        with self._exclusive("generate or stream"):
            try:
                yield from self._decode(request_list, on_step, token_budget, segment, mark, on_mark, arrivals)
            finally:
                self._release_all()

    def _decode(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None,
        token_budget: int | None,
        segment: int | None,
        mark: int | None,
        on_mark: OnMark | None,
        arrivals: Callable[[], Sequence[Request]] | None,
    ) -> Iterator[tuple[int, Rollout]]:
        """Runs the admit → propose → verify → commit loop; yields (request index, rollout)."""
        self.records = []
        self.prefill_seconds = 0.0
        self._cancelled.clear()
        started = time.perf_counter()
        budget_left = float("inf") if token_budget is None else token_budget
        num_requests = len(requests)
        yield from self._submit(requests, 0, segment, mark)
        while self.scheduler.has_work:
            if budget_left <= 0:
                yield from self._pause()
                return
            yield from self._drop_cancelled()
            self._make_room()
            budget_left -= self._admit()
            yield from self._retire()
            if self.scheduler.active:
                feedback, committed = self._step()
                budget_left -= committed
                yield from self._retire()
                added = [*self._at_marks(on_mark), *((arrivals() or ()) if arrivals is not None else ())]
                yield from self._submit(added, num_requests, segment, mark)
                num_requests += len(added)
                at = time.perf_counter() - started
                record = StepRecord(at, feedback.active, str(feedback.strategy), committed, feedback)
                self.records.append(record)
                if on_step is not None:
                    on_step(record)

    def _at_marks(self, on_mark: OnMark | None) -> Sequence[Request]:
        """Returns the requests that branch off from sequences which have just reached a mark."""
        reached = [s for s in self.scheduler.active if s.pass_mark()] if on_mark is not None else []
        return (
            (on_mark([(s.index, snapshot(s)) for s in reached]) or ())
            if reached and on_mark is not None
            else ()
        )

    def _submit(
        self, requests: Sequence[Request], first: int, segment: int | None, mark: int | None
    ) -> Iterator[tuple[int, Rollout]]:
        """Queues the valid requests; yields a failed rollout for each invalid one."""
        accepted, limits = (
            [],
            RequestLimits(self.max_context, self.runner.vocab_size, self._decode_text is not None),
        )
        for index, request in enumerate(requests, first):
            problem = validate_request(request, limits)
            if problem is not None:
                yield index, failed_rollout(request, problem)
                continue
            limit = min(self.max_context, len(request.prompt_ids) + request.params.max_tokens)
            sequence = SequenceState(request, index, limit, segment, mark)
            self._stops[id(sequence)] = StopCondition(request.params, self._decode_text)
            accepted.append(sequence)
        if accepted:
            self.scheduler.submit(accepted)

    def _admit(self) -> int:
        """Prefills the sequences that fit and samples a token of each; returns how many it committed."""
        before = len(self.scheduler.active)
        margin = self.max_nodes + 2
        admitted = list(
            self.scheduler.admit(lambda lengths: self.runner.cache.fits([n + margin for n in lengths]))
        )
        if not admitted:
            return 0
        self.runner.cache.reserve([len(s.tokens) + margin for s in self.scheduler.active], active=before)
        clock = StepClock(self._device)
        held = self._prompts.held(self.scheduler.active[:before])
        logits = prefill(
            self.runner, admitted, self.prefill_tokens, held, self.scheduler.active[:before], self.kept
        )
        self._prompts.keep(admitted, logits)
        sequences = [sequence for _, sequence in admitted]
        self.speculation.observe([(s, s.num_prompt) for s in sequences if len(s.tokens) == s.num_prompt])
        steps = [s.stats.steps for s in sequences]
        _, committed = self._verify(sequences, logits, no_draft(len(sequences), self._device))
        clock.mark()
        self.prefill_seconds += sum(clock.seconds())
        for sequence, count in zip(sequences, steps, strict=True):
            sequence.stats.steps = count
        return committed

    def _make_room(self) -> None:
        """Preempts sequences if the next step of the longest one would leave too few slots for all."""
        active = self.scheduler.active
        if not active:
            return
        margin = self.max_nodes + 2
        lengths = sorted((len(s.tokens) + margin for s in active), reverse=True)
        keep = len(active)
        while keep > 1 and not self.runner.cache.fits(lengths[:keep]):
            keep -= 1
        if keep == len(active):
            return
        preempted = {id(s): s for s in self.scheduler.preempt(keep)}
        self._vacate(lambda s: id(s) in preempted)
        for sequence in preempted.values():
            sequence.stats.preempted += 1
        self.scheduler.submit(preempted.values())

    def _step(self) -> tuple[StepFeedback, int]:
        """Runs one decode step of every active sequence.

        Returns:
            Measurements for the strategy selector, and the number of tokens committed.
        """
        active = list(self.scheduler.active)
        context = max(len(s.tokens) for s in active)
        strategy = self.speculation.selector.choose(len(active), context)
        clock = StepClock(self._device)
        draft = self.speculation.propose(strategy, active)
        clock.mark()
        logits = self._forward(active, draft)
        clock.mark()
        accepted, committed = self._verify(active, logits, draft, strategy)
        clock.mark()
        drafting, forward, rest = clock.seconds()
        feedback = StepFeedback(
            strategy=strategy,
            active=len(active),
            context=context,
            drafted=draft.lengths.tolist(),
            accepted=accepted,
            committed=committed,
            draft_seconds=drafting,
            forward_seconds=forward,
            total_seconds=drafting + forward + rest,
            caught_up=self.speculation.caught_up(strategy),
        )
        self.speculation.selector.record(feedback)
        return feedback, committed

    def _forward(self, active: list[SequenceState], draft: DraftTree) -> torch.Tensor:
        """Returns the target's logits after each sequence's last token and each of its draft nodes."""
        last = upload([[s.tokens[-1]] for s in active], self._device)
        tokens = torch.cat([last, draft.tokens], dim=1) if draft.nodes else last
        self.runner.cache.reserve([len(s.tokens) + tokens.shape[1] for s in active], active=len(active))
        starts = [len(s.tokens) - 1 for s in active]
        return self.runner.decode(tokens, (draft.lengths + 1).tolist(), starts, draft.parents)

    def _verify(
        self, active: list[SequenceState], logits: torch.Tensor, draft: DraftTree, strategy: Strategy = PLAIN
    ) -> tuple[list[int], int]:
        """Verifies drafts and commits tokens; a sequence whose logits are not finite fails alone.

        Returns:
            The number of accepted draft tokens of each sequence, and the number of tokens committed in total.
        """
        outcome = verify_batch(active, logits, draft, self.speculation.verifier)
        if self.collect_traces:
            record_rejections(active, draft, outcome, self.runner.cache, self.runner.hidden_size)
        if draft.parents is not None:
            self.runner.cache.keep_paths([len(s.tokens) for s in active], outcome.paths)
        step = VerifiedStep(active, strategy, draft, logits, outcome.paths)
        self.speculation.verified(step)
        entropies = drawn_entropies(active, logits, draft, outcome.paths) if self.collect_entropies else None
        committed, drafted = [], draft.lengths.tolist()
        for row, sequence in enumerate(active):
            sequence.stats.drafted += drafted[row]
            sequence.stats.accepted += len(outcome.paths[row])
            sequence.stats.steps += 1
            if outcome.finite[row]:
                count = self._commit(sequence, outcome.tokens[row], outcome.logprobs[row])
                committed.append((sequence, count))
                sequence.entropies += entropies[row][:count] if entropies is not None else ()
            else:
                sequence.finish, sequence.error = FinishReason.FAILED, _NOT_FINITE
        self.speculation.observe(committed)
        return [len(path) for path in outcome.paths], sum(count for _, count in committed)

    def _commit(self, sequence: SequenceState, tokens: list[int], logprobs: list[float]) -> int:
        """Appends tokens up to the one that ends the sequence; returns how many were appended."""
        stop = self._stops[id(sequence)]
        count = 0
        for token, logprob in zip(tokens, logprobs, strict=True):
            sequence.append(token, logprob, self.policy_version)
            count += 1
            sequence.finish = stop.reason(sequence)
            if sequence.finish is not None:
                break
        return count

    def _retire(self) -> Iterator[tuple[int, Rollout]]:
        """Yields the rollouts of finished sequences and closes the holes they leave in the slots."""
        ended = [(slot, s) for slot, s in enumerate(self.scheduler.active) if s.finish is not None]
        if not ended:
            return
        rollouts = [(s.index, self._finished(s, slot)) for slot, s in ended]
        for _, sequence in ended:
            if sequence.finish in (FinishReason.STOP, FinishReason.LENGTH):
                self.scheduler.lengths.observe(sequence.request, len(sequence.tokens) - sequence.num_prompt)
        self._vacate(lambda s: s.finish is not None)
        yield from rollouts

    def _vacate(self, ended: Callable[[SequenceState], bool]) -> None:
        """Removes sequences from their slots and moves the last ones into the holes."""
        cache = self.runner.cache
        for slot, last in self.scheduler.retire(ended):
            self.speculation.vacate(slot, last)
            cache.vacate(slot, last, len(self.scheduler.active[slot].tokens) if slot != last else 0)

    def _drop_cancelled(self) -> Iterator[tuple[int, Rollout]]:
        """Yields the rollouts of cancelled requests, whether they hold a slot or are waiting."""
        if not self._cancelled:
            return
        cancelled = self._cancelled.copy()
        for sequence in (*self.scheduler.active, *self.scheduler.waiting):
            if id(sequence.request) in cancelled:
                sequence.finish = FinishReason.CANCELLED
        self._cancelled -= cancelled
        dropped = [s for s in self.scheduler.waiting if s.finish is FinishReason.CANCELLED]
        for sequence in dropped:
            self.scheduler.waiting.remove(sequence)
            yield sequence.index, self._finished(sequence, slot=None)
        yield from self._retire()

    def _pause(self) -> Iterator[tuple[int, Rollout]]:
        """Yields every unfinished request as a paused rollout."""
        for sequence in (*self.scheduler.active, *self.scheduler.waiting):
            sequence.finish = FinishReason.PAUSED
        waiting = list(self.scheduler.waiting)
        self.scheduler.waiting.clear()
        for sequence in waiting:
            yield sequence.index, self._finished(sequence, slot=None)
        yield from self._retire()

    def _finished(self, sequence: SequenceState, slot: int | None) -> Rollout:
        """Releases what is kept for a finished sequence and returns its rollout."""
        if sequence.finish is FinishReason.FAILED and slot is not None:
            self.runner.cache.clear_slot(slot)
        elif slot is not None:
            self.kept.keep(sequence, slot)
        self.speculation.forget(sequence)
        del self._stops[id(sequence)]
        finished = sequence.finish in (FinishReason.STOP, FinishReason.LENGTH)
        traced = self.collect_traces and finished and slot is not None
        return finished_rollout(
            sequence, self.runner.trace(sequence, slot) if traced and slot is not None else None
        )

    def _release_all(self) -> None:
        """Frees every slot, so that no sequence outlives a call whose consumer stopped early."""
        for slot, sequence in enumerate(self.scheduler.active):
            self.speculation.vacate(slot, slot)
            self.speculation.forget(sequence)
        for sequence in self.scheduler.waiting:  # drafters also know the preempted ones
            self.speculation.forget(sequence)
        self.scheduler.clear()
        self._stops.clear()
        self._prompts.clear()


def _check_bounds(token_budget: int | None, **counts: int | None) -> None:
    """Raises a ValueError if a limit is neither None nor an integer in its range."""
    for name, value, least in (
        ("token_budget", token_budget, 0),
        *((name, value, 1) for name, value in counts.items()),
    ):
        number = None if value is None else as_int(value)
        if value is not None and (number is None or number < least):
            raise ValueError(f"{name} is {short_repr(value)}: write an integer of at least {least}, or None")


def _supported_context(max_context: int, name: str, limit: TextLimit | None) -> int:
    """Returns the context that the model supports, with a warning if it is less than the one asked for."""
    if limit is None or max_context <= limit.tokens:
        return max_context
    warnings.warn(
        f"max_context is {max_context}, but {name} {limit.reason} past {limit.tokens} tokens: texts end "
        f"there; write max_context={limit.tokens}",
        RuntimeWarning,
        stacklevel=3,
    )
    return limit.tokens
