"""Group drafts for vLLM, whose model runner is played by arrays: who shares with whom, for how long, and what
a draft is.
"""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from paceline.rollout.backends.adaptive.vllm_options import VARIABLE
from paceline.rollout.backends.vllm_suffix import GroupSuffixProposer, RunnerStep

LONGEST = 64
PROMPT = [1, 2, 3]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def proposer():
    return GroupSuffixProposer(SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST)))


class Runner:
    """Requests by id, in rows of vLLM's arrays; each is (prompt, completion)."""

    def __init__(self, drafter, depth=4):
        self.drafter, self.depth = drafter, depth
        self.requests = {}
        self.waiting = set()

    def step(self, depth=None, reading=(), **new):
        """Commits new tokens of each request and returns the drafts of all by id; ``reading`` are requests
        whose prompts are not read to the end.
        """
        for name, tokens in new.items():
            self.requests[name][1].extend(tokens)
        rows = [name for name in self.requests if name not in self.waiting]
        sampled = [[] if name in reading else list(new.get(name, [0])) for name in rows]
        texts = [prompt + text for prompt, text in (self.requests[name] for name in rows)]
        ids = np.full((len(rows) + 1, LONGEST), -7, dtype=np.int32)
        for row, text in zip(ids, texts, strict=False):
            row[: len(text)] = text
        lengths = np.array([*map(len, texts), 0], dtype=np.int32)
        prompts = np.array([*(len(self.requests[name][0]) for name in rows), 0], dtype=np.int32)
        self.drafter.step = RunnerStep(self.depth if depth is None else depth, rows, prompts, self.requests)
        return dict(zip(rows, self.drafter.propose(sampled, lengths, ids, slot_mappings=None), strict=True))

    def admit(self, prompt=PROMPT, **completions):
        for name, completion in completions.items():
            self.requests[name] = (list(prompt), list(completion))

    def finish(self, *names):
        for name in names:
            del self.requests[name]


def test_siblings_share_their_tokens_in_the_step_in_which_they_come():
    runner = Runner(proposer())
    runner.admit(a=[11, 12, 13, 14, 15, 16], b=[11])
    assert runner.step() == {"a": [], "b": [12, 13, 14]}
    runner.admit(c=[11, 12, 13, 14, 15, 16], d=[11, 12, 13, 14, 15, 16])
    assert runner.step(b=[12])["b"] == [13, 14, 15, 16]
    runner.step(b=[60, 61])
    assert runner.step(a=[60, 61], b=[62])["a"] == [62], "though its row comes first"


def test_only_the_samples_of_a_prompt_share():
    runner = Runner(proposer())
    runner.admit(a=[11, 12, 13, 14])
    runner.admit(prompt=[1, 2, 4], b=[11])
    runner.admit(prompt=[1, 2, 3, 11], c=[12])
    assert runner.step() == {"a": [], "b": [], "c": []}


def test_finished_completions_are_drafted_from_in_later_epochs():
    drafter = proposer()
    runner = Runner(drafter)
    runner.admit(a=[11, 12, 13, 14])
    runner.step()
    runner.finish("a")
    assert runner.step() == {}
    runner.admit(b=[11])
    assert runner.step()["b"][:1] == [12]
    assert list(drafter._sequences) == ["b"]


def test_the_least_recently_used_prompts_are_dropped(monkeypatch):
    monkeypatch.setenv(VARIABLE, json.dumps({"suffix_tokens": 40}))
    drafter = proposer()
    runner = Runner(drafter)

    def sample(prompt):
        """Decodes a sample of 10 tokens and returns whether the first token was enough to draft the next."""
        runner.admit(prompt=[prompt], a=[100 + prompt])
        draft = runner.step()["a"]
        runner.step(a=range(200, 209))
        runner.finish("a")
        runner.step()
        return bool(draft)

    assert [sample(prompt) for prompt in (1, 2, 1, 2)] == [False, False, True, True]
    assert [sample(prompt) for prompt in range(3, 20)] == [False] * 17
    assert [sample(prompt) for prompt in (19, 18, 1)] == [True, True, False]
    assert drafter._texts._states <= 80


