"""An engine behind a queue, as hosts with servers use it."""

import threading
import time

import pytest
import torch
from transformers import AutoTokenizer

from paceline.rl.integrations.host import host_config
from paceline.rl.integrations.server import EngineServer
from paceline.rl.models.loading import load_policy
from paceline.rl.models.policies import fetch_policy
from paceline.rollout import FinishReason, Request, SamplingParams
from tests.engines import worst_gap

SECTIONS = {
    "speculation": {"drafters": ["suffix", "eagle3"]},
    "drafter": {
        "schedule": "always",
        "draft_vocab_size": 48,
        "unroll": 2,
        "tokens_per_microbatch": 128,
        "held_out_every": 0,
        "judge_every": 1,
    },
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    path = fetch_policy("tiny-llama")
    rollout = {"max_tokens": 24, "max_context": 96, "max_slots": 4, "dtype": "float32"}
    from_host = {"out": str(tmp_path / "out"), "policy": {"mixed_precision": "no"}, "rollout": rollout}
    lines = []
    made = EngineServer(
        host_config(SECTIONS, from_host, alone=False),
        load_policy(path, torch.device("cpu")).requires_grad_(False),
        AutoTokenizer.from_pretrained(path),
        lines.append,
    )
    yield made, load_policy(path, torch.device("cpu"))
    made.close()
    assert not lines


def ask(server, count, tokens=16, seed=0):
    params = SamplingParams(max_tokens=tokens)
    return [
        server.submit(Request([3, 5, 7 + i % 3], params, seed=seed + i, group=i % 3)) for i in range(count)
    ]


def test_requests_weights_and_a_drafter_between_them(server):
    served, model = server
    first = [f.result(60) for f in ask(served, 10)]
    assert worst_gap(model, first) < 1e-3
    # trained meanwhile, and lossless
    assert [f.result(60).token_ids for f in ask(served, 10)] == [r.token_ids for r in first]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    named = [(n, p.detach()) for n, p in model.named_parameters()]
    served.load_weights(named[:5])
    served.load_weights(named[5:])
    served.weights_loaded(3)
    assert served.version == 3
    assert worst_gap(model, [f.result(60) for f in ask(served, 10)]) < 1e-3
    assert served.drafter.spot is not None


def test_pauses_hold_requests_back(server):
    served, _ = server
    served.pause()
    future = ask(served, 1)[0]
    with pytest.raises(TimeoutError):
        future.result(0.5)
    served.resume()
    assert future.result(60).token_ids


def test_requests_wait_for_the_rest_of_an_update(server):
    """None is decoded with half of the weights."""
    served, model = server
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    named = [(n, p.detach()) for n, p in model.named_parameters()]
    served.load_weights(named[:5])
    future = ask(served, 1)[0]
    with pytest.raises(TimeoutError):
        future.result(0.5)
    served.load_weights(named[5:])
    served.weights_loaded(1)
    assert worst_gap(model, [future.result(60)]) < 1e-3


def test_a_pause_comes_through_while_requests_keep_coming(server):
    """What comes after it is not added to what is in flight."""
    served, _ = server
    first = ask(served, 8, tokens=64)
    while not served._flying:
        time.sleep(0.001)
    paused = threading.Thread(target=served.pause)
    paused.start()
    late = []
    while paused.is_alive():
        late += ask(served, 1, tokens=64, seed=1000 + len(late))
        paused.join(0.01)
    assert all(f.done() for f in first)
    assert not late[-1].done()
    served.resume()
    assert all(f.result(120).token_ids for f in late)


def test_a_pause_that_comes_first_holds_what_was_asked_before(server, monkeypatch):
    """Between a request's arrival and the engine's first step: the engine does nothing once `pause` has
    returned.
    """
    served, _ = server
    lock = served._engine_free

    class Late:
        """The lock, which the engine's thread reaches for late."""

        def __enter__(self):
            if threading.current_thread().name == "paceline-engine":
                time.sleep(0.3)
            return lock.__enter__()

        def __exit__(self, *error):
            return lock.__exit__(*error)

    monkeypatch.setattr(served, "_engine_free", Late())
    future = ask(served, 1)[0]
    time.sleep(0.1)
    served.pause()
    with pytest.raises(TimeoutError):
        future.result(1.0)
    served.resume()
    assert future.result(60).token_ids


def test_requests_join_those_in_flight(server):
    """From many threads at once."""
    served, _ = server
    found = []

    def client(number):
        found.extend(f.result(60) for f in ask(served, 3, seed=100 * number))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 18
    assert all(r.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for r in found)


def test_cancelling_ends_what_waits_and_what_is_in_flight(server):
    served, _ = server
    served.pause()
    waiting = ask(served, 3)
    assert served.cancel_all() == 3
    assert all(f.result(5).finish_reason is FinishReason.CANCELLED for f in waiting)
    served.resume()
    assert ask(served, 1)[0].result(60).finish_reason is not FinishReason.CANCELLED


def test_a_failure_reaches_everyone_who_waits(server, monkeypatch):
    served, _ = server

    def broken(*args, **options):
        raise RuntimeError("no engine")

    with monkeypatch.context() as patched:
        patched.setattr(served.worker.engine, "generate", broken)
        futures = ask(served, 3)
        for future in futures:
            with pytest.raises(RuntimeError, match="no engine"):
                future.result(60)
    assert ask(served, 1)[0].result(60).token_ids
