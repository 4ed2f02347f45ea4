"""Which requests can be served."""

from __future__ import annotations

from rollout.api import FinishReason, Request


def problem_with(request: Request, max_context: int, vocab_size: int, decodes_text: bool) -> str | None:
    """Why a request cannot be served, in one line, or None."""
    prompt = request.prompt_ids
    if len(prompt) == 0:
        return "the prompt is empty: give at least one token"
    if len(prompt) >= max_context:
        return f"the prompt has {len(prompt)} tokens, the context {max_context}: shorten it or raise rollout.max_context"
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        return f"the prompt has a token outside 0..{vocab_size - 1}: was it made by another tokenizer?"
    if request.params.stop_strings and not decodes_text:
        return "stop_strings need an engine built with decode_text (the tokenizer's decode)"
    return _problem_with_resume(request, max_context)


def _problem_with_resume(request: Request, max_context: int) -> str | None:
    earlier = request.resume
    if earlier is None:
        return None
    if earlier.finish_reason is not FinishReason.PAUSED:
        return "resume is not a paused rollout: give one whose finish_reason is PAUSED"
    if list(earlier.request.prompt_ids) != list(request.prompt_ids):
        return "resume is a rollout of another prompt: give the prompt it was made for"
    room = min(max_context - len(request.prompt_ids), request.params.max_tokens)
    if len(earlier.token_ids) >= room:
        return f"resume has {len(earlier.token_ids)} tokens, which max_tokens or the context does not exceed: raise max_tokens"
    return None
