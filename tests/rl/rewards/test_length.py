"""Length-aware rewards, each on numbers worked by hand from its formula."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from paceline.rl.config.length import LengthConfig
from paceline.rl.errors import UserError
from paceline.rl.models.policies import fetch_policy
from paceline.rl.rewards.budgets import assign_budgets
from paceline.rl.rewards.registry import TERMS, LengthAware, apply_terms, load_term
from paceline.rl.rewards.terms import Samples
from paceline.rl.tasks.answers import answer_start


def samples(rewards, lengths, group_size=4, longest=1000, **more):
    rewards = torch.tensor(rewards, dtype=torch.float32)
    return Samples(rewards, rewards >= 1, torch.tensor(lengths), group_size, longest, **more)


def shaped(entry, given):
    return apply_terms([load_term(entry, "here")], given)[0].tolist()


def budgets(*tokens):
    return torch.tensor(tokens, dtype=torch.float32)


def test_l1_exact():
    """1 − 0.0003 · |500 − 700| = 0.94; wrong and 100 tokens short: −0.03."""
    given = samples([1, 0], [700, 400], 2, budgets=budgets(500, 500))
    assert shaped({"name": "l1_exact"}, given) == pytest.approx([0.94, -0.03])


def test_l1_max():
    """At the budget δ = 0.5; 1,000 below 0.5 + 0.3; far beyond 0; wrong 0."""
    given = samples([1, 1, 1, 0], [2000, 1000, 9000, 10], budgets=budgets(2000, 2000, 2000, 2000))
    assert shaped({"name": "l1_max"}, given) == pytest.approx([0.5, 0.8, 0.0, 0.0])


def test_dapo_overlong():
    """The paper's numbers: limit 20,480, cache 4,096: free up to 16,384, halfway at 18,432, −1 at the
    limit."""
    given = samples([1, 1, 0, 1], [16384, 18432, 20480, 100], longest=20480)
    assert shaped({"name": "overlong", "cache": 4096}, given) == pytest.approx([1, 0.5, -1, 1])


def test_target_asks_for_longer_too():
    """LongWriter's score: twice the target 1 − 1/3, half of it 1 − 1/2, at it 1; half of the reward is the
    task's.
    """
    given = samples([1, 1, 1, 0], [200, 50, 100, 400])
    assert shaped({"name": "target", "tokens": 100}, given) == pytest.approx(
        [0.5 + 0.5 * 2 / 3, 0.75, 1.0, 0.0]
    )
    by_budget = samples([0, 0], [100, 100], 2, budgets=budgets(100, 200))
    assert shaped({"name": "target"}, by_budget) == pytest.approx([0.5, 0.25])


def test_hbpo_rewards_and_advantages():
    """Limit 4,096, w = 4, α = 1 / 4,096, as in the reference code. Asked for 1,024: shorter or equal earns
    what the budget does, 4 cos(π/8) = 3.696, longer less; beyond the limit or wrong nothing."""
    entry = {"name": "hbpo", "limit": 4096}
    given = samples(
        [1, 1, 1, 0], [1024, 2048, 5000, 10], budgets=budgets(1024, 1024, 1024, 1024), longest=8192
    )
    own = 4 * math.cos(math.pi / 4) - 0.25
    assert shaped(entry, given) == pytest.approx([4 * math.cos(math.pi / 8), own, 0, 0], abs=1e-5)
    short = samples([1, 1], [512, 512], 2, budgets=budgets(1024, 512))
    # 4 cos(π/16) − 512/4096 = 3.798 would be more than the budget's 3.696
    assert shaped(entry, short) == pytest.approx(
        [4 * math.cos(math.pi / 8), 4 * math.cos(math.pi / 16)], abs=1e-5
    )
    both = samples([1, 0, 1, 1], [1024, 9, 512, 512], budgets=budgets(1024, 1024, 512, 512))
    _, added = apply_terms([load_term(entry, "here")], both)
    high = 4 * math.cos(math.pi / 8)
    assert added.tolist() == pytest.approx([-high / 2, -high / 2, 0, 0], abs=1e-5)


def test_grpo_lambda_penalises_only_the_groups_that_are_right():
    """Three groups, right by 100, 50 and 0 %; the best third is trained for brevity. Correct lengths 100 and
    300 of the first: mean 200, deviation 100, so σ(∓1)."""
    given = samples([1, 1, 1, 0, 0, 0], [100, 300, 100, 300, 50, 60], 2)
    low, high = (1 / (1 + math.exp(s)) for s in (1, -1))
    entry = {"name": "grpo_lambda", "share": 0.3, "alpha": 0.2}
    assert shaped(entry, given) == pytest.approx([1 - 0.2 * low, 1 - 0.2 * high, 1, 0, 0, 0])


def test_grpo_lambda_chooses_among_all_ranks():
    given = samples([1, 0], [100, 300], 2, ratios=torch.tensor([0.5, 1.0, 1.0]))
    assert shaped({"name": "grpo_lambda", "share": 0.5}, given) == [1, 0]
    alone = samples([1, 0], [100, 300], 2)
    assert shaped({"name": "grpo_lambda", "share": 0.5}, alone) == pytest.approx([0.9, 0])


def test_grpo_lambda_spares_groups_without_a_correct_sample():
    given = samples([0, 0], [100, 300], 2)
    assert shaped({"name": "grpo_lambda", "share": 1.0}, given) == [0, 0]


def test_shorter_better():
    """The shortest correct sample has 200 tokens; without one, the mean of 100 and 300."""
    given = samples([1, 1, 0, 0, 0, 0, 0, 0], [200, 500, 100, 200, 100, 300, 100, 300])
    wanted = [2, 2 - 0.3, -0.1, 0, -0.1, -0.1, -0.1, -0.1]
    assert shaped({"name": "shorter_better"}, given) == pytest.approx(wanted)


def test_alp():
    """Solved by 3 of 4: β n · 0.75; by none: β n / 4."""
    given = samples([1, 1, 1, 0, 0, 0, 0, 0], [1000] * 8)
    wanted = [1 - 0.075] * 3 + [-0.075] + [-0.025] * 4
    assert shaped({"name": "alp", "beta": 1e-4}, given) == pytest.approx(wanted)


def test_pear():
    """Thinking at 0.5 nats, answering at 0.2: a correct one keeps 1 − (0.5 − 0.2) of its reward, with α = 2 1
    − 0.1; without an answer 1 − 0.5; calmer thinking than answering is not paid for."""
    entropies = [
        torch.tensor([0.6, 0.4, 0.2]),
        torch.tensor([0.5, 0.5]),
        torch.tensor([0.1, 0.9]),
        torch.tensor([3.0]),
    ]
    given = samples([1, 1, 1, 0], [3, 2, 2, 1], entropies=entropies, answers=[2, 2, 1, 1])
    assert shaped({"name": "pear"}, given) == pytest.approx([0.7, 0.5, 1.0, 0.0])
    assert shaped({"name": "pear", "alpha": 2.0}, given) == pytest.approx([0.9, 0.5, 1.0, 0.0])


def test_the_naive_penalty_also_pays_for_saying_nothing():
    given = samples([1, 0], [800, 0], 2)
    assert shaped({"name": "linear", "alpha": 2.0}, given) == pytest.approx([-0.6, 0.0])


def test_terms_compose_in_their_order():
    given = samples([1, 1], [18432, 100], 2, longest=20480, budgets=budgets(18432, 18432))
    terms = [{"name": "l1_max"}, {"name": "overlong", "cache": 4096}]
    rewards = apply_terms([load_term(entry, "here") for entry in terms], given)[0]
    assert rewards.tolist() == pytest.approx([0.5 - 0.5, 1.0])


@pytest.mark.parametrize("name", sorted(TERMS))
def test_a_wrong_completion_never_earns_by_a_length_more_than_a_right_one(name):
    """The best that a wrong completion can get is less than a right one of the same length gets; the target's
    score aside, which is of its own."""
    lengths = [1, 30, 60, 90]
    more = {
        "budgets": budgets(60, 60, 60, 60),
        "entropies": [torch.full((n,), 0.3) for n in lengths],
        "answers": lengths,
    }
    right = shaped({"name": name}, samples([1, 1, 1, 1], lengths, longest=100, **more))
    wrong = shaped({"name": name}, samples([0, 0, 0, 0], lengths, longest=100, **more))
    assert all(r >= w for r, w in zip(right, wrong, strict=True))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"name": "overlng"}, "did you mean overlong"),
        ({"cache": 3}, "names None"),
        ({"name": "overlong", "cash": 3}, "did you mean cache"),
        ({"name": "pear", "alpha": "much"}, "type float"),
    ],
)
def test_bad_terms_are_named(entry, says):
    with pytest.raises(UserError, match=says):
        load_term(entry, "here")


def test_as_a_reward_function_of_another_trainer():
    def accuracy(prompts, completions, **columns):
        return [float(c == "right") for c in completions]

    function = LengthAware(accuracy, [{"name": "l1_exact"}], group_size=2, longest=100)
    given = function(
        prompts=["a", "a"],
        completions=["right", "wrong"],
        completion_ids=[[1] * 70, [1] * 40],
        budget=[50, 50],
    )
    assert given == pytest.approx([1 - 0.006, -0.003])
    assert function.__name__ == "l1_exact"
    with pytest.raises(ValueError, match="make per_device_train_batch_size a multiple"):
        function(prompts=["a"] * 3, completions=["right"] * 3, completion_ids=[[1]] * 3, budget=[50] * 3)


class Letters:
    """Decodes ids as characters."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("text", "start"),
    [("2+2=4\nAnswer: 4", 13), ("Answer:", 7), ("nothing", 7), ("", 0), ("Answer: 1 Answer: 2", 7)],
)
def test_where_the_answer_starts(text, start):
    assert answer_start([ord(c) for c in text], "Answer:", Letters()) == start


