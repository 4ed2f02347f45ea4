"""Rewards for OpenRLHF 0.11, through its documented extension points.

OpenRLHF always decodes with vLLM engines that it starts itself and sends weights to; it lets others decide
what one rollout is and what it is worth. So the engine stays OpenRLHF's, and this file brings the
length-aware rewards:

- ``--reward.remote_url FILE.py`` with ``reward_func = per_sample(score, terms)``: terms that look at one
  completion;
- ``--train.agent_func_path FILE.py`` with ``AgentExecutor = grouped(score, terms, group_size)``: all terms,
  also those that compare the samples of a prompt, which OpenRLHF's worker decodes side by side.

``score(text, prompt, label)`` is the task's reward of a completion's text. See recipes in
docs/integrations.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paceline.rl.errors import UserError
from paceline.rl.rewards.registry import apply_terms, load_term, sample_reward
from paceline.rl.rewards.terms import Samples

Score = Callable[[str, str, Any], float]


def per_sample(
    score: Score, terms: Sequence[Mapping[str, Any]], tokenizer: Any, longest: int
) -> Callable[..., dict[str, Any]]:
    """A ``reward_func(queries, prompts, labels)`` in OpenRLHF's signature.

    Args:
        score: The task's reward of a completion.
        terms: As ``length.rewards`` in a recipe, of one completion each.
        tokenizer: The policy's: OpenRLHF hands over texts, lengths are in tokens.
        longest: Most tokens of a completion.
    """
    found = [load_term(entry, "terms") for entry in terms]

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **more: Any
    ) -> dict[str, Any]:
        base, shaped = [], []
        for query, prompt, label in zip(queries, prompts, labels, strict=True):
            text = query[len(prompt) :] if query.startswith(prompt) else query
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            base.append(float(score(text, prompt, label)))
            shaped.append(sample_reward(found, base[-1], length, longest))
        return {
            "rewards": torch.tensor(shaped),
            "scores": torch.tensor(base),
            "extra_logs": {"task_reward": torch.tensor(base)},
        }

    return reward_func


@dataclass(slots=True)
class _Group:
    """The samples of one prompt: how many have begun, and those that have ended."""

    whole: asyncio.Future[None]
    begun: int = 0
    outputs: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """A sample is lost, and with it the comparison."""
        if not self.whole.done():
            self.whole.set_exception(RuntimeError(f"a sample of the same prompt failed: {error}"))
            self.whole.exception()  # whoever waits is told; that nobody does is no news


def grouped(score: Score, terms: Sequence[Mapping[str, Any]], group_size: int, longest: int) -> type[Any]:
    """An ``AgentExecutor`` for OpenRLHF: its single turn, with rewards that may compare the samples of a
    prompt.

    A rollout returns when all ``group_size`` samples of its prompt have ended: OpenRLHF's worker decodes them
    side by side and waits for them together, so nothing else waits for it.

    Args:
        score: The task's reward of a completion.
        terms: As ``length.rewards`` in a recipe; none that reads entropies, which vLLM does not give.
        group_size: OpenRLHF's ``--rollout.n_samples_per_prompt``.
        longest: Most tokens of a completion.

    Raises:
        UserError: for terms that need more than lengths.
    """
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    found = [load_term(entry, "terms") for entry in terms]
    if any(term.needs_entropies or term.needs_budgets for term in found):
        raise UserError(
            "length rewards that read entropies or budgets need columns that OpenRLHF's rollouts do not have"
        )

    class AgentExecutor(SingleTurnAgentExecutor):
        """OpenRLHF's single turn; rewards are computed once the group is whole."""

        def __init__(self) -> None:
            super().__init__(None)
            self._open: dict[str, _Group] = {}

        async def execute(
            self,
            prompt: str,
            label: Any,
            sampling_params: Any,
            max_length: int,
            hf_tokenizer: Any,
            llm_engine: Any,
            images: Any = None,
        ) -> dict[str, Any]:
            """See OpenRLHF's `AgentExecutorBase`."""
            group = self._join(prompt)
            try:
                output: dict[str, Any] = await super().execute(
                    prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images
                )
                start, end = output["action_ranges"][0]
                text = hf_tokenizer.decode(output["observation_tokens"][start:end], skip_special_tokens=True)
                output["scores"] = float(score(text, prompt, label))
            except BaseException as error:  # the others must not wait for this one
                group.fail(error)
                raise
            group.outputs.append(output)
            if len(group.outputs) == group_size:
                _reward(group.outputs)
                group.whole.set_result(None)
            await asyncio.shield(group.whole)
            return output

        def _join(self, prompt: str) -> _Group:
            """The group that this sample belongs to: the next ``group_size`` of a prompt are one."""
            group = self._open.setdefault(prompt, _Group(asyncio.get_running_loop().create_future()))
            group.begun += 1
            if group.begun == group_size:
                del self._open[prompt]
            return group

    def _reward(outputs: list[dict[str, Any]]) -> None:
        base = torch.tensor([output["scores"] for output in outputs], dtype=torch.float32)
        lengths = torch.tensor([end - start for output in outputs for start, end in output["action_ranges"]])
        shaped, _ = apply_terms(found, Samples(base, base >= 1, lengths, group_size, longest))
        for output, reward in zip(outputs, shaped.tolist(), strict=True):
            output["reward"] = reward
            output["extra_logs"] = {"task_reward": torch.tensor(output["scores"])}

    return AgentExecutor
