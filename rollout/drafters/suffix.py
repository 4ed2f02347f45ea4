"""Model-free drafting from what other samples of the same prompt have already said."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial

from paceline.rollout.drafters.base import DraftContext, StatelessSlots
from paceline.rollout.drafters.best_first import Row, best_first, pack
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.suffix_automaton import SuffixAutomaton
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree

_UNSEEN_WEIGHT = 0.5  # weight of unseen continuations, relative to the heaviest one that was seen


@dataclass(slots=True)
class _Live:
    """A sample that is being decoded.

    Attributes:
        last: State of the sample's text in the automaton.
        match: State of its longest suffix that occurred earlier.
        matched: Length of that suffix in tokens.
        tokens: Number of the sample's tokens that were read.
    """

    last: int = 0
    match: int = 0
    matched: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Group:
    """The automaton of one prompt.

    Attributes:
        automaton: Automaton over the prompt and all samples.
        prompt: State at the end of the prompt, once it was read.
        weight: Weight of the next sample's occurrences.
        live: Samples that are being decoded.
    """

    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    prompt: _Live | None = None
    weight: float = 1.0
    live: dict[SequenceState, _Live] = field(default_factory=dict)


class SuffixDrafter(StatelessSlots):
    """Drafts by the longest suffix match in the samples of the same group.

    Live samples and those of earlier epochs count alike. The samples of a prompt repeat each other
    (SAM-Decoding, arXiv 2411.10666; Multi-Sample SD, arXiv 2503.05330), so no model is needed and drafting
    works from the first step. A suffix automaton per group follows each sample's longest suffix that occurred
    before in any of the samples. A draft continues it with what followed then, in proportion to the weights
    of the occurrences, and falls back to shorter suffixes when nothing followed. The prompt's tokens count as
    well. The drafts are deterministic: ``probs`` is None.

    Args:
        max_states: Maximum number of automaton states over all groups, about 300 bytes each; the least
            recently used groups are dropped first.
        decay: Weight of an occurrence relative to one in the next sample of the group, because the policy
            changes.
        shared: Whether the samples of a group share their texts; otherwise each sample sees only its own
            text.
    """

    name = "suffix"

    def __init__(self, max_states: int = 1_000_000, decay: float = 0.98, shared: bool = True) -> None:
        self.max_states, self.decay, self.shared = max_states, decay, shared
        self._groups: OrderedDict[Hashable, _Group] = OrderedDict()
        self._states = 0
        self._observed: set[SequenceState] = set()  # samples that were observed and not forgotten

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns FIXED: drafts are a function of the committed tokens."""
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Drafts each sequence by best-first search from its longest match."""
        rows: list[Row] = []
        for sequence in context.sequences:
            group = self._groups.get(self._key(sequence))
            live = None if group is None else group.live.get(sequence)
            if group is None or live is None or live.matched == 0:
                rows.append([])
                continue
            automaton = group.automaton
            start = automaton.settle(live.match, live.matched), live.matched
            rows.append(best_first(start, partial(_following, automaton), strategy))
        return pack(rows, strategy.width)

    def matched(self, sequence: SequenceState) -> int:
        """Returns the length of the longest suffix that occurred before and was continued, or 0."""
        group = self._groups.get(self._key(sequence))
        live = None if group is None else group.live.get(sequence)
        return 0 if live is None else live.matched

    def continuation(self, sequence: SequenceState, depth: int, least: float) -> list[int]:
        """Returns the likeliest continuation of the sequence's longest match.

        The probability of a token is estimated as its share of the weight of all that followed, with one more
        occurrence, in the group's latest sample, of something else (Laplace's rule): a text that was seen
        once is trusted less than one that was seen in all samples.

        Args:
            sequence: Sequence that was observed.
            depth: Maximum number of tokens.
            least: The continuation ends before the product of its tokens' probabilities falls below this.
        """
        group = self._groups.get(self._key(sequence))
        live = None if group is None else group.live.get(sequence)
        tokens: list[int] = []
        if group is None or live is None or live.matched == 0:
            return tokens
        at, probability = (live.match, live.matched), 1.0
        while len(tokens) < depth:
            after, matched = _seen_after(group.automaton, at)
            weight, token, state = max(after, default=(0.0, 0, 0))
            probability *= weight / (sum(other for other, _, _ in after) + group.weight)
            if not after or probability < least:
                break
            tokens.append(token)
            at = state, matched + 1
        return tokens

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Adds the sequence's new tokens to its group's automaton.

        If the group was dropped meanwhile, only these are added: reading all the text again, which is dropped
        again, would take longer with every token.
        """
        key = self._key(sequence)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
            self._states += 1
        self._groups.move_to_end(key)
        before = len(group.automaton)
        live = group.live.get(sequence)
        if live is None:
            dropped = sequence in self._observed
            live = _Live(tokens=len(sequence.tokens) - count) if dropped else self._start(group, sequence)
            group.live[sequence] = live
            self._observed.add(sequence)
        for token in sequence.tokens[live.tokens :]:
            live.match, live.matched = group.automaton.step(live.match, live.matched, token)
            live.last = group.automaton.extend(live.last, token, group.weight)
        live.tokens = len(sequence.tokens)
        self._states += len(group.automaton) - before
        self._evict(keep=key)

    def _start(self, group: _Group, sequence: SequenceState) -> _Live:
        """Starts a new sample at the end of the prompt, which the automaton contains only once."""
        group.weight /= self.decay
        prompt = sequence.tokens[: sequence.num_prompt]
        if group.prompt is None:
            start = _Live()
            for token in prompt:
                start.match, start.matched = group.automaton.step(start.match, start.matched, token)
                start.last = group.automaton.extend(start.last, token, group.weight)
            group.prompt = _Live(start.last, start.last, len(prompt), len(prompt))
            return _Live(start.last, start.match, start.matched, len(prompt))
        known = group.prompt
        return _Live(known.last, known.match, known.matched, known.tokens)

    def _evict(self, keep: Hashable) -> None:
        while self._states > self.max_states and next(iter(self._groups)) != keep:
            _, oldest = self._groups.popitem(last=False)
            self._states -= len(oldest.automaton)

    def _key(self, sequence: SequenceState) -> Hashable:
        """Returns the group of the sequence, or the sequence itself if it shares nothing."""
        group = sequence.request.group
        return sequence if group is None or not self.shared else group

    def forget(self, sequence: SequenceState) -> None:
        """Ends the sample; its text stays useful to its siblings and to later epochs.

        The text of a sample that shares nothing is dropped.
        """
        self._observed.discard(sequence)
        key = self._key(sequence)
        group = self._groups.get(key)
        if group is None:
            return
        group.live.pop(sequence, None)
        if key is sequence or (not group.live and len(group.automaton) > self.max_states):
            self._states -= len(self._groups.pop(key).automaton)


def _following(
    automaton: SuffixAutomaton, at: tuple[int, int]
) -> Iterator[tuple[float, int, tuple[int, int]]]:
    """Yields what followed the suffix, heaviest first, or what followed shorter suffixes if nothing did.

    Args:
        automaton: Automaton of the group.
        at: State and matched tokens.
    """
    after, matched = _seen_after(automaton, at)
    if not after:
        return
    after.sort(reverse=True)
    total = sum(weight for weight, _, _ in after) + _UNSEEN_WEIGHT * after[0][0]
    for weight, token, to in after:
        yield weight / total, token, (to, matched + 1)


def _seen_after(automaton: SuffixAutomaton, at: tuple[int, int]) -> tuple[list[tuple[float, int, int]], int]:
    """Returns the weight, token and state of all that followed, and the length of the suffix they followed.

    That suffix is the longest one of ``at`` that anything followed; nothing is returned for the empty one.
    """
    state, matched = automaton.settle(*at), at[1]
    while state and not automaton.following[state]:
        state = automaton.link[state]
        matched = automaton.length[state]
    if state == 0:
        return [], 0
    return [(automaton.weight[to], token, to) for token, to in automaton.following[state].items()], matched
