"""An engine's server under everything that can happen to it at once: a state machine, and each fault by
itself.
"""

import time
from concurrent.futures import Future, wait

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from transformers import AutoTokenizer

from paceline.rl.integrations.host import host_config
from paceline.rl.integrations.server import EngineServer
from paceline.rl.models.loading import load_policy
from paceline.rl.models.policies import fetch_policy
from paceline.rollout import FinishReason, Request, RolloutEngine, SamplingParams

PROMPTS = [[3, 5, 7], [3, 5, 8, 9], [11], [20, 21, 22, 23, 24]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


def policies():
    """Two policies with other answers to every prompt, and those answers by an engine without speculation."""
    path = fetch_policy("tiny-llama")
    made = [load_policy(path, torch.device("cpu")).requires_grad_(False) for _ in range(2)]
    generator = torch.Generator().manual_seed(5)
    for p in made[1].parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=generator))
    engines = [RolloutEngine(m, dtype=torch.float32, max_slots=4, max_context=64) for m in made]
    answers = [[r.token_ids for r in e.generate([Request(p, GREEDY) for p in PROMPTS])] for e in engines]
    weights = [[(n, p.clone()) for n, p in m.named_parameters()] for m in made]
    assert all(a != b for a, b in zip(*answers, strict=True))
    return path, weights, answers


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PACELINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield policies()


def start(known, out, lines):
    path, _, _ = known
    rollout = {"max_tokens": 24, "max_context": 64, "max_slots": 3, "dtype": "float32"}
    options = {"speculation": {"drafters": ["suffix"]}, "drafter": {"schedule": "always"}}
    config = host_config(
        options, {"out": str(out), "policy": {"mixed_precision": "no"}, "rollout": rollout}, alone=False
    )
    policy = load_policy(path, torch.device("cpu")).requires_grad_(False)
    return EngineServer(config, policy, AutoTokenizer.from_pretrained(path), lines.append)


def once(error):
    """A function that raises once, then does what it replaced."""

    def replace(patched, owner, name):
        real = getattr(owner, name)

        def broken(*args, **options):
            patched.setattr(owner, name, real)
            raise error

        patched.setattr(owner, name, broken)

    return replace


class Machine(RuleBasedStateMachine):
    """Whatever comes in whatever order: every future ends, and what it holds are the tokens of one of the
    weights that were whole while it waited."""

    known = None  # the module's policies
    out = None

    @initialize()
    def begin(self):
        self.patched = pytest.MonkeyPatch()
        self.lines = []
        self.server = start(self.known, self.out, self.lines)
        # with the prompt, and how many weights there had been before
        self.futures: list[tuple[Future, int, int]] = []
        self.serving = [0]  # every weights that were whole, in order
        self.half: int | None = None  # an update under way
        self.mixed = False

    @rule(prompt=st.integers(0, 3), count=st.integers(1, 4))
    def submit(self, prompt, count):
        for i in range(count):
            which = (prompt + i) % len(PROMPTS)
            self.futures.append(
                (self.server.submit(Request(PROMPTS[which], GREEDY, seed=i)), which, len(self.serving) - 1)
            )

    @rule(data=st.data())
    def cancel_one(self, data):
        if self.futures:
            data.draw(st.sampled_from(self.futures))[0].cancel()

    @rule()
    def cancel_all(self):
        self.server.cancel_all()

    @rule()
    def pause(self):
        self.server.pause()

    @rule()
    def resume(self):
        self.server.resume()

    @rule(which=st.integers(0, 1))
    def half_an_update(self, which):
        if self.half is None:
            self.server.load_weights(self.known[1][which][:5])
            self.half = which

    @rule()
    def the_other_half(self):
        if self.half is not None:
            self.server.load_weights(self.known[1][self.half][5:])
            self.serving.append(self.half)
            self.half, self.mixed = None, False
            self.server.weights_loaded(len(self.serving))

    @rule(fault=st.sampled_from(["name", "shape"]), first=st.integers(0, 3))
    def a_broken_update(self, fault, first):
        """With ``first`` good weights before the bad one."""
        name, tensor = self.known[1][0][4]
        bad = ("model.nothing.weight", tensor) if fault == "name" else (name, tensor[..., :1])
        with pytest.raises(ValueError, match="send the weights of the policy"):
            self.server.load_weights([*self.known[1][1 - self.serving[-1]][:first], bad])
        self.mixed |= first > 0 or self.half is not None
        self.half = None

    @rule(where=st.sampled_from(["generate", "learn_from"]))
    def fail_once(self, where):
        owner = self.server.worker.engine if where == "generate" else self.server.drafter
        once(RuntimeError("once"))(self.patched, owner, where)

    def teardown(self):
        if not hasattr(self, "server"):
            return
        try:
            self.the_other_half()
            self.server.resume()
            _, waiting = wait([f for f, _, _ in self.futures], timeout=60)
            assert not waiting
            for future, prompt, since in self.futures:
                self.check(future, prompt, since)
            self.patched.undo()
            if not self.mixed:
                again = self.server.submit(Request(PROMPTS[0], GREEDY)).result(60)
                assert again.token_ids == self.known[2][self.serving[-1]][0]
        finally:
            self.patched.undo()
            self.server.close()
        assert all("once" in line for line in self.lines)

    def check(self, future, prompt, since):
        if future.cancelled():
            return
        if future.exception() is not None:
            said = str(future.exception())
            assert said == "once" or "the last update of weights failed" in said
            return
        rollout = future.result()
        answers = [self.known[2][which][prompt] for which in self.serving[since:]]
        if rollout.finish_reason is FinishReason.CANCELLED:
            assert any(a[: len(rollout.token_ids)] == rollout.token_ids for a in answers)
        else:
            assert rollout.token_ids in answers


