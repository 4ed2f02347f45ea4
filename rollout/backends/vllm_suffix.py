"""Drafts inside vLLM from what the other samples of a prompt have said, now and in earlier epochs.

``speculative_config={"method": "custom_class", "num_speculative_tokens": 7, "model":
"paceline.rollout.backends.vllm_suffix.GroupSuffixProposer"}``. It was written for vLLM 0.32, whose proposers
of that method run with synchronous scheduling only.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.rollout.api import Request
from paceline.rollout.backends.adaptive.vllm_options import VllmOptions, options_from_environment
from paceline.rollout.drafters.suffix import SuffixDrafter
from paceline.rollout.sequence import SequenceState

logger = logging.getLogger("vllm.paceline")

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_LEAST_PROBABILITY = 0.1  # as vLLM's own suffix method, suffix_decoding_min_token_prob
_STATES_PER_TOKEN = 2  # at most, of a suffix automaton


@dataclass(frozen=True, slots=True)
class RunnerStep:
    """What vLLM's model runner knows about a step and does not tell a proposer.

    Attributes:
        depth: Number of tokens that the scheduler wants drafted.
        rows: Id of the request in each row.
        prompt_lengths: Number of prompt tokens of each row.
        unfinished: Ids of all requests that are not finished, those that wait for memory included.
    """

    depth: int
    rows: Sequence[str]
    prompt_lengths: np.ndarray
    unfinished: Container[str]


class GroupSuffixProposer:
    """Drafts by the longest suffix match in the completions of the same prompt, with a `SuffixDrafter`.

    Requests with the same prompt tokens are a group; vLLM knows no other. The new tokens of all running
    requests are read before any draft is made, so that siblings see them at once. Finished completions stay
    for later epochs of the prompt, until more than `VllmOptions.suffix_tokens` are kept.

    A draft has as many tokens as the scheduler wants, 0 included, and ends earlier where its estimated
    probability falls below 0.1. It is a function of tokens that were committed earlier. vLLM verifies it as
    it does n-grams: without draft probabilities its rejection sampler takes the probability of a draft token
    as 1, so that tokens keep the policy's distribution.

    An error costs the drafts: it is logged once, and nothing is drafted any more.

    Args:
        vllm_config: vLLM's configuration.

    Attributes:
        step: The step that is drafted next. vLLM's runner passes proposers of this method neither the depth
            nor the requests' ids, so a wrapper of its ``propose_draft_token_ids`` sets it before each call;
            it does nothing for other proposers.
    """

    def __init__(self, vllm_config: Any) -> None:
        options = options_from_environment() or VllmOptions()
        self._texts = SuffixDrafter(max_states=_STATES_PER_TOKEN * options.suffix_tokens)
        self._longest: int = vllm_config.model_config.max_model_len
        self._sequences: dict[str, SequenceState] = {}
        self._broken = False
        self.step: RunnerStep | None = None
        _wrap_runner()

    def load_model(self, *arguments: Any, **options: Any) -> None:
        """Does nothing: there is no model. vLLM calls it on CPUs."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Reads the new tokens and drafts.

        Args:
            sampled_token_ids: New tokens of each row; none if its prompt is not read to the end yet.
            num_tokens_no_spec: int [rows], number of tokens of each row, the new ones included.
            token_ids_cpu: int [rows, tokens], prompt and completion of each row.
            slot_mappings: Unused; part of vLLM's interface.

        Returns:
            The draft tokens of each row, possibly none.
        """
        step, self.step = self.step, None
        nothing: list[list[int]] = [[] for _ in sampled_token_ids]
        if self._broken:
            return nothing
        try:
            if step is None:
                raise RuntimeError("vLLM's model runner is not that of vLLM 0.32")
            return self._propose(step, sampled_token_ids, num_tokens_no_spec, token_ids_cpu)
        except Exception:  # raising would end vLLM's engine
            logger.exception("paceline: nothing is drafted any more because of an error")
            self._broken = True
            self._sequences.clear()
            return nothing

    def _propose(
        self, step: RunnerStep, new: list[list[int]], lengths: np.ndarray, tokens: np.ndarray
    ) -> list[list[int]]:
        for name in [name for name in self._sequences if name not in step.unfinished]:
            self._texts.forget(self._sequences.pop(name))
        rows = [
            self._read(step.rows[i], tokens[i, : lengths[i]], int(step.prompt_lengths[i]))
            if sampled
            else None
            for i, sampled in enumerate(new)
        ]
        return [[] if sequence is None else self._draft(sequence, step.depth) for sequence in rows]

    def _read(self, name: str, tokens: np.ndarray, prompt_length: int) -> SequenceState:
        """Reads the tokens of a request that were not read before, and returns its sequence."""
        sequence = self._sequences.get(name)
        if sequence is not None and not sequence.num_prompt == prompt_length <= len(sequence.tokens) <= len(
            tokens
        ):
            self._texts.forget(sequence)  # the id was given to another request
            sequence = None
        if sequence is None:
            prompt = tokens[:prompt_length]
            request = Request(prompt.tolist(), group=prompt.tobytes())
            sequence = self._sequences[name] = SequenceState(request, index=0, limit=self._longest)
            count = len(tokens)
        else:
            count = len(tokens) - len(sequence.tokens)
        sequence.tokens += tokens[len(sequence.tokens) :].tolist()
        self._texts.observe(sequence, count)
        return sequence

    def _draft(self, sequence: SequenceState, depth: int) -> list[int]:
        fitting = min(depth, sequence.remaining - 1)  # vLLM samples one more token after the draft
        return self._texts.continuation(sequence, fitting, _LEAST_PROBABILITY)


def _wrap_runner() -> None:
    """Makes vLLM's model runner set `GroupSuffixProposer.step` before it asks for drafts.

    It is done when a proposer is built, by the runner itself, so that vLLM stays as it is where no such
    proposer is used. A second call does nothing.
    """
    module = sys.modules.get(_RUNNER)
    if module is None or hasattr(module.GPUModelRunner.propose_draft_token_ids, "tells_paceline"):
        return
    original = module.GPUModelRunner.propose_draft_token_ids

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.drafter, GroupSuffixProposer):
            self.drafter.step = RunnerStep(
                scheduler_output.num_spec_tokens_to_schedule,
                self.input_batch.req_ids,
                self.input_batch.num_prompt_tokens,
                self.requests,
            )
        return original(self, scheduler_output, *args, **kwargs)

    propose_draft_token_ids.tells_paceline = True  # type: ignore[attr-defined]
    module.GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
