"""verl's registries, and a replica as a real Ray actor: requests, weights, pauses (``make
test-pipelines``)."""

import asyncio
import os

import pytest

from tests.engines import forward_logprobs
from tests.support import ROOT

pytestmark = pytest.mark.pipelines
pytest.importorskip("ray")


@pytest.fixture(scope="module")
def verl_module():
    os.environ["VERL_USE_EXTERNAL_MODULES"] = "paceline.rl.integrations.verl"
    import verl  # noqa: F401  imports ours

    import paceline.rl.integrations.verl as module

    return module


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from paceline.rl.models.policies import fetch_policy

    os.environ["PACELINE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return fetch_policy("tiny-llama")


def configs(policy, **options):
    from verl.workers.config import HFModelConfig, RolloutConfig

    drafting = {
        "speculation": {"drafters": ["suffix", "eagle3"]},
        "drafter": {"draft_vocab_size": 48, "unroll": 2, "tokens_per_microbatch": 128, "held_out_every": 2},
    }
    settings = {
        "name": "paceline",
        "tensor_model_parallel_size": 1,
        "prompt_length": 32,
        "response_length": 16,
        "max_num_seqs": 8,
        "dtype": "float32",
        "engine_kwargs": {"paceline": drafting},
    }
    return RolloutConfig(**{**settings, **options}), HFModelConfig(path=str(policy))


def test_verl_finds_our_rollout_replica_and_rewards(verl_module):
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import get_rollout_replica_class

    assert get_rollout_class("paceline", "async") is verl_module.PacelineRollout
    assert get_rollout_replica_class("paceline") is verl_module.PacelineReplica
    assert get_reward_manager_cls("paceline") is verl_module.LengthAwareRewardManager


@pytest.fixture
def started(verl_module, policy, tmp_path):
    """A replica as verl starts it, in a Ray of its own, with a worker that stands for verl's."""
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        config, model = configs(policy)
        replica = verl_module.PacelineReplica(
            replica_rank=0, config=config, model_config=model, gpus_per_node=1
        )

        @ray.remote
        class Worker:
            pass

        replica.workers = [Worker.remote()]
        asyncio.run(replica.launch_servers())
        yield replica, config, model
    finally:
        ray.shutdown()


def test_a_replica_serves_takes_weights_and_pauses(verl_module, policy, started, monkeypatch):
    import ray
    import torch

    from paceline.rl.models.loading import load_policy

    replica, config, model = started
    server = replica.server_handle
    prompts = [[3, 5, 7], [3, 5, 7], [9, 4], [8, 8, 8, 8]]

    def ask(number, temperature=1.0):
        params = {
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": -1,
            "logprobs": True,
            "repetition_penalty": 1.0,
        }
        calls = [
            server.generate.remote(prompt_ids=p, sampling_params=dict(params), request_id=f"{number}-{i}")
            for i, p in enumerate(prompts)
        ]
        return ray.get(calls)

    own = load_policy(policy, torch.device("cpu"))

    def worst(outputs):
        errors = []
        for prompt, output in zip(prompts, outputs, strict=True):
            wanted = forward_logprobs(own, prompt, output.token_ids)
            errors.append(float((wanted - torch.tensor(output.log_probs)).abs().max()))
        return max(errors)

    first = ask(0)
    assert worst(first) < 1e-3
    assert all(1 <= len(o.token_ids) <= 16 and o.stop_reason == "completed" for o in first)
    assert first[0].token_ids != first[1].token_ids  # samples of one prompt have seeds of their own
    assert first[0].extra_fields["global_steps"] == 0

    with torch.no_grad():
        for p in own.parameters():
            p.add_(0.05 * torch.randn_like(p))
    monkeypatch.setenv("RANK", "0")
    adapter = verl_module.PacelineRollout(config, model, device_mesh=None)

    async def update():
        await adapter.release()
        await adapter.update_weights(((n, p.detach()) for n, p in own.named_parameters()), global_steps=7)
        await adapter.resume(["weights"])

    asyncio.run(update())
    second = ask(1)
    assert worst(second) < 1e-3
    assert second[0].extra_fields["global_steps"] == 7
    for number in range(2, 5):
        ask(number)
    assert ray.get(server.has_drafter.remote())

    asyncio.run(adapter.release())
    waiting = server.generate.remote(prompt_ids=[3, 5], sampling_params={}, request_id="w")
    ready, _ = ray.wait([waiting], timeout=1.0)
    assert not ready
    asyncio.run(adapter.resume(["kv_cache"]))
    assert ray.get(waiting, timeout=60).token_ids

    with pytest.raises(Exception, match="does not sample by"):
        ray.get(server.generate.remote(prompt_ids=[3], sampling_params={"min_p": 0.2}, request_id="x"))
    with pytest.raises(Exception, match="has image_data"):
        ray.get(server.generate.remote(prompt_ids=[3], sampling_params={}, request_id="y", image_data=["i"]))


def test_larger_replicas_are_refused(verl_module, policy):
    config, model = configs(policy, tensor_model_parallel_size=2)
    replica = verl_module.PacelineReplica(replica_rank=0, config=config, model_config=model, gpus_per_node=2)
    with pytest.raises(Exception, match="an engine has one device"):
        asyncio.run(replica.launch_servers())


def test_rewards_are_shaped_after_verls_own(verl_module, policy, monkeypatch):
    """Overlong on verl's score, by hand: limit 8, cache 4, six tokens of a right answer lose 0.5."""
    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer
    from verl import DataProto

    monkeypatch.setenv("PACELINE_LENGTH_REWARDS", '[{"name": "overlong", "limit": 8, "cache": 4}]')
    tokenizer = AutoTokenizer.from_pretrained(policy)
    seen = []

    def score(data_source, solution_str, ground_truth, extra_info):
        seen.append((data_source, ground_truth))
        return 1.0

    manager = verl_module.LengthAwareRewardManager(OmegaConf.create({}), tokenizer, score)
    responses = torch.tensor([[5, 6, 7, 8, 9, 10, 0, 0]])
    data = DataProto.from_dict(
        tensors={"responses": responses, "attention_mask": torch.tensor([[1, 1, 1, *([1] * 6), 0, 0]])},
        non_tensors={
            "data_source": np.array(["sums"], dtype=object),
            "reward_model": np.array([{"ground_truth": "7"}], dtype=object),
            "extra_info": np.array([{}], dtype=object),
        },
    )
    found = manager.loop.run_until_complete(manager.run_single(data))
    assert seen == [("sums", "7")]
    assert found["reward_score"] == pytest.approx(0.5)
    assert found["reward_extra_info"]["paceline_task_score"] == 1.0
