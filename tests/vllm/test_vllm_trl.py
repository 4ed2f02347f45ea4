"""TRL's own ways of starting vLLM, a server and the trainer's process, with ``PACELINE_VLLM`` alone."""

import json
import re
import sys

import pytest

pytest.importorskip("vllm")

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from paceline.rollout.backends.adaptive.vllm_options import STATUS_VARIABLE, VARIABLE
from paceline.rollout.backends.vllm_scheduler import AdaptiveScheduler
from tests.vllm.policies import save_talking_policy
from tests.vllm.servers import environment_of_server, serving
from tests.vllm.test_vllm_serve import PORT, complete, get, greedy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
OPTIONS = {
    "speculative": {
        "model": "paceline.rollout.backends.vllm_suffix.GroupSuffixProposer",
        "num_speculative_tokens": 3,
    }
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_talking_policy(tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, json.dumps(OPTIONS))
    monkeypatch.setenv(STATUS_VARIABLE, "")  # it is set while the engine starts
    monkeypatch.setenv("VLLM_PLUGINS", "paceline")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def test_trls_server_drafts_and_says_what_the_policy_says(policy, environment, tmp_path):
    """``trl vllm-serve`` replaces itself with vLLM's server, in the environment that it has."""
    command = [sys.executable, "-m", "trl.scripts.vllm_serve", "--model", str(policy), "--port", str(PORT)]
    command += [
        "--host",
        "127.0.0.1",
        "--max_model_len",
        "256",
        "--enforce_eager",
        "true",
        "--dtype",
        "float32",
    ]
    with serving(command, PORT, tmp_path / "log", environment_of_server()):
        prompts = [[1 + i, 5, 6, 7] for i in range(4)]
        for _ in range(3):
            assert complete(policy, prompts, 64) == greedy(policy, prompts, 64)
        metrics = get("/metrics")
    assert len(re.findall(r'paceline:steps_total\{draft_depth="(\d)"\}', metrics)) >= 2


def test_a_trainer_with_vllm_in_its_process_samples_with_drafts_from_the_policy(
    policy, environment, tmp_path, monkeypatch
):
    """TRL compares vLLM's log-probs with its own, before and after new weights."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        vllm_gpu_memory_utilization=0.1,
        model_init_kwargs={"dtype": "float32"},
        max_completion_length=48,
        num_generations=4,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        max_steps=3,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=str(policy),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "2+3="] * 12}),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.train()
    scheduler = trainer.vllm_generation.llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler, AdaptiveScheduler)
    assert len(scheduler.control.status()["steps_by_depth"]) >= 2
    key = "sampling/sampling_logp_difference/mean"
    gaps = [entry[key] for entry in trainer.state.log_history if key in entry]
    assert len(gaps) == 3 and max(gaps) < 0.03  # TRL lets vLLM choose its data type, which is bfloat16
