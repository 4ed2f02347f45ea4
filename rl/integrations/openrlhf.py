"""Provides length-aware rewards to OpenRLHF 0.11 through its documented extension points.

OpenRLHF always decodes with vLLM engines that it starts itself. Its extension points define a rollout and its
reward, so this file provides rewards and leaves the engine to OpenRLHF:

- ``--reward.remote_url FILE.py`` with ``reward_func = per_sample(score, terms, …)`` supports terms that look
  at one completion.
- ``--train.agent_func_path FILE.py`` with ``AgentExecutor = grouped(score, terms, group_size, …)`` also
  supports terms that compare the samples of a prompt, which OpenRLHF's worker decodes concurrently.

``score(text, prompt, label)`` is the task's reward of a completion. docs/integrations.md has recipes.
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
    """Returns a ``reward_func(queries, prompts, labels)`` in OpenRLHF's signature.

    Args:
        score: Function that returns the task's reward of a completion.
        terms: Entries as in a recipe's ``length.rewards``, which look at one completion each.
        tokenizer: The policy's tokenizer, since OpenRLHF passes texts and lengths are in tokens.
        longest: Maximum number of tokens of a completion.

    Raises:
        UserError: If an entry of ``terms`` is invalid.
    """
    loaded_terms = [load_term(entry, "terms") for entry in terms]

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **more: Any
    ) -> dict[str, Any]:
        base, shaped = [], []
        for query, prompt, label in zip(queries, prompts, labels, strict=True):
            text = query[len(prompt) :] if query.startswith(prompt) else query
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            base.append(float(score(text, prompt, label)))
            shaped.append(sample_reward(loaded_terms, base[-1], length, longest))
        return {
            "rewards": torch.tensor(shaped),
            "scores": torch.tensor(base),
            "extra_logs": {"task_reward": torch.tensor(base)},
        }

    return reward_func


@dataclass(slots=True)
class _Group:
    """The samples of one prompt.

    Attributes:
        complete: Future that is done when all samples have their rewards, or one has failed.
        begun: Number of samples that have started.
        outputs: Outputs of the samples that have finished.
    """

    complete: asyncio.Future[None]
    begun: int = 0
    outputs: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, error: BaseException) -> None:
        """Fails the whole group, since its samples can no longer be compared."""
        if not self.complete.done():
            self.complete.set_exception(RuntimeError(f"a sample of the same prompt failed: {error}"))
            self.complete.exception()  # marks it as retrieved: asyncio must not warn if no sample awaits it


def grouped(score: Score, terms: Sequence[Mapping[str, Any]], group_size: int, longest: int) -> type[Any]:
    """Returns an ``AgentExecutor`` class for OpenRLHF whose rewards may compare the samples of a prompt.

    It plays OpenRLHF's single turn. A rollout returns when all ``group_size`` samples of its prompt have
    finished. OpenRLHF's worker decodes them concurrently and waits for all of them, so this delays nothing.

    Args:
        score: Function that returns the task's reward of a completion.
        terms: Entries as in a recipe's ``length.rewards``; terms that read entropies or budgets are rejected.
        group_size: OpenRLHF's ``--rollout.n_samples_per_prompt``.
        longest: Maximum number of tokens of a completion.

    Raises:
        UserError: If an entry of ``terms`` is invalid, or needs more than lengths.
    """
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    loaded_terms = [load_term(entry, "terms") for entry in terms]
    if any(term.needs_entropies or term.needs_budgets for term in loaded_terms):
        raise UserError(
            "terms: OpenRLHF's rollouts have no columns for rewards that read entropies or budgets: choose "
            "others"
        )

    class AgentExecutor(SingleTurnAgentExecutor):
        """Plays OpenRLHF's single turn, and computes rewards once the group is complete."""

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
            """Runs one rollout; see OpenRLHF's `AgentExecutorBase`."""
            group = self._join(prompt)
            try:
                output: dict[str, Any] = await super().execute(
                    prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images
                )
                start, end = output["action_ranges"][0]
                text = hf_tokenizer.decode(output["observation_tokens"][start:end], skip_special_tokens=True)
                output["scores"] = float(score(text, prompt, label))
            except BaseException as error:  # the other samples must not wait for this one
                group.fail(error)
                raise
            group.outputs.append(output)
            if len(group.outputs) == group_size:
                _reward(group.outputs)
                group.complete.set_result(None)
            await asyncio.shield(group.complete)
            return output

        def _join(self, prompt: str) -> _Group:
            """Returns the sample's group; each ``group_size`` consecutive samples of a prompt form one."""
            group = self._open.setdefault(prompt, _Group(asyncio.get_running_loop().create_future()))
            group.begun += 1
            if group.begun == group_size:
                del self._open[prompt]
            return group

    def _reward(outputs: list[dict[str, Any]]) -> None:
        base = torch.tensor([output["scores"] for output in outputs], dtype=torch.float32)
        lengths = torch.tensor([end - start for output in outputs for start, end in output["action_ranges"]])
        shaped, _ = apply_terms(loaded_terms, Samples(base, base >= 1, lengths, group_size, longest))
        for output, reward in zip(outputs, shaped.tolist(), strict=True):
            output["reward"] = reward
            output["extra_logs"] = {"task_reward": torch.tensor(output["scores"])}

    return AgentExecutor
