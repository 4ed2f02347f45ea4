"""verl's and OpenRLHF's own vLLM rollouts with our scheduler and drafter, as real Ray actors
(``make test-pipelines``).

Both ask Ray for a GPU; Ray is told that there is one, and vLLM for CPUs decodes.
"""

import asyncio
import json
import time
from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaForCausalLM

from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER, VARIABLE
from tests.support import ROOT
from tests.vllm.policies import save_talking_policy

pytestmark = [pytest.mark.pipelines, pytest.mark.timeout(600)]
pytest.importorskip("ray")
pytest.importorskip("vllm")
PROMPT, TOKENS = [1, 5, 6, 7], 64
PROPOSER = "paceline.rollout.backends.vllm_suffix.GroupSuffixProposer"
ROLLOUT = "actor_rollout_ref.rollout"
DRAFTS = {"model": PROPOSER, "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_talking_policy(tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("cache"))


@contextmanager
def cluster(options):
    """A Ray whose actors have ``PACELINE_VLLM`` from the runtime environment, not from this process."""
    import ray

    variables = {
        "PYTHONPATH": str(ROOT),
        VARIABLE: json.dumps(options),
        "VLLM_PLUGINS": "paceline",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    ray.init(
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    try:
        yield ray
    finally:
        ray.shutdown()


def learned(state, ask):
    """What the scheduler in the actor has learned; it writes when nothing is decoded, every two seconds."""
    time.sleep(2.1)
    ask()
    return json.loads((state / "depths.json").read_text())


def test_verl_hands_its_engine_kwargs_to_vllm(policy, tmp_path):
    """Scheduler and drafter are named in verl's configuration, the directory of the state in the variable."""
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import HFModelConfig
    from verl.workers.rollout.replica import get_rollout_replica_class

    ours = [
        f"+{ROLLOUT}.engine_kwargs.vllm.scheduler_cls={ADAPTIVE_SCHEDULER}",
        f"+{ROLLOUT}.engine_kwargs.vllm.speculative_config={{model: {PROPOSER}, num_speculative_tokens: 3}}",
    ]
    theirs = {
        "name": "vllm",
        "tensor_model_parallel_size": 1,
        "prompt_length": 64,
        "response_length": TOKENS,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "dtype": "float32",
        "enforce_eager": True,
        "enable_sleep_mode": False,  # vLLM for CPUs has none
    }
    keys = [f"++{ROLLOUT}.{key}={value}" for key, value in theirs.items()]
    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose("ppo_trainer", overrides=keys + ours)
    config = omega_conf_to_dataclass(composed.actor_rollout_ref.rollout)
    with cluster({"state": str(tmp_path)}) as ray:
        replica = get_rollout_replica_class("vllm")(
            replica_rank=0, config=config, model_config=HFModelConfig(path=str(policy)), gpus_per_node=1
        )
        asyncio.run(replica.init_standalone())
        parameters = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}

        def ask(name):
            call = replica.server_handle.generate
            return ray.get(
                call.remote(prompt_ids=PROMPT, sampling_params=dict(parameters), request_id=name)
            ).token_ids

        answers = [ask(str(i)) for i in range(3)]
        found = learned(tmp_path, lambda: ask("last"))
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32)
    wanted = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert answers == [wanted[0, len(PROMPT) :].tolist()] * 3
    assert found["identity"]["drafter"] == PROPOSER and found["schedule"]


def test_openrlhfs_engines_draft_by_the_variable_alone(policy, tmp_path):
    """OpenRLHF has no arguments for drafts."""
    options = {"speculative": DRAFTS, "state": str(tmp_path)}
    with cluster(options) as ray:
        from openrlhf.trainer.ray.vllm_engine import create_vllm_engines
        from vllm import SamplingParams

        engines = create_vllm_engines(
            num_engines=1,
            tensor_parallel_size=1,
            pretrain=str(policy),
            seed=0,
            full_determinism=False,
            enable_prefix_caching=True,
            enforce_eager=True,
            max_model_len=256,
            gpu_memory_utilization=0.1,
        )
        parameters = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)

        def ask():
            return ray.get(engines[0].generate.remote(PROMPT, parameters)).outputs[0].token_ids

        assert all(len(ask()) == TOKENS for _ in range(3))
        found = learned(tmp_path, ask)
    assert found["identity"]["drafter"] == PROPOSER and found["schedule"]
