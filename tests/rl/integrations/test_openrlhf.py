"""OpenRLHF's own executor and loader with our rewards; its engine is played by a stand-in
(``make test-pipelines``).
"""

import asyncio
from dataclasses import dataclass

import pytest

from paceline.rl.errors import UserError
from paceline.rl.integrations.openrlhf import per_sample
from paceline.rl.models.policies import fetch_policy


@dataclass
class Choice:
    token_ids: list
    finish_reason: str = "stop"
    logprobs: None = None


@dataclass
class Answer:
    outputs: list


@dataclass
class Params:
    max_tokens: int = 16
    logprobs: None = None


class Engine:
    """Gives completions of the lengths it was told, the first ones last."""

    def __init__(self, lengths):
        self.lengths, self.count = list(lengths), 0

    async def generate(self, prompt_ids, params, multi_modal_data=None):
        length = self.lengths[self.count]
        self.count += 1
        await asyncio.sleep(0.01 * (len(self.lengths) - self.count))
        if length is None:
            raise RuntimeError("engine lost")
        return Answer([Choice([5] * length)])


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return AutoTokenizer.from_pretrained(fetch_policy("tiny-llama"))


def test_one_completion_at_a_time(tokenizer):
    """Overlong, by hand: limit 8, cache 4, a completion of 6 tokens loses (6 - 4) / 4."""
    reward = per_sample(
        lambda text, prompt, label: 1.0, [{"name": "overlong", "limit": 8, "cache": 4}], tokenizer, longest=8
    )
    text = "123456"
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 6
    found = reward(["1+1=" + text], ["1+1="], [None])
    assert found["rewards"].tolist() == pytest.approx([0.5])
    assert found["scores"].tolist() == [1.0]


def test_terms_of_groups_are_refused_there(tokenizer):
    reward = per_sample(lambda *_: 1.0, [{"name": "shorter_better"}], tokenizer, longest=8)
    with pytest.raises(UserError, match="one completion at a time"):
        reward(["a"], ["a"], [None])


def executor(tmp_path, terms, group_size, score="1.0"):
    """Through OpenRLHF's own loader, from a file, as its --train.agent_func_path does; without vLLM, whose
    module it needs.
    """
    import importlib.util

    from openrlhf.utils.agent import AgentExecutorBase

    path = tmp_path / "agent.py"
    path.write_text(
        "from paceline.rl.integrations.openrlhf import grouped\n"
        f"AgentExecutor = grouped(lambda text, prompt, label: {score}, {terms!r}, {group_size}, 16)\n"
    )
    spec = importlib.util.spec_from_file_location("agent_module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert issubclass(module.AgentExecutor, AgentExecutorBase)
    return module.AgentExecutor()


async def run(agent, tokenizer, engine, prompts):
    tasks = [agent.execute(p, None, Params(), 64, tokenizer, engine) for p in prompts]
    return await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.pipelines
def test_groups_are_rewarded_when_they_are_whole(tmp_path, tokenizer):
    """ShorterBetter by hand: alpha 2, beta 0.001, all right, the shortest has 3 tokens: 2 - 0.001 |L - 3|."""
    agent = executor(tmp_path, [{"name": "shorter_better"}], 2)
    outputs = asyncio.run(run(agent, tokenizer, Engine([3, 8, 5, 9]), ["1+1=", "1+1=", "2+2=", "2+2="]))
    assert [o["reward"] for o in outputs] == pytest.approx([2.0, 2 - 0.005, 2.0, 2 - 0.004])
    assert all(o["scores"] == 1.0 and o["extra_logs"]["task_reward"] == 1.0 for o in outputs)
    spans = [o["action_ranges"][0] for o in outputs]
    assert [end - start for start, end in spans] == [3, 8, 5, 9]


@pytest.mark.pipelines
def test_a_sample_that_fails_does_not_hold_up_its_group(tmp_path, tokenizer):
    agent = executor(tmp_path, [{"name": "alp"}], 2)
    outputs = asyncio.run(asyncio.wait_for(run(agent, tokenizer, Engine([3, None]), ["1+1=", "1+1="]), 20))
    assert all(isinstance(o, RuntimeError) for o in outputs)
    assert not agent._open


@pytest.mark.pipelines
def test_rewards_reach_openrlhfs_own_loader(tmp_path, tokenizer):
    """``--reward.remote_url FILE.py``: OpenRLHF's executor imports the file and calls what it finds."""
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    path = tmp_path / "reward.py"
    path.write_text(
        "from transformers import AutoTokenizer\n"
        "from paceline.rl.integrations.openrlhf import per_sample\n"
        "from paceline.rl.models.policies import fetch_policy\n"
        "tokenizer = AutoTokenizer.from_pretrained(fetch_policy('tiny-llama'))\n"
        "reward_func = per_sample(lambda t, p, l: 1.0, [{'name': 'linear', 'alpha': 0.5}], tokenizer, 16)\n"
    )
    output = asyncio.run(run(SingleTurnAgentExecutor(str(path)), tokenizer, Engine([4]), ["1+1="]))[0]
    assert float(output["scores"]) == 1.0
    assert float(output["reward"]) < 1.0


@pytest.mark.pipelines
def test_entropies_are_not_to_be_had(tmp_path):
    with pytest.raises(UserError, match="entropies or budgets"):
        executor(tmp_path, [{"name": "pear"}], 2)
