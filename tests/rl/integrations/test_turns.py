"""Conversations with an environment: tokens, masks and columns; through TRL's trainer and the example."""

import runpy
import sys

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from paceline.rl.errors import UserError
from paceline.rl.integrations.trl import paceline_rollouts
from paceline.rl.integrations.turns import answer_ids
from paceline.rl.models.policies import fetch_policy
from paceline.rl.rewards.registry import LengthAware
from tests.engines import forward_logprobs
from tests.support import ROOT

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% "
    "endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield fetch_policy("tiny-llama")


@pytest.fixture(scope="module")
def evaluate(tiny, tmp_path_factory):
    """Runs a rollout function over one prompt's samples, in one trainer for all tests."""
    trainer = trainer_for(
        tiny, tmp_path_factory.mktemp("trainer"), print, lambda completions, **c: [0.0] * len(completions)
    )
    trainer.processing_class.chat_template = None

    def run(rollout_func, longest=40):
        trainer.rollout_func, trainer.max_completion_length = rollout_func, longest
        trainer.evaluate(Dataset.from_list([{"prompt": "4 + 1 ="}]))

    return run


def trainer_for(tiny, folder, rollout_func, rewards, **options):
    args = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 40,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "beta": 0.0,
    }
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1}
    return GRPOTrainer(
        model=str(tiny),
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=str(folder), **{**args, **quiet, **options}),
        train_dataset=Dataset.from_list([{"prompt": f"{i} + 1 ="} for i in range(8)]),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        rollout_func=rollout_func,
    )


def guessing(talk):
    """Ends with the first turn that has a digit."""
    talk.columns["digits"] = sum(c.isdigit() for c in talk.turns[-1])
    return None if talk.columns["digits"] > 2 else "?\n"


def test_a_conversation_reaches_the_loss_and_the_rewards(tiny, tmp_path):
    """Tokens are what was drawn and answered, log-probs the policy's own, the mask tells them apart, a turn
    reads what is new.
    """
    rollouts = paceline_rollouts()
    seen, read = [], []

    def play(prompts, trainer):
        inner = rollouts.complete

        def complete(*args, **options):
            done = inner(*args, **options)
            read.append([(r.stats.prefilled, len(r.request.prompt_ids)) for r in done])
            return done

        rollouts.complete = complete
        found = rollouts.converse(prompts, trainer, guessing, turns=3, turn_tokens=6)
        rollouts.complete = inner
        model = trainer.accelerator.unwrap_model(trainer.model)
        for prompt, ids, logprobs, mask in zip(
            found["prompt_ids"], found["completion_ids"], found["logprobs"], found["env_mask"], strict=True
        ):
            wanted = forward_logprobs(model, prompt, ids)
            own = torch.tensor(mask).bool()
            assert torch.allclose(torch.tensor(logprobs)[own], wanted[own], atol=1e-4)
            assert not torch.tensor(logprobs)[~own].any()
        seen.append(found)
        return found

    def reward(prompts, completions, completion_ids, digits, **columns):
        assert digits == seen[-1]["digits"]
        assert completion_ids == seen[-1]["completion_ids"]
        assert completions == trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        return [float(d) for d in digits]

    trainer = trainer_for(tiny, tmp_path, play, reward)
    trained = []
    inner = trainer._compute_loss

    def loss(model, inputs):
        trained.append(inputs["tool_mask"] * inputs["completion_mask"])
        return inner(model, inputs)

    trainer._compute_loss = loss
    trainer.train()
    tokenizer, found = trainer.processing_class, seen[0]
    assert int(trained[0].sum()) == sum(map(sum, found["env_mask"])) < sum(map(len, found["env_mask"]))
    for ids, mask in zip(found["completion_ids"], found["env_mask"], strict=True):
        answered = tokenizer.decode([t for t, own in zip(ids, mask, strict=True) if not own])
        assert answered in ("", "?\n", "?\n?\n")
    answer = len(tokenizer("?\n", add_special_tokens=False)["input_ids"])
    assert len(read) == 3
    assert all(new == answer + 1 < whole for turn in read[1:] for new, whole in turn)
    assert rollouts._hosted.engine.kept.tokens == 0
    assert len(trainer.state.log_history) > 1


def test_keeping_changes_no_token(evaluate):
    found = []
    for keeps in (True, False):
        rollouts = paceline_rollouts()

        def play(prompts, trainer, rollouts=rollouts, keeps=keeps):
            inner = rollouts.complete
            rollouts.complete = lambda ids, trainer, *, max_tokens, keep: inner(
                ids, trainer, max_tokens=max_tokens, keep=keeps
            )
            found.append(rollouts.converse(prompts, trainer, lambda talk: "?\n", turns=3, turn_tokens=5))
            return found[-1]

        evaluate(play)
    assert found[0]["completion_ids"] == found[1]["completion_ids"]
    assert found[0]["env_mask"] == found[1]["env_mask"]
    samples = {tuple(ids) for ids in found[0]["completion_ids"]}
    # samples of a prompt have seeds of their own in every turn
    assert len(samples) == len(found[0]["completion_ids"])


