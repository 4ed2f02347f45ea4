"""The rollout engine: admit → propose → verify → commit."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.rollout.api import FinishReason, Request, Rollout
from paceline.rollout.drafters.base import Drafter, VerifiedStep
from paceline.rollout.engine.batch_verification import verify_batch
from paceline.rollout.engine.entropies import drawn_entropies
from paceline.rollout.engine.kept_prefixes import KeptPrefixes
from paceline.rollout.engine.outputs import finished_rollout, snapshot
from paceline.rollout.engine.rejections import record_rejections
from paceline.rollout.engine.request_validation import (
    EngineBusyError,
    RequestLimits,
    problem_with,
    refused_rollout,
)
from paceline.rollout.engine.scheduler import Scheduler
from paceline.rollout.engine.speculation import Speculation
from paceline.rollout.engine.stop_condition import StopCondition, TextDecoder
from paceline.rollout.engine.timing import StepClock
from paceline.rollout.length_estimate import LengthEstimate
from paceline.rollout.model.graph_pool import CudaCapturer, PlainCapturer
from paceline.rollout.model.prefill import PromptLogits, prefill, split_prefill
from paceline.rollout.model.runner import Chunk, ModelRunner
from paceline.rollout.model.text_limits import TextLimit
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy import PLAIN, StepFeedback, Strategy
from paceline.rollout.trees import MOST_NODES, DraftTree, no_draft
from paceline.rollout.values import listed, shown, whole_number
from paceline.rollout.verify import Verifier

_NOT_FINITE = (
    "the policy's logits are not finite (NaN or infinite): check the last update's gradient norm and "
    "learning rate"
)
OnMark = Callable[[list[tuple[int, Rollout]]], Sequence[Request]]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decode step, for timelines: seconds since the call began, active sequences, what ran, tokens
    committed.
    """

    at: float
    active: int
    strategy: str
    committed: int
    feedback: StepFeedback