def test_running_requests_of_a_dropped_prompt_add_only_their_new_tokens(monkeypatch):
    """Otherwise each step of many long texts would read all of them again."""
    monkeypatch.setenv(VARIABLE, json.dumps({"suffix_tokens": 10}))
    drafter = proposer()
    runner = Runner(drafter)
    for prompt in range(4):
        runner.admit(prompt=[prompt], **{f"r{prompt}": range(10, 30)})
    runner.step()
    runner.step(r0=[50, 51], r1=[50, 51], r2=[50, 51], r3=[50, 51])
    assert drafter._texts._states <= 2 * (1 + 2) * 4
    assert runner.step(r0=[60], r1=[60], r2=[60], r3=[60]).keys() == runner.requests.keys()
    assert runner.step(r0=[50])["r0"][:1] == [51]


def test_the_scheduler_says_how_much_is_drafted_and_the_context_ends_it():
    runner = Runner(proposer())
    text = list(range(10, 40))
    for name in "abcd":
        runner.admit(**{name: text})
    runner.admit(e=text[:5])
    assert runner.step(depth=0) == {name: [] for name in "abcde"}
    assert runner.step(depth=3, e=[15])["e"] == [16, 17, 18]
    assert len(runner.step(depth=500, e=[16])["e"]) > 7
    longest = [*PROMPT, *text, 1, 2]
    runner.finish(*"abcde")
    runner.admit(prompt=longest, **dict.fromkeys("fgh", text[:29]))
    runner.admit(prompt=longest, i=text[:25])
    assert runner.step(depth=10)["i"] == text[25:28], "one place is left for the token that vLLM samples"


def test_drafts_end_where_they_become_unlikely():
    runner = Runner(proposer())
    runner.admit(a=[5, 6, 7, 8, 9, 10, 11, 12], b=[5])
    assert runner.step(depth=7)["b"] == [6, 7, 8], "1/2 each: a text that was seen once"
    runner.admit(c=[5, 6, 7, 8, 9, 10, 11, 12], d=[5, 6, 7, 8, 9, 10, 11, 12])
    assert runner.step(depth=7, b=[6])["b"] == [7, 8, 9, 10, 11, 12], "about 3/4 each"


def test_requests_that_wait_for_memory_or_read_their_prompts_add_nothing_twice():
    drafter = proposer()
    runner = Runner(drafter)
    runner.admit(a=[11, 12], b=[])
    runner.step(reading=["b"])
    assert list(drafter._sequences) == ["a"]
    known = drafter._sequences["a"]
    runner.waiting.add("a")
    runner.step(b=[11])
    runner.waiting.clear()
    runner.step(a=[13], b=[12])
    (group,) = drafter._texts._groups.values()
    assert len(group.live) == 2
    assert drafter._sequences["a"] is known
    for other in ([9, 9], [8] * 9):  # another request with a finished one's id
        runner.requests["a"] = (other, [1])
        assert runner.step(b=[13])["a"] == []
        assert drafter._sequences["a"].tokens == [*other, 1]


def test_an_error_costs_the_drafts_only(caplog):
    drafter = proposer()
    runner = Runner(drafter)
    runner.admit(a=[11, 12, 11])
    assert runner.step()["a"] == [12, 11, 12]
    untold = np.array([[*PROMPT, 11, 12, 11]])
    assert drafter.propose([[1]], np.array([6]), untold) == [[]], (
        "vLLM's runner has not said which step it is"
    )
    assert runner.step(a=[12, 11]) == {"a": []}
    assert caplog.text.count("nothing is drafted any more") == 1


def test_vllms_runner_tells_this_proposer_what_it_needs_and_no_other(monkeypatch):
    class GPUModelRunner:
        def __init__(self, drafter):
            self.drafter, self.requests = drafter, {"a": None}
            self.input_batch = SimpleNamespace(req_ids=["a"], num_prompt_tokens=[3])

        def propose_draft_token_ids(self, scheduler_output, sampled, *, more):
            return self.drafter.step, sampled, more

    module = ModuleType("vllm.v1.worker.gpu_model_runner")
    module.GPUModelRunner = GPUModelRunner
    monkeypatch.setitem(sys.modules, module.__name__, module)
    runner, output = GPUModelRunner(proposer()), SimpleNamespace(num_spec_tokens_to_schedule=5)
    wrapped = GPUModelRunner.propose_draft_token_ids
    told, *passed = runner.propose_draft_token_ids(output, "sampled", more=1)
    assert (told.depth, told.rows, told.prompt_lengths) == (5, ["a"], [3])
    assert "a" in told.unfinished
    assert passed == ["sampled", 1]
    proposer()
    assert GPUModelRunner.propose_draft_token_ids is wrapped
    runner.drafter = SimpleNamespace(step=None)
    assert runner.propose_draft_token_ids(output, "sampled", more=1) == (None, "sampled", 1)