def run_machine(known, out, examples, steps):
    Machine.known, Machine.out = known, out
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=quiet,
        database=None,
    )
    run_state_machine_as_test(Machine, settings=options)


def test_every_future_ends_with_tokens_of_whole_weights(known, tmp_path):
    run_machine(known, tmp_path, examples=15, steps=12)


@pytest.mark.slow
def test_every_future_ends_in_longer_stories(known, tmp_path):
    run_machine(known, tmp_path, examples=500, steps=40)


@pytest.fixture
def server(known, tmp_path):
    lines = []
    made = start(known, tmp_path, lines)
    yield made, lines
    made.close()


def test_a_cancelled_future_fails_no_neighbour(server, known):
    served, _ = server
    long = SamplingParams(max_tokens=56)
    futures = [served.submit(Request(PROMPTS[i % 4], long, seed=i)) for i in range(6)]
    while not served._flying:
        time.sleep(0.001)
    cancelled = [futures[i].cancel() for i in (1, 4)]  # one is decoded, one waits for a slot
    assert any(cancelled)
    for i, future in enumerate(futures):
        if not future.cancelled():
            assert future.result(60).finish_reason is FinishReason.LENGTH, i


def test_one_request_object_twice_is_cancelled_apart(server):
    served, _ = server
    request = Request(PROMPTS[0], GREEDY)
    served.pause()
    first, second = served.submit(request), served.submit(request)
    first.cancel()
    served.resume()
    assert second.result(60).finish_reason is FinishReason.LENGTH


def test_a_bad_name_leaves_the_old_weights_serving(server, known):
    served, _ = server
    with pytest.raises(ValueError, match=r"'model\.nothing'"):
        served.load_weights([("model.nothing", torch.zeros(3))])
    assert served.submit(Request(PROMPTS[1], GREEDY)).result(60).token_ids == known[2][0][1]


def test_a_mix_of_old_and_new_weights_is_never_decoded_with(server, known):
    served, _ = server
    _, weights, answers = known
    with pytest.raises(ValueError, match="shape"):
        served.load_weights([*weights[1][:3], (weights[1][3][0], torch.zeros(1))])
    with pytest.raises(RuntimeError, match="send all weights again"):
        served.submit(Request(PROMPTS[1], GREEDY)).result(60)
    served.load_weights(weights[1][1:])
    with pytest.raises(ValueError, match=weights[1][0][0]):
        served.weights_loaded(1)
    served.load_weights(weights[1])
    served.weights_loaded(2)
    assert served.submit(Request(PROMPTS[1], GREEDY)).result(60).token_ids == answers[1][1]


def test_learning_that_fails_is_said_and_given_up(server, monkeypatch):
    served, lines = server

    def broken(*args):
        raise ZeroDivisionError("no loss")

    monkeypatch.setattr(served.drafter, "learn_from", broken)
    monkeypatch.setattr(type(served.drafter), "missing", False)
    served.drafter.spot = object()
    for _ in range(5):
        assert served.submit(Request(PROMPTS[0], GREEDY)).result(60).token_ids
    served.pause()
    assert [line.endswith("not trained any more") for line in lines] == [False, False, True]
    assert all("ZeroDivisionError: no loss" in line for line in lines)
    served.resume()


def test_closing_a_paused_server_cancels_what_waits(known, tmp_path):
    served = start(known, tmp_path, [])
    served.pause()
    future = served.submit(Request(PROMPTS[0], GREEDY))
    served.close()
    assert future.result(5).finish_reason is FinishReason.CANCELLED
    with pytest.raises(RuntimeError, match="closed"):
        served.submit(Request(PROMPTS[0], GREEDY))