class RolloutEngine:
    """Decodes rollouts on the trainer's own parameters, losslessly, with speculation where measured times say
    it pays.

    Args:
        model: The trainer's unwrapped causal LM; docs/models.md lists the families that are tested.
        dtype: What to compute in; parameters are shared with the trainer where this is their dtype.
        max_slots: Sequences decoded together.
        max_context: Most tokens of prompt and completion together; fewer where the model sets a limit to its
            texts, with a warning.
        max_nodes: Most draft tokens of a sequence that one forward verifies.
        tap_layers: Layers whose inputs are kept for drafters and traces; empty keeps nothing.
        collect_traces: Attach a `DistillationTrace` to every rollout. Needs ``tap_layers``.
        collect_entropies: Note the entropy that each token was drawn under (`Rollout.entropies`).
        decode_text: Token ids → text, needed for stop strings only. It should keep special tokens, or a stop
            string that is one is
            never met: ``lambda ids: tokenizer.decode(ids, skip_special_tokens=False)``.
        kv_memory_bytes: Limit of the cache; None for the free memory. Where it is less than ``max_slots`` ×
            ``max_context`` needs, sequences are admitted by it, and preempted when they grow past it.
        prefill_tokens: Most prompt tokens that one forward reads; longer prompts are read in pieces.
        lengths: Predicts completion lengths for the order of admission; None learns them from what it sees.
        graphs: Decode through captured graphs (`paceline.rollout.model.graph_pool`); None does so on CUDA.
            Without CUDA, True pads to the same buckets and runs them as they are, for tests.
        budgets: How a strategy's draft tokens are shared out over the batch: ``uniform``, or ``length_aware``
            for more where more is left to decode.

    Attributes:
        policy_version: Counted up by `refresh_weights`.
        kept: Keys and values of ended sequences, for later calls; keeps nothing until its ``most_tokens`` is
            set.
        records: The decode steps of the last call.
        prefill_seconds: What reading prompts took in the last call.

    Raises:
        MemoryError: when the cache cannot hold one sequence of ``max_context``, with numbers.
        ValueError: for a model that cannot run in the engine.
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
        budgets: str = "uniform",
    ) -> None:
        if collect_traces and not tap_layers:
            raise ValueError("collect_traces needs tap_layers: pass default_tap_layers(num_layers)")
        if not 1 <= max_nodes <= MOST_NODES:
            raise ValueError(f"max_nodes is {max_nodes}: write 1 to {MOST_NODES}")
        self.max_nodes = max_nodes
        self.collect_traces, self.collect_entropies = collect_traces, collect_entropies
        self.runner = ModelRunner(
            model,
            dtype=dtype,
            slots=max_slots,
            capacity=self.capacity_for(max_context, max_nodes),
            tap_layers=tap_layers,
            limit_bytes=kv_memory_bytes,
        )
        self.max_context = _fitting(max_context, type(model).__name__, self.runner.limit)
        self.scheduler = Scheduler(max_slots, lengths)
        self.prefill_tokens = prefill_tokens
        self.policy_version = 0
        if model.device.type == "cuda" if graphs is None else graphs:
            capturer = CudaCapturer() if model.device.type == "cuda" else PlainCapturer()
            self.runner.capture_graphs(max_nodes + 1, capturer, precapture=model.device.type == "cuda")
        self.speculation = Speculation(self.runner, max_slots, max_nodes, budgets)
        self.records: list[StepRecord] = []
        self.prefill_seconds = 0.0
        self.kept = KeptPrefixes(self.runner.cache)
        self._prompts = PromptLogits()
        self._decode_text = decode_text
        self._cancelled: set[int] = set()
        self._stops: dict[int, StopCondition] = {}
        self._held = threading.Lock()
        self._device = model.device

    @staticmethod
    def capacity_for(max_context: int, max_nodes: int) -> int:
        """Tokens a slot must hold: the context, a whole draft past its end, and one place that padding may
        overwrite.
        """
        return max_context + max_nodes + 2

    @property
    def fusion(self) -> str:
        """Which decoder layers run fused, in one line."""
        return self.runner.view.fusion

    @property
    def drafters(self) -> dict[str, Drafter]:
        """Those there are, by name."""
        return self.speculation.drafters

    def add_drafter(self, drafter: Drafter) -> None:
        """Makes a drafter available to strategies, under its name: see `Speculation.add_drafter`."""
        with self._alone("add_drafter"):
            self.speculation.add_drafter(drafter)

    def use_strategy(self, strategy: Strategy | str) -> None:
        """Fixes what every step runs, or ``"adaptive"``: see `Speculation.use_strategy`."""
        with self._alone("use_strategy"):
            self.speculation.use_strategy(strategy)

    def adapt(self, arms: Sequence[Strategy] = (), **options: Any) -> None:
        """Chooses at each step from measured times: see `Speculation.adapt`."""
        with self._alone("adapt"):
            self.speculation.adapt(arms, **options)

    def verify_with(self, verifier: Verifier | str | None) -> None:
        """Verifies drawn drafts by this: see `Speculation.verify_with`."""
        with self._alone("verify_with"):
            self.speculation.verify_with(verifier)

    def refresh_weights(self) -> None:
        """Call after each update of the policy: renews the casts and packed forms that do not share memory
        with it.
        """
        with self._alone("refresh_weights"):
            self.runner.refresh_weights()
            self.kept.clear()
            self.policy_version += 1

    def prompt_states(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """How the policy reads prompts, for predictions about what it will say. Not while requests are in
        flight.

        Args:
            prompts: Token ids of each, at least one and fewer than the context.

        Returns:
            float32 [len(prompts), hidden], what the output head reads after the last token.
        """
        with self._alone("prompt_states"):
            found = [self.runner.prompt_states(part) for part in self._portions(prompts)]
        return torch.cat(found) if found else torch.empty(0, self.runner.hidden_size)

    def read_traces(self, rollouts: Sequence[Rollout]) -> None:
        """Attaches to finished rollouts that something else has decoded what ``collect_traces`` would have:
        one forward of the present policy over each. Needs ``tap_layers``; not while requests are in
        flight.
        """
        with self._alone("read_traces"):
            drawn = [(i, replace(r.request, resume=r)) for i, r in enumerate(rollouts) if r.token_ids]
            waiting = [SequenceState(request, i, self.max_context) for i, request in drawn]
            for part in self._portions([s.tokens[:-1] for s in waiting]):
                here, waiting = waiting[: len(part)], waiting[len(part) :]
                chunks = [
                    Chunk(slot, tokens, 0, s.num_prompt - 1)
                    for slot, (tokens, s) in enumerate(zip(part, here, strict=True))
                ]
                for pieces in split_prefill(chunks, self.prefill_tokens):
                    self.runner.prefill(pieces)
                for slot, s in enumerate(here):
                    rollouts[s.index].trace = self.runner.trace(s, slot)

    @contextmanager
    def _alone(self, call: str) -> Iterator[None]:
        """Holds the engine for one call, of whatever thread: two at once would share slots."""
        if not self._held.acquire(blocking=False):
            raise EngineBusyError(
                f"{call} while the engine serves another call: wait for it, and finish a stream or close() "
                "it; for more at once "
                "use more engines, or generate's arrivals"
            )
        try:
            yield
        finally:
            self._held.release()

    def _portions(self, texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """As many at a time as one forward reads and the cache, made ready for them, holds."""
        waiting, cache = list(texts), self.runner.cache
        while waiting:
            longest, count = 0, 0
            for text in waiting[: self.scheduler.slots]:
                longest = max(longest, len(text))
                tokens = sum(map(len, waiting[: count + 1]))
                if count and (tokens > self.prefill_tokens or count >= cache.slots_at(longest)):
                    break
                count += 1
            part, waiting = waiting[:count], waiting[count:]
            cache.reserve(longest, active=0, slots=count)
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
        """All rollouts, in the order of ``requests``. A failed request is a rollout whose finish reason says
        so.

        Args:
            requests: What to produce.
            on_step: Called after each decode step. An exception it raises ends the call and leaves the engine
                usable.
            token_budget: Stop when about so many tokens were committed in this call; what is unfinished comes
                back PAUSED.
            on_finish: Called with a request's index and its rollout as soon as it is over, while others are
                still decoded.
            segment: Most tokens of each request in this call; what is unfinished then comes back PAUSED.
            mark: Tokens of each request between calls of ``on_mark``.
            on_mark: Called with the indices of requests that have just come so far, and what there is of
                each; they go on. The
                requests that it returns are added to these: those that ``resume`` what they were shown branch
                    off there, and
                what the two have in common is copied, not read again.
            arrivals: Asked after each decode step for requests that have come meanwhile; they are added to
                these.

        Raises:
            EngineBusyError: while the engine serves another call, of this thread or another.
            ValueError: for limits that are none.
        """
        done: dict[int, Rollout] = {}
        with closing(self._run(requests, on_step, token_budget, segment, mark, on_mark, arrivals)) as run:
            for index, rollout in run:
                done[index] = rollout
                if on_finish is not None:
                    on_finish(index, rollout)
        return [done[index] for index in sorted(done)]

    def stream(self, requests: Sequence[Request], token_budget: int | None = None) -> Iterator[Rollout]:
        """Each rollout as it finishes.

        The engine serves nothing else until the stream is exhausted, closed (``close()``, or the end of a
        loop over it), or no longer referred to; what was unfinished then is dropped.

        Raises:
            EngineBusyError: at the first rollout, while the engine serves another call.
        """
        with closing(self._run(requests, None, token_budget)) as run:
            for _, rollout in run:
                yield rollout

    def cancel(self, request: Request) -> None:
        """Ends a request in flight before its next step, from a callback, the consumer of `stream`, or
        another thread.

        What it has comes back with finish reason CANCELLED. Does nothing for a request that has ended.
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
        _check_bounds(token_budget=token_budget, segment=segment, mark=mark)
        given = listed(requests)
        if given is None:
            raise ValueError(f"requests is {shown(requests)}: give a list of rollout.Request")
        with self._alone("generate or stream"):
            try:
                yield from self._decode(given, on_step, token_budget, segment, mark, on_mark, arrivals)
            finally:
                self._abandon()

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
        self.records = []
        self.prefill_seconds = 0.0
        self._cancelled.clear()
        started = time.perf_counter()
        left = float("inf") if token_budget is None else token_budget
        count = len(requests)
        yield from self._submit(requests, 0, segment, mark)
        while self.scheduler.has_work:
            if left <= 0:
                yield from self._pause()
                return
            yield from self._drop_cancelled()
            self._make_room()
            left -= self._admit()
            yield from self._retire()
            if self.scheduler.active:
                feedback, committed = self._step()
                left -= committed
                yield from self._retire()
                more = [*self._at_marks(on_mark), *((arrivals() or ()) if arrivals is not None else ())]
                yield from self._submit(more, count, segment, mark)
                count += len(more)
                at = time.perf_counter() - started
                record = StepRecord(at, feedback.active, str(feedback.strategy), committed, feedback)
                self.records.append(record)
                if on_step is not None:
                    on_step(record)

    def _at_marks(self, on_mark: OnMark | None) -> Sequence[Request]:
        """What branches off from sequences that have come to a mark."""
        there = [s for s in self.scheduler.active if s.at_mark()] if on_mark is not None else []
        return (
            (on_mark([(s.index, snapshot(s)) for s in there]) or ()) if there and on_mark is not None else ()
        )

    def _submit(
        self, requests: Sequence[Request], first: int, segment: int | None, mark: int | None
    ) -> Iterator[tuple[int, Rollout]]:
        accepted, limits = (
            [],
            RequestLimits(self.max_context, self.runner.vocab_size, self._decode_text is not None),
        )
        for index, request in enumerate(requests, first):
            problem = problem_with(request, limits)
            if problem is not None:
                yield index, refused_rollout(request, problem)
                continue
            limit = min(self.max_context, len(request.prompt_ids) + request.params.max_tokens)
            sequence = SequenceState(request, index, limit, segment, mark)
            self._stops[id(sequence)] = StopCondition(request.params, self._decode_text)
            accepted.append(sequence)
        if accepted:
            self.scheduler.submit(accepted)

    def _admit(self) -> int:
        """Prefills what fits and draws each one's next token. Returns how many tokens that committed."""
        before = len(self.scheduler.active)
        margin = self.max_nodes + 2
        admitted = list(self.scheduler.admit(lambda length: self.runner.cache.slots_at(length + margin)))
        if not admitted:
            return 0
        longest = max(len(s.tokens) for s in self.scheduler.active)
        self.runner.cache.reserve(longest + margin, active=before, slots=len(self.scheduler.active))
        clock = StepClock(self._device)
        held = self._prompts.held(self.scheduler.active[:before])
        logits = prefill(
            self.runner, admitted, self.prefill_tokens, held, self.scheduler.active[:before], self.kept
        )
        self._prompts.keep(admitted, logits)
        clock.mark()
        self.prefill_seconds += sum(clock.seconds())
        for _, sequence in admitted:
            if len(sequence.tokens) == sequence.num_prompt:
                self.speculation.observe(sequence, sequence.num_prompt)
        sequences = [sequence for _, sequence in admitted]
        steps = [s.stats.steps for s in sequences]
        _, committed = self._verify(sequences, logits, no_draft(len(sequences), self._device))
        for sequence, count in zip(sequences, steps, strict=True):
            sequence.stats.steps = count
        return committed

    def _make_room(self) -> None:
        """Puts sequences back where the longest one's next step leaves no room for all."""
        active = self.scheduler.active
        if not active:
            return
        keep = self.runner.cache.slots_at(max(len(s.tokens) for s in active) + self.max_nodes + 2)
        if keep >= len(active):
            return
        back = {id(s): s for s in self.scheduler.preempt(keep)}
        self._vacate(lambda s: id(s) in back)
        for sequence in back.values():
            sequence.stats.preempted += 1
        self.scheduler.submit(back.values())

    def _step(self) -> tuple[StepFeedback, int]:
        """One decode step of every active sequence: the strategy's feedback and how many tokens were
        committed.
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
        )
        self.speculation.selector.record(feedback)
        return feedback, committed

    def _forward(self, active: list[SequenceState], draft: DraftTree) -> torch.Tensor:
        last = torch.tensor([[s.tokens[-1]] for s in active], device=self._device)
        tokens = torch.cat([last, draft.tokens], dim=1)
        self.runner.cache.reserve(
            max(len(s.tokens) for s in active) + tokens.shape[1], len(active), len(active)
        )
        starts = [len(s.tokens) - 1 for s in active]
        return self.runner.decode(tokens, (draft.lengths + 1).tolist(), starts, draft.parents)

    def _verify(
        self, active: list[SequenceState], logits: torch.Tensor, draft: DraftTree, strategy: Strategy = PLAIN
    ) -> tuple[list[int], int]:
        """Verifies and commits; a sequence whose logits are not finite fails alone. Returns accepted and
        committed counts.
        """
        outcome = verify_batch(active, logits, draft, self.speculation.verifier)
        if self.collect_traces:
            record_rejections(active, draft, outcome.paths, self.runner.cache.taps, self.runner.hidden_size)
        if draft.parents is not None:
            self.runner.cache.keep_paths([len(s.tokens) for s in active], outcome.paths)
        step = VerifiedStep(active, strategy, draft, logits, outcome.paths)
        self.speculation.verified(step)
        entropies = drawn_entropies(active, logits, draft, outcome.paths) if self.collect_entropies else None
        committed = 0
        for row, sequence in enumerate(active):
            sequence.stats.drafted += int(draft.lengths[row])
            sequence.stats.accepted += len(outcome.paths[row])
            sequence.stats.steps += 1
            if outcome.finite[row]:
                count = self._commit(sequence, outcome.tokens[row], outcome.logprobs[row])
                committed += count
                sequence.entropies += entropies[row][:count] if entropies is not None else ()
            else:
                sequence.finish, sequence.error = FinishReason.FAILED, _NOT_FINITE
        return [len(path) for path in outcome.paths], committed

    def _commit(self, sequence: SequenceState, tokens: list[int], logprobs: list[float]) -> int:
        """Appends tokens up to the one that ends the sequence. Returns how many."""
        stop = self._stops[id(sequence)]
        count = 0
        for token, logprob in zip(tokens, logprobs, strict=True):
            sequence.append(token, logprob, self.policy_version)
            count += 1
            sequence.finish = stop.reason(sequence)
            if sequence.finish is not None:
                break
        self.speculation.observe(sequence, count)
        return count

    def _retire(self) -> Iterator[tuple[int, Rollout]]:
        """Hands out finished sequences and closes the holes they leave."""
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
        """Takes sequences out of their slots; the last ones move into the holes."""
        cache = self.runner.cache
        for slot, last in self.scheduler.retire(ended):
            self.speculation.vacate(slot, last)
            if slot != last:
                cache.copy_slot(last, [slot], min(len(self.scheduler.active[slot].tokens), cache.span))

    def _drop_cancelled(self) -> Iterator[tuple[int, Rollout]]:
        """Ends what `cancel` named, in a slot or waiting."""
        if not self._cancelled:
            return
        named = self._cancelled.copy()
        for sequence in (*self.scheduler.active, *self.scheduler.waiting):
            if id(sequence.request) in named:
                sequence.finish = FinishReason.CANCELLED
        self._cancelled -= named
        gone = [s for s in self.scheduler.waiting if s.finish is FinishReason.CANCELLED]
        for sequence in gone:
            self.scheduler.waiting.remove(sequence)
            yield sequence.index, self._finished(sequence, slot=None)
        yield from self._retire()

    def _pause(self) -> Iterator[tuple[int, Rollout]]:
        """Hands out everything unfinished, resumable."""
        for sequence in (*self.scheduler.active, *self.scheduler.waiting):
            sequence.finish = FinishReason.PAUSED
        waiting = list(self.scheduler.waiting)
        self.scheduler.waiting.clear()
        for sequence in waiting:
            yield sequence.index, self._finished(sequence, slot=None)
        yield from self._retire()

    def _finished(self, sequence: SequenceState, slot: int | None) -> Rollout:
        if sequence.finish is FinishReason.FAILED and slot is not None:
            self.runner.cache.clear_slot(slot)
        elif slot is not None:
            self.kept.keep(sequence, slot)
        self.speculation.forget(sequence)
        del self._stops[id(sequence)]
        whole = sequence.finish in (FinishReason.STOP, FinishReason.LENGTH)
        traced = self.collect_traces and whole and slot is not None
        return finished_rollout(
            sequence, self.runner.trace(sequence, slot) if traced and slot is not None else None
        )

    def _abandon(self) -> None:
        """Frees every slot: nothing of one call is left for the next, also when its consumer stopped
        early.
        """
        for slot, sequence in enumerate(self.scheduler.active):
            self.speculation.vacate(slot, slot)
            self.speculation.forget(sequence)
        for sequence in self.scheduler.waiting:  # those that were preempted are known to drafters too
            self.speculation.forget(sequence)
        self.scheduler.clear()
        self._stops.clear()
        self._prompts.clear()


def _check_bounds(token_budget: int | None, **counts: int | None) -> None:
    for name, value, least in (
        ("token_budget", token_budget, 0),
        *((name, value, 1) for name, value in counts.items()),
    ):
        number = None if value is None else whole_number(value)
        if value is not None and (number is None or number < least):
            raise ValueError(f"{name} is {shown(value)}: write a whole number, at least {least}, or None")


def _fitting(max_context: int, name: str, limit: TextLimit | None) -> int:
    if limit is None or max_context <= limit.tokens:
        return max_context
    warnings.warn(
        f"{name} {limit.reason} past {limit.tokens} tokens: texts end there, not at "
        f"max_context={max_context}",
        RuntimeWarning,
        stacklevel=3,
    )
    return limit.tokens
