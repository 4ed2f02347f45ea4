"""Provides rollouts and rewards to verl 0.9 through its registries.

``VERL_USE_EXTERNAL_MODULES=paceline.rl.integrations.verl`` in the environment of all workers makes verl
import this file, which registers:

- The rollout ``paceline`` (``actor_rollout_ref.rollout.name=paceline``). Each replica is a Ray actor with its
  own engine. ``actor_rollout_ref.rollout.engine_kwargs.paceline`` configures speculation and drafter with the
  sections of `host_config`.
- The reward manager ``paceline`` (``reward.reward_manager.name=paceline``). It extends verl's naive manager
  by the length-aware terms in ``PACELINE_LENGTH_REWARDS``, which is JSON like ``length.rewards`` in a recipe.
  verl asks for one sample's reward at a time, so terms that compare a group are rejected.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Generator
from typing import Any

import ray
import torch
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.workers.rollout import base as rollout_registry
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

from paceline.rl.errors import UserError
from paceline.rl.integrations.host import host_config
from paceline.rl.integrations.server import EngineServer
from paceline.rl.models.loading import load_policy
from paceline.rl.rewards.registry import load_term, sample_reward
from paceline.rl.sharding.gathering import in_buckets
from paceline.rl.tasks.prompts import stable_seed, stop_token_ids
from paceline.rollout import FinishReason, Request, SamplingParams

_BUCKET_BYTES = 256 << 20  # weights are sent in buckets of this size, which bounds the copies in memory
_LOG = logging.getLogger("paceline")


class PacelineServer:
    """Serves requests as the Ray actor of a replica, with the methods that verl's clients and replicas call.

    Args:
        config: verl's `RolloutConfig`.
        model_config: verl's `HFModelConfig`.
        replica_rank: Rank of this replica.
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        self._config, self._replica = config, replica_rank
        self._max_context: int = config.max_model_len or config.prompt_length + config.response_length
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        policy = load_policy(model_config.local_path, device, getattr(torch, config.dtype)).requires_grad_(
            False
        )
        tokenizer = model_config.tokenizer
        from_host = {
            "seed": config.seed,
            "out": f"paceline/replica-{replica_rank}",
            "policy": {"mixed_precision": "bf16" if config.dtype == "bfloat16" else "no"},
            "rollout": {
                "max_tokens": config.response_length,
                "max_context": self._max_context,
                "max_slots": config.max_num_seqs,
                "temperature": config.temperature,
                "dtype": config.dtype,
            },
            # a server trains the drafter while it has no requests, and stops for the next request
            "drafter": {"schedule": "always"},
        }
        sections = config.engine_kwargs.get("paceline") or {}
        self._server = EngineServer(
            host_config(sections, from_host, alone=False), policy, tokenizer, _LOG.warning
        )
        self._stops = stop_token_ids(tokenizer, policy.generation_config)
        self._count = 0

    async def generate(
        self,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        request_id: str,
        priority: int = 0,
        **media: Any,
    ) -> TokenOutput:
        """Generates a completion of a prompt.

        Args:
            prompt_ids: Token ids of the prompt.
            sampling_params: verl's sampling parameters; missing ones come from verl's `RolloutConfig`.
            request_id: Ignored.
            priority: Ignored.
            media: Inputs other than text, which must be empty.

        Raises:
            UserError: If the request has images or the like, or a sampling parameter that the engine does not
                support, or if it fails.
        """
        if any(value for value in media.values()):
            kinds = ", ".join(name for name, value in media.items() if value)
            raise UserError(
                f"paceline: rollouts support text only, and this request has {kinds}: use prompts without it"
            )
        ids = [int(t) for t in prompt_ids]
        self._count += 1
        seed = stable_seed(self._config.seed, self._server.version, f"{self._replica}/{ids}", self._count)
        request = Request(ids, self._params(dict(sampling_params), len(ids)), seed, group=tuple(ids))
        rollout = await asyncio.wrap_future(self._server.submit(request))
        if rollout.finish_reason is FinishReason.FAILED:
            raise UserError(f"paceline: {rollout.error}")
        return TokenOutput(
            token_ids=rollout.token_ids,
            log_probs=rollout.logprobs,
            stop_reason="aborted" if rollout.finish_reason is FinishReason.CANCELLED else "completed",
            num_preempted=rollout.stats.preempted,
            extra_fields={
                "global_steps": self._server.version,
                "spec_num_draft_tokens": rollout.stats.drafted,
                "spec_num_accepted_tokens": rollout.stats.accepted,
                "spec_num_verify_steps": rollout.stats.steps,
            },
        )

    def _params(self, options: dict[str, Any], prompt: int) -> SamplingParams:
        """Converts verl's sampling parameters.

        Args:
            options: verl's parameters; entries are removed.
            prompt: Number of the prompt's tokens.

        Raises:
            UserError: If a parameter is left over that the engine does not support.
        """
        room = self._max_context - prompt
        default = min(
            self._config.response_length, self._config.prompt_length + self._config.response_length - prompt
        )
        longest = options.pop("max_tokens", None) or options.pop("max_new_tokens", None) or default
        params = SamplingParams(
            temperature=float(options.pop("temperature", self._config.temperature)),
            top_k=max(int(options.pop("top_k", -1)), 0),
            top_p=float(options.pop("top_p", 1.0)),
            max_tokens=max(min(longest, room), 1),
            stop_token_ids=() if options.pop("ignore_eos", False) else self._stops,
        )
        options.pop("logprobs", None)
        neutral = {"repetition_penalty": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        unknown = [name for name, value in options.items() if value not in (None, neutral.get(name))]
        if unknown:
            raise UserError(f"paceline: the engine does not sample by {', '.join(unknown)}: leave it out")
        return params

    async def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        """Loads a bucket of new weights."""
        await asyncio.to_thread(self._server.load_weights, weights)

    async def weights_loaded(self, version: int) -> None:
        """Ends an update of the weights after the last bucket.

        Args:
            version: The trainer's step that the weights come from.
        """
        await asyncio.to_thread(self._server.weights_loaded, version)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        """Resumes serving requests."""
        self._server.resume()

    async def sleep(self) -> None:
        """Stops decoding and drafter training, and returns when both have stopped. Memory is not freed."""
        await asyncio.to_thread(self._server.pause)

    async def abort_all_requests(self) -> dict[str, Any]:
        """Cancels all requests in flight; their callers get the tokens generated so far."""
        return {"aborted_count": self._server.cancel_all(), "request_ids": []}

    async def resume_generation(self) -> None:
        """Resumes serving requests."""
        self._server.resume()

    async def clear_kv_cache(self) -> None:
        """Does nothing, since no keys and values outlive a request."""

    async def release_kv_cache(self) -> None:
        """Does nothing; see `clear_kv_cache`."""

    async def resume_kv_cache(self) -> None:
        """Does nothing; see `clear_kv_cache`."""

    async def has_drafter(self) -> bool:
        """Returns whether there is an EAGLE-3 drafter yet, which is created after the first requests."""
        return self._server.drafter.spot is not None


class PacelineReplica(RolloutReplica):
    """Runs a replica of the rollout ``paceline``, one engine on one device. See verl's `RolloutReplica`."""

    async def launch_servers(self) -> None:
        """Starts the replica's server on the node of its worker.

        Raises:
            UserError: If the replica has more than one device.
        """
        if self.world_size != 1:
            raise UserError(
                f"paceline: an engine has one device, but a replica here has {self.world_size}: write "
                "tensor_model_parallel_size, data_parallel_size and pipeline_model_parallel_size 1, and more "
                "replicas"
            )
        node = await self.workers[0].__ray_call__.remote(
            lambda worker: ray.get_runtime_context().get_node_id()
        )
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        name = f"paceline_server_{self.replica_rank}_0{self.name_suffix}"
        options = {"name": name, "max_concurrency": self.max_concurrency, "scheduling_strategy": affinity}
        server: Any = ray.remote(PacelineServer).options(**options)
        self.servers = [server.remote(self.config, self.model_config, self.replica_rank)]
        self._server_handle, self._server_address = self.servers[0], name


class PacelineRollout(BaseRollout):
    """Controls a replica from the trainer and sends weights to it. See verl's `BaseRollout`."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank = int(os.environ["RANK"])
        self.replica_rank, self.rollout_rank = rank if replica_rank == -1 else replica_rank, 0
        self.is_leader_rank = True
        self._server: Any = None

    @property
    def server(self) -> Any:
        """The replica's actor, looked up on first use because it starts after this object."""
        if self._server is None:
            self._server = ray.get_actor(f"paceline_server_{self.replica_rank}_0")
        return self._server

    async def resume(self, tags: list[str]) -> None:
        """Lets the replica serve requests again."""
        await self.server.wake_up.remote(tags)

    async def release(self) -> None:
        """Stops the replica for the trainer's update."""
        await self.server.sleep.remote()

    @torch.no_grad()
    async def update_weights(
        self,
        weights: Generator[tuple[str, torch.Tensor], None, None],
        wire_format: str = "named_tensors",
        global_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Sends full policy weights to the replica.

        Args:
            weights: Pairs of parameter name and full tensor.
            wire_format: Format of the weights; only ``named_tensors`` is supported.
            global_steps: The trainer's step; None counts as 0.
            kwargs: Ignored.

        Raises:
            UserError: If ``wire_format`` is another.
        """
        if wire_format != "named_tensors":
            raise UserError(f"paceline: the wire format is {wire_format}: write named_tensors")
        for bucket in in_buckets(((name, tensor.detach().cpu()) for name, tensor in weights), _BUCKET_BYTES):
            await self.server.load_weights.remote(bucket)
        await self.server.weights_loaded.remote(global_steps or 0)


@register("paceline")
class LengthAwareRewardManager(NaiveRewardManager):
    """Adds length-aware terms to the scores of verl's naive reward manager; see the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        entries = json.loads(os.environ.get("PACELINE_LENGTH_REWARDS", "[]"))
        self._terms = [load_term(entry, "PACELINE_LENGTH_REWARDS") for entry in entries]

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Computes the reward of one sample.

        Args:
            data: verl's `DataProto`; its last item is the sample.

        Returns:
            verl's result with the shaped reward; ``paceline_task_score`` is the reward before shaping.
        """
        result: dict[str, Any] = await super().run_single(data)
        item = data[-1:][0]
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-responses.shape[-1] :].sum())
        budget = (item.non_tensor_batch.get("extra_info") or {}).get("budget")
        score = float(result["reward_score"])
        result["reward_score"] = sample_reward(self._terms, score, length, int(responses.shape[-1]), budget)
        result.setdefault("reward_extra_info", {})["paceline_task_score"] = score
        return result


def _replica() -> type[RolloutReplica]:
    return PacelineReplica


RolloutReplicaRegistry.register("paceline", _replica)
rollout_registry._ROLLOUT_REGISTRY["paceline", "async"] = "paceline.rl.integrations.verl.PacelineRollout"
