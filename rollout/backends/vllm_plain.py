"""Requests that vLLM decodes without drafts, for a comparison with what it decodes otherwise.

A request says so itself (``vllm_xargs: {"paceline_plain": 1}`` at a server), so that it works in any process
and through any front end: `paceline.rollout.backends.vllm_scheduler` drafts nothing in a step that has one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

MARK = "paceline_plain"


def is_plain(sampling_params: Any) -> bool:
    """Returns whether a request's ``SamplingParams`` ask for plain decoding."""
    return sampling_params is not None and MARK in (sampling_params.extra_args or {})


def skip_drafter() -> None:
    """Spares plain requests the drafter's layer, which vLLM runs in every step to keep its keys and values.

    Otherwise the comparison would be with something slower than vLLM without a drafter. The keys and values
    of these requests must not be reused by others: whoever sends them gives them a cache salt of their own.
    To be called in the processes that run the model; a second call does nothing. vLLM's second model runner,
    which needs a GPU, runs the layer all the same.
    """
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.propose_draft_token_ids
    if hasattr(original, "spares_plain_requests"):
        return

    @functools.wraps(original)
    def propose_draft_token_ids(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self.input_batch.req_ids
        idle = scheduler_output.num_spec_tokens_to_schedule == 0 and all(
            is_plain(self.requests[name].sampling_params) for name in rows
        )
        if not idle or not isinstance(self.drafter, SpecDecodeBaseProposer):
            return original(self, scheduler_output, *args, **kwargs)
        nothing = torch.empty(len(rows), 0, dtype=torch.long, device=self.device)
        # on the instance it comes before the class's, whoever has wrapped that
        self.drafter.propose = lambda **arguments: nothing
        try:
            return original(self, scheduler_output, *args, **kwargs)
        finally:
            del self.drafter.propose

    propose_draft_token_ids.spares_plain_requests = True  # type: ignore[attr-defined]
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