def test_a_conversation_ends_where_there_is_no_room(evaluate):
    """Both sides' tokens count; an answer that leaves no room for a turn is left out, and so is what follows
    the last turn.
    """
    rollouts, lengths = paceline_rollouts(), []

    def play(prompts, trainer):
        for answer, turns in (("?" * 10, 9), ("?" * 100, 9), ("?", 1)):
            found = rollouts.converse(
                prompts, trainer, lambda talk, answer=answer: answer, turns=turns, turn_tokens=8
            )
            lengths.append({len(ids) for ids in found["completion_ids"]})
            assert all(mask[-1] == 1 for mask in found["env_mask"])
        return found

    evaluate(play, longest=30)
    assert 8 < max(lengths[0]) <= 30
    assert max(lengths[1]) <= 8
    assert max(lengths[2]) <= 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"turns": 0}, "turns is 0"),
        ({"turns": True}, "turns is True"),
        ({"turns": 2, "turn_tokens": 1.5}, "turn_tokens is 1.5"),
        ({"turns": 2, "environment": lambda talk: 7}, "the environment answered 7: return a text"),
        (
            {"turns": 2, "environment": lambda talk: [{"role": "user", "content": "x"}]},
            "has no chat template",
        ),
    ],
)
def test_what_cannot_be_played_is_said(evaluate, options, said):
    rollouts = paceline_rollouts()
    options = {"environment": lambda talk: None, "turn_tokens": 4, **options}
    with pytest.raises(UserError, match=said) as found:
        evaluate(lambda prompts, trainer: rollouts.converse(prompts, trainer, **options))
    assert "\n" not in str(found.value)


def test_rewards_that_read_entropies_are_refused(tiny, tmp_path):
    rollouts = paceline_rollouts()
    reward = LengthAware(
        lambda completions, **c: [0.0] * 8, [{"name": "pear", "weight": 0.1}], group_size=4, longest=40
    )
    trainer = trainer_for(tiny, tmp_path, lambda p, t: rollouts.converse(p, t, guessing, turns=2), reward)
    with pytest.raises(UserError, match="entropies support one turn only"):
        trainer.train()


def test_answers_become_tokens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = CHAT
    digit = tokenizer("7", add_special_tokens=False)["input_ids"]
    assert answer_ids(tokenizer, "7", 0, {}) == digit
    assert answer_ids(tokenizer, digit, 0, {}) == digit
    assert answer_ids(tokenizer, [], 0, {}) == []
    told = [{"role": "user", "content": "more"}]
    after_text = answer_ids(tokenizer, told, digit[0], {})
    after_end = answer_ids(tokenizer, told, tokenizer.eos_token_id, {})
    assert after_text == [tokenizer.eos_token_id, *after_end]  # a turn that was cut is ended first
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "7"}, *told],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert whole.endswith("7" + tokenizer.decode(after_text))
    tokenizer.chat_template = "{{ raise_exception('only users speak') }}"
    with pytest.raises(UserError, match="only users speak"):
        answer_ids(tokenizer, told, 0, {})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(UserError, match="changes the text of an assistant's turn"):
        answer_ids(tokenizer, told, 0, {})


def test_the_example_runs(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["calculator.py", "--steps", "1", "--turn-tokens", "6"])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    example = runpy.run_path(str(ROOT / "examples" / "calculator.py"))
    trainer = example["main"]()
    lengths = [
        entry["completions/mean_length"]
        for entry in trainer.state.log_history
        if "completions/mean_length" in entry
    ]
    assert len(lengths) == 1 and lengths[0] > 6  # more than one turn
    environment = runpy.run_path(str(ROOT / "examples" / "calculator_environment.py"))
    assert environment["value"]("12 * -7 + 5") == -79
    for wrong in ("__import__('os')", "2 ** 9", "1 +", "a"):
        with pytest.raises(ValueError):
            environment["value"](wrong)


def test_the_calculator_plays_three_turns(tiny):
    """What the example's environment says to a policy that uses it, and what its reward makes of that."""
    from paceline.rl.integrations.turns import Conversation

    example = runpy.run_path(str(ROOT / "examples" / "calculator_environment.py"))
    talk = Conversation("What is 3 * 4 + 5?", [1])
    for said, answered in (
        ("hm", example["REMINDER"]),
        ("<calc>3 * 4 + 5</calc>", " = 17\n"),
        ("Answer: 17", None),
    ):
        talk.turns.append(said)
        assert example["calculator"](talk) == answered
    assert talk.columns == {"calls": 1, "answer": 17}
    assert example["correct"](["", ""], [17, 17], [17, None], [1, None]) == [1.1, 0.0]
    assert example["correct"]([""], [17]) == [0.0]
