"""The rollout engine: admit → propose → verify → commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rollout.api import DistillationTrace, FinishReason, Request, Rollout
from rollout.calibration import calibrate_forward
from rollout.drafters.base import DraftContext, Drafter
from rollout.model_runner import ModelRunner
from rollout.scheduler import Scheduler
from rollout.sequence import SequenceState
from rollout.stopping import StopCondition, TextDecoder
from rollout.strategy import PLAIN, ElasticSelector, FixedSelector, Selector, StepFeedback, Strategy
from rollout.trees.chain import DraftTree, no_draft
from rollout.verification import verify_batch


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One decode step, for timelines: seconds since the call began, active sequences, what ran, tokens committed."""

    at: float
    active: int
    strategy: str
    committed: int
    feedback: StepFeedback


class RolloutEngine:
    """Decodes rollouts on the trainer's own parameters, losslessly, with speculation where measured times say it pays.

    Args:
        model: The trainer's unwrapped causal LM (any transformers decoder without attention sinks).
        dtype: What to compute in; parameters are shared with the trainer where this is their dtype.
        max_slots: Sequences decoded together.
        max_context: Most tokens of prompt and completion together.
        max_depth: Longest draft.
        tap_layers: Layers whose inputs are kept for drafters and traces; empty keeps nothing.
        collect_traces: Attach a `DistillationTrace` to every rollout. Needs ``tap_layers``.
        decode_text: Token ids → text, needed for stop strings only.
        kv_memory_bytes: Limit of the cache; None for the free memory.

    Raises:
        MemoryError: when the cache does not fit, with numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_slots: int = 32,
        max_context: int = 1024,
        max_depth: int = 6,
        tap_layers: Sequence[int] = (),
        collect_traces: bool = False,
        decode_text: TextDecoder | None = None,
        kv_memory_bytes: int | None = None,
    ) -> None:
        if collect_traces and not tap_layers:
            raise ValueError("collect_traces needs tap_layers: pass default_tap_layers(num_layers)")
        self.max_context = max_context
        self.max_depth = max_depth
        self.collect_traces = collect_traces
        self.runner = ModelRunner(
            model,
            dtype=dtype,
            slots=max_slots,
            capacity=self.capacity_for(max_context, max_depth),
            tap_layers=tap_layers,
            limit_bytes=kv_memory_bytes,
        )
        self.scheduler = Scheduler(max_slots)
        self.drafters: dict[str, Drafter] = {}
        self.selector: Selector = FixedSelector()
        self.records: list[StepRecord] = []
        self._decode_text = decode_text
        self._device = model.device

    @staticmethod
    def capacity_for(max_context: int, max_depth: int) -> int:
        """Tokens a slot must hold: the context, a whole draft past its end, and one position that padding may overwrite."""
        return max_context + max_depth + 2

    def add_drafter(self, drafter: Drafter) -> None:
        """Makes a drafter available to strategies, under its name."""
        if drafter.needs_taps and not self.runner.tap_layers:
            raise ValueError(f"the {drafter.name} drafter reads hidden states: build the engine with tap_layers")
        self.drafters[drafter.name] = drafter
        self.selector.drafter_changed(drafter.name)

    def use_strategy(self, strategy: Strategy | str) -> None:
        """Fixes what every step runs, or ``"adaptive"`` to decide from measured times (a calibration takes a few seconds)."""
        if strategy == "adaptive":
            forward = calibrate_forward(self.runner, self.scheduler.slots, self.max_depth + 1)
            self.selector = ElasticSelector(
                tuple(self.drafters), self.max_depth, forward, lambda name, bucket: forward(bucket, 1) / 20
            )
            return
        fixed = PLAIN if strategy == "plain" else strategy
        if not isinstance(fixed, Strategy):
            raise ValueError(f"strategy {strategy!r} is unknown: write 'adaptive', 'plain' or a Strategy")
        if fixed.drafter is not None and fixed.drafter not in self.drafters:
            raise ValueError(f"strategy {fixed} names a drafter that was not added; there are: {sorted(self.drafters)}")
        if fixed.depth > self.max_depth:
            raise ValueError(f"strategy {fixed} is deeper than the engine's max_depth of {self.max_depth}")
        self.selector = FixedSelector(fixed)

    def refresh_weights(self) -> None:
        """Call after each update of the policy: renews the casts and packed forms that do not share memory with it."""
        self.runner.refresh_weights()

    def generate(self, requests: Sequence[Request], on_step: Callable[[StepRecord], None] | None = None) -> list[Rollout]:
        """All rollouts, in the order of ``requests``. A failed request is a rollout whose finish reason says so."""
        done: list[Rollout | None] = [None] * len(requests)
        for index, rollout in self._run(requests, on_step):
            done[index] = rollout
        return [rollout for rollout in done if rollout is not None]

    def stream(self, requests: Sequence[Request]) -> Iterator[Rollout]:
        """Each rollout as it finishes."""
        for _, rollout in self._run(requests, None):
            yield rollout

    def _run(self, requests: Sequence[Request], on_step: Callable[[StepRecord], None] | None) -> Iterator[tuple[int, Rollout]]:
        self.records = []
        started = time.perf_counter()
        try:
            yield from self._submit(requests)
            while self.scheduler.has_work:
                yield from self._admit()
                if self.scheduler.active:
                    feedback, committed = self._step()
                    yield from self._retire()
                    at = time.perf_counter() - started
                    record = StepRecord(at, feedback.active, str(feedback.strategy), committed, feedback)
                    self.records.append(record)
                    if on_step is not None:
                        on_step(record)
        finally:
            self._abandon()

    def _submit(self, requests: Sequence[Request]) -> Iterator[tuple[int, Rollout]]:
        for index, request in enumerate(requests):
            problem = self._problem(request)
            limit = min(self.max_context, len(request.prompt_ids) + request.params.max_tokens)
            sequence = SequenceState(request, index, limit)
            if problem is None:
                self.scheduler.waiting.append(sequence)
            else:
                yield index, self._finished(sequence, slot=None, error=problem)

    def _problem(self, request: Request) -> str | None:
        """Why a request cannot be served, or None."""
        prompt = request.prompt_ids
        if len(prompt) == 0:
            return "the prompt is empty: give at least one token"
        if len(prompt) >= self.max_context:
            return f"the prompt has {len(prompt)} tokens, the context {self.max_context}: shorten it or raise rollout.max_context"
        if min(prompt) < 0 or max(prompt) >= self.runner.vocab_size:
            return f"the prompt has a token outside 0..{self.runner.vocab_size - 1}: was it made by another tokenizer?"
        if request.params.stop_strings and self._decode_text is None:
            return "stop_strings need an engine built with decode_text (the tokenizer's decode)"
        return None

    def _admit(self) -> Iterator[tuple[int, Rollout]]:
        """Prefills what fits. The samples of one prompt admitted together share a forward."""
        prefilled: dict[tuple[int, ...], tuple[int, torch.Tensor]] = {}
        siblings: dict[tuple[int, ...], list[int]] = {}
        admitted: list[SequenceState] = []
        cache = self.runner.cache
        for slot, sequence in self.scheduler.admit():
            prompt = tuple(sequence.tokens)
            cache.reserve(len(prompt) + self.max_depth + 1, active=slot)
            if prompt in prefilled:
                siblings.setdefault(prompt, []).append(slot)
            else:
                prefilled[prompt] = (slot, self.runner.prefill(torch.tensor(prompt, device=self._device), slot))
            self._observe(sequence, sequence.num_prompt)
            admitted.append(sequence)
        for prompt, slots in siblings.items():
            cache.copy_slot(prefilled[prompt][0], slots, len(prompt))
        first_logits = [prefilled[tuple(sequence.tokens)][1] for sequence in admitted]
        if admitted:
            self._verify(admitted, torch.stack(first_logits)[:, None], no_draft(len(admitted), self._device))
            for sequence in admitted:
                sequence.stats.steps = 0
            yield from self._retire()

    def _step(self) -> tuple[StepFeedback, int]:
        """One decode step of every active sequence: the strategy's feedback and how many tokens were committed."""
        active = list(self.scheduler.active)
        context = max(len(s.tokens) for s in active)
        strategy = self.selector.choose(len(active), context)
        begin = time.perf_counter()
        draft = self._propose(strategy, active)
        proposed = time.perf_counter()
        logits = self._forward(active, draft)
        if self._device.type == "cuda":  # the forward's own time is what the selector needs
            torch.cuda.synchronize()
        forwarded = time.perf_counter()
        accepted, committed = self._verify(active, logits, draft)
        feedback = StepFeedback(
            strategy=strategy,
            active=len(active),
            context=context,
            width=logits.shape[1],
            drafted=draft.lengths.tolist(),
            accepted=accepted,
            draft_seconds=proposed - begin,
            forward_seconds=forwarded - proposed,
            total_seconds=time.perf_counter() - begin,
        )
        self.selector.record(feedback)
        return feedback, committed

    def _propose(self, strategy: Strategy, active: list[SequenceState]) -> DraftTree:
        depth = min(strategy.depth, max(s.remaining for s in active) - 1)
        if strategy.drafter is None or depth <= 0:
            return no_draft(len(active), self._device)
        taps = None
        if self.runner.tap_layers:
            cache = self.runner.cache
            taps = cache.taps.view(*cache.taps.shape[:2], -1, self.runner.hidden_size)
        draft = self.drafters[strategy.drafter].propose(DraftContext(active, taps), depth).to(self._device)
        room = torch.tensor([s.remaining - 1 for s in active], device=self._device)
        draft.lengths = torch.minimum(draft.lengths, room)
        return draft.narrow(int(draft.lengths.max()))

    def _forward(self, active: list[SequenceState], draft: DraftTree) -> torch.Tensor:
        last = torch.tensor([[s.tokens[-1]] for s in active], device=self._device)
        first = torch.tensor([[len(s.tokens) - 1] for s in active], device=self._device)
        tokens = torch.cat([last, draft.tokens], dim=1)
        positions = first + torch.arange(tokens.shape[1], device=self._device)
        self.runner.cache.reserve(max(len(s.tokens) for s in active) + tokens.shape[1], active=len(active))
        return self.runner.decode(tokens, positions)

    def _verify(self, active: list[SequenceState], logits: torch.Tensor, draft: DraftTree) -> tuple[list[int], int]:
        """Verifies and commits; a sequence whose logits are not finite fails alone. Returns accepted and committed counts."""
        outcome = verify_batch(active, logits, draft)
        committed = 0
        for row, sequence in enumerate(active):
            sequence.stats.drafted += int(draft.lengths[row])
            sequence.stats.accepted += outcome.accepted[row]
            sequence.stats.steps += 1
            if outcome.finite[row]:
                committed += self._commit(sequence, outcome.tokens[row], outcome.logprobs[row])
            else:
                sequence.finish = FinishReason.FAILED
        return outcome.accepted, committed

    def _commit(self, sequence: SequenceState, tokens: list[int], logprobs: list[float]) -> int:
        """Appends tokens up to the one that ends the sequence. Returns how many."""
        stop = StopCondition(sequence, self._decode_text)
        count = 0
        for token, logprob in zip(tokens, logprobs, strict=False):  # log-probs are padded to the longest row
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            count += 1
            sequence.finish = stop.reason()
            if sequence.finish is not None:
                break
        self._observe(sequence, count)
        return count

    def _observe(self, sequence: SequenceState, count: int) -> None:
        for drafter in self.drafters.values():
            drafter.observe(sequence, count)

    def _retire(self) -> Iterator[tuple[int, Rollout]]:
        """Hands out finished sequences and closes the holes they leave."""
        ended = {id(s): s for s in self.scheduler.active if s.finish is not None}
        slots = {id(s): slot for slot, s in enumerate(self.scheduler.active)}
        rollouts = [(s.index, self._finished(s, slots[key], error=None)) for key, s in ended.items()]
        cache = self.runner.cache
        for slot, last in self.scheduler.retire():
            for drafter in self.drafters.values():
                drafter.release(slot)
                if slot != last:
                    drafter.move(last, slot)
                    drafter.release(last)
            if slot != last:
                cache.copy_slot(last, [slot], min(len(self.scheduler.active[slot].tokens), cache.span))
        yield from rollouts

    def _finished(self, sequence: SequenceState, slot: int | None, error: str | None) -> Rollout:
        if sequence.finish is FinishReason.FAILED and slot is not None:
            error = "the policy's logits are not finite (NaN or infinite): check the last update's gradient norm and learning rate"
            self.runner.cache.clear_slot(slot)
        sequence.stats.seconds = time.perf_counter() - sequence.started
        trace = self._trace(sequence, slot) if self.collect_traces and error is None and slot is not None else None
        return Rollout(
            request=sequence.request,
            token_ids=sequence.tokens[sequence.num_prompt :],
            logprobs=sequence.logprobs,
            finish_reason=FinishReason.FAILED if error else sequence.finish or FinishReason.FAILED,
            stats=sequence.stats,
            error=error,
            trace=trace,
        )

    def _trace(self, sequence: SequenceState, slot: int) -> DistillationTrace:
        features = self.runner.cache.taps[slot, : len(sequence.tokens) - 1]
        hidden = self.runner.hidden_size
        return DistillationTrace(
            token_ids=torch.tensor(sequence.tokens),
            num_prompt=sequence.num_prompt,
            taps=features[:, :-hidden].clone(),
            final=features[:, -hidden:].clone(),
        )

    def _abandon(self) -> None:
        """Frees every slot: nothing of one call is left for the next, also when its consumer stopped early."""
        for slot in range(len(self.scheduler.active)):
            for drafter in self.drafters.values():
                drafter.release(slot)
        self.scheduler.clear()


def mean_acceptance_length(rollouts: Iterable[Rollout]) -> float:
    """Committed tokens of one sequence in one target forward, prefills left out: 1 for plain decoding."""
    tokens = steps = 0
    for rollout in rollouts:
        tokens += max(len(rollout.token_ids) - 1, 0)
        steps += rollout.stats.steps
    return tokens / steps if steps else 1.0