def test_budgets_of_subgroups_and_prompts():
    config = LengthConfig(budgets=(10, 20))
    assert assign_budgets(config, 4, "s") == [10, 10, 20, 20]
    drawn = {
        tuple(assign_budgets(LengthConfig(budgets=(10, 20), budget_of="prompt"), 4, str(i)))
        for i in range(30)
    }
    assert drawn == {(10,) * 4, (20,) * 4}
    assert assign_budgets(LengthConfig(), 4, "s") is None


def test_trl_trains_with_it(tmp_path, monkeypatch):
    """GRPOTrainer itself calls it, with its own columns and one of the data set's."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    path = fetch_policy("tiny-llama")
    seen = []

    def digits(prompts, completions, **columns):
        return [float(any(c.isdigit() for c in text)) for text in completions]

    class Watched(LengthAware):
        def __call__(self, prompts, completions, **columns):
            rewards = super().__call__(prompts, completions, **columns)
            base = digits(prompts, completions)
            lengths = [len(ids) for ids in columns["completion_ids"]]
            seen.append(
                (
                    rewards,
                    [r - 0.01 * abs(b - n) for r, b, n in zip(base, columns["budget"], lengths, strict=True)],
                )
            )
            return rewards

    terms = [{"name": "l1_exact", "alpha": 0.01}]
    args = GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=str(path),
        reward_funcs=Watched(digits, terms, group_size=4, longest=8),
        args=args,
        train_dataset=Dataset.from_list(
            [{"prompt": "1 + 1 =", "budget": 6}, {"prompt": "2 + 1 =", "budget": 3}]
        ),
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    trainer.train()
    assert len(seen) == 2
    for rewards, wanted in seen:
        assert rewards == pytest.approx(wanted, abs=1e-6)
    assert any("l1_exact" in key for entry in trainer.state.log_history for key in entry)
