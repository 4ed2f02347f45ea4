"""Training stops within a micro-batch, resumes, and serves only what does better."""

import copy
import gc
import math
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, TCPStore

from paceline.drafter_trainer.coordinator import Coordinator, connect_store
from paceline.drafter_trainer.ensemble_weights import tracking_weights
from paceline.drafter_trainer.initialization import initial_drafter
from paceline.drafter_trainer.spot_trainer import LearnerReport, SpotTrainer
from paceline.drafter_trainer.vocabulary import move_vocabulary
from paceline.rollout.drafters.eagle3_model import eagle3_config
from tests.drafter_trainer.objective.test_training_time_test import buffer_of, learner_for, traces_of
from tests.engines import tiny_llama


@pytest.fixture(scope="module")
def rollouts():
    model = tiny_llama(sharpness=40.0)
    engine, made = traces_of(model, count=16, tokens=40, slots=8)
    return model, engine, made


def spot_for(setup, *, lr=3e-3, held_out_every=4, passes=8, **options) -> SpotTrainer:
    model, engine, made = setup
    drafter = initial_drafter(
        eagle3_config(model.config, 97, engine.runner.tap_layers), torch.arange(97), model, seed=0
    )
    buffer = buffer_of(made, held_out_every=held_out_every, passes=passes)
    return SpotTrainer([learner_for(drafter, model, lr=lr)], buffer, budget=64, **options)


# how often `stop` is asked
UPDATE = 1 + 2 * 3  # before an update, and at each of three draft positions, forward and back
JUDGING = 3  # in a judgement: once for each batch of the four sequences kept back


def after(calls: int):
    """Says stop once it has been asked so often."""
    left = [calls]

    def stop() -> bool:
        left[0] -= 1
        return left[0] < 0

    return stop


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_stops_within_a_microbatch_and_goes_on_where_it_stopped(rollouts):
    cut, whole = spot_for(rollouts, judge_every=1000), spot_for(rollouts, judge_every=1000)
    reports = [cut.run(after(3 * UPDATE)) for _ in range(3)]
    assert [r.updates for r in reports] == [3, 3, 3]
    whole.run(after(9 * UPDATE))
    torch.testing.assert_close(weights(cut.learner.model), weights(whole.learner.model))


def test_an_update_is_broken_off_anywhere_and_done_again(rollouts):
    broken, whole = spot_for(rollouts, judge_every=1000), spot_for(rollouts, judge_every=1000)
    for asked in range(1, UPDATE):  # the second update of each run is broken off, forward or back
        assert broken.run(after(UPDATE + asked)).updates == 1
    whole.run(after((UPDATE - 1) * UPDATE))
    assert torch.equal(weights(broken.learner.model), weights(whole.learner.model))


def test_a_judgement_is_broken_off_too(rollouts):
    spot = spot_for(rollouts, judge_every=1)
    report = spot.run(after(UPDATE + 1 + 1))
    assert report.updates == 1 and report.approved == 0 and report.serving_length == 0
    report = spot.run(after(1 + 2 * JUDGING))
    assert report.updates == 0 and report.approved == 1


def test_only_what_does_better_is_served(rollouts):
    good = spot_for(rollouts)
    before = weights(good.serving).clone()
    report = good.run(lambda: False)
    assert report.approved > 0
    assert report.candidate_length > report.serving_length > 1
    assert torch.equal(weights(good.serving), before)  # not before all ranks adopt it
    good.adopt([p.detach().clone() for p in good.approved.parameters()])
    assert torch.equal(weights(good.serving), weights(good.approved))
    assert not torch.equal(weights(good.serving), before)
    good.buffer.begin_step()
    good.buffer.add(rollouts[2])
    again = good.run(lambda: False)
    assert again.serving_length > report.serving_length

    good.adopt([p.detach().clone() for p in good.approved.parameters()])
    before = weights(good.approved).clone()
    for learner in good.learners:  # from now on every update ruins what was learned
        learner.scale_rate(1e4)
    good.buffer.begin_step()
    good.buffer.add(rollouts[2])
    report = good.run(lambda: False)
    assert report.updates > 0 and report.approved == 0
    assert torch.equal(weights(good.approved), before)


def test_weights_that_are_not_finite_are_never_approved(rollouts):
    """Also where nothing is kept back to judge by; training goes on from the approved weights, with fresh
    moments.
    """
    spot = spot_for(rollouts, judge_every=1, held_out_every=0)
    before = weights(spot.approved).clone()
    with torch.no_grad():
        spot.learner.model.fc.weight[0, 0] = float("nan")
        spot.learner.model.lm_head.weight.fill_(float("inf"))
    spot._unjudged = 1
    assert spot._approve(LearnerReport(), torch.zeros(0), lambda: False)
    assert torch.equal(weights(spot.approved), before) and torch.equal(weights(spot.learner.model), before)
    report = spot.run(lambda: False)
    assert report.approved > 0 and bool(weights(spot.approved).isfinite().all())
    with torch.no_grad():
        spot.approved.fc.weight[0, 0] = float("nan")
    spot.forget_approved()
    assert torch.equal(weights(spot.approved), before) and torch.equal(weights(spot.learner.model), before)
    assert not spot.learner.optimizer.state


def test_weights_refused_three_times_are_given_up(rollouts, monkeypatch):
    """Training then goes on from the approved ones, not further into the wrong."""
    spot = spot_for(rollouts, judge_every=1)
    learner = spot.learner
    original = learner.evaluate

    def disliking_the_newest(pieces, model=None):
        outcome = original(pieces, model)
        return replace(outcome, by_piece=outcome.by_piece - (5.0 if model is learner.model else 0.0))

    monkeypatch.setattr(learner, "evaluate", disliking_the_newest)
    before = weights(learner.model).clone()
    cycle = UPDATE + 1 + JUDGING  # an update and its judgement
    spot.run(after(JUDGING + 2 * cycle))
    assert not torch.equal(weights(learner.model), before)
    spot.run(after(JUDGING + cycle))
    assert torch.equal(weights(learner.model), before)


def test_adopting_keeps_newer_updates(rollouts):
    """Where this rank has trained on since its approval, the others' mean comes in below that."""
    spot = spot_for(rollouts, judge_every=2)
    spot.run(after(2 * UPDATE + 1 + 2 * JUDGING + UPDATE))
    newest, approved = weights(spot.learner.model).clone(), weights(spot.approved).clone()
    mean = [p.detach() + 0.5 for p in spot.approved.parameters()]
    spot.adopt(mean)
    torch.testing.assert_close(weights(spot.learner.model), newest + 0.5)
    torch.testing.assert_close(weights(spot.serving), approved + 0.5)


def test_ranks_train_while_others_are_busy_and_stop_when_all_are_idle():
    store = HashStore()
    a, b, c = (Coordinator(store, 3, least_idle=2) for _ in range(3))
    for rank in (a, b, c):
        rank.begin(5)
    assert not a.may_train()
    a.idle()
    assert not a.may_train() and a.others_busy()  # two must be idle
    b.idle()
    assert a.may_train() and b.may_train()
    c.idle()
    assert not a.may_train() and not a.others_busy()
    for rank in (a, b, c):
        rank.begin(6)
    a.idle()
    assert a.others_busy()


def test_a_silent_rank_ends_training():
    """A rank that died while it was busy never becomes idle: those that wait for it stop, and the step's
    collectives report it.
    """
    now = [0.0]
    store = HashStore()
    busy, idle = (Coordinator(store, 2, clock=lambda: now[0]) for _ in range(2))
    busy.begin(0)
    idle.begin(0)
    idle.idle()
    for _ in range(200):
        now[0] += 1.5
        busy.beat()
        assert idle.may_train()
    now[0] += 61
    assert not idle.may_train()
    idle.wait_until_training()  # returns


def test_a_lost_store_means_no_training_and_says_so_once():
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Broken pipe\nstack")

    coordinator = Coordinator(Gone(), 2)
    coordinator.begin(0)
    coordinator.idle()
    assert not coordinator.may_train()
    coordinator.wait_until_training()
    assert "Broken pipe" in coordinator.take_problem()
    coordinator.beat()
    coordinator.idle()
    assert coordinator.take_problem() is None


def test_one_rank_alone_never_waits():
    coordinator = Coordinator(None, 1)
    coordinator.begin(0)
    coordinator.idle()
    coordinator.wait_until_training()
    assert not coordinator.may_train()


def test_training_stops_when_another_thread_becomes_idle(rollouts):
    """The whole: a rank trains for as long as the other decodes, and stops soon after."""
    store = HashStore()
    mine, other = Coordinator(store, 2), Coordinator(store, 2)
    mine.begin(0)
    other.begin(0)
    spot = spot_for(rollouts, passes=100_000)
    threading.Timer(0.5, other.idle).start()
    started = time.perf_counter()
    mine.idle()
    mine.wait_until_training()
    report = spot.run(lambda: not mine.may_train())
    assert report.updates > 0
    assert 0.4 < time.perf_counter() - started < 5


def test_a_changed_vocabulary_keeps_what_is_known_of_tokens_that_stay(rollouts):
    model, engine, made = rollouts
    old, new = torch.arange(0, 40), torch.arange(20, 60)
    drafter = initial_drafter(eagle3_config(model.config, 40, engine.runner.tap_layers), old, model, seed=0)
    learner = learner_for(drafter, model, lr=1e-3)
    spot = SpotTrainer([learner], buffer_of(made), budget=64)
    spot.run(after(8 * UPDATE))
    rows = drafter.lm_head.weight.detach().clone()
    moments = learner.optimizer.state[drafter.lm_head.weight]["exp_avg"].clone()
    move_vocabulary(drafter, learner.optimizer, new, model.lm_head)
    spot.replace_model()
    assert torch.equal(drafter.vocabulary, new)
    assert torch.equal(drafter.lm_head.weight[:20], rows[20:])
    assert torch.equal(drafter.lm_head.weight[20:].detach(), model.lm_head.weight[40:60].detach())
    state = learner.optimizer.state[drafter.lm_head.weight]["exp_avg"]
    assert torch.equal(state[:20], moments[20:]) and not state[20:].any()
    assert spot.run(after(8 * UPDATE)).updates > 0


def test_over_the_launchers_store_and_when_it_dies(monkeypatch):
    """Two ranks over TCP as torchrun hosts it; its death is noticed within seconds and ends training."""
    host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(host.port))
    a, b = (Coordinator(connect_store(2), 2) for _ in range(2))
    for rank in (a, b):
        rank.begin(3)
    a.idle()
    assert a.may_train() and b.others_busy()
    del host
    gc.collect()
    started = time.perf_counter()
    assert not a.may_train()
    assert time.perf_counter() - started < 15
    assert "store cannot be reached" in a.take_problem()
    assert connect_store(1) is None
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("paceline.drafter_trainer.coordinator._CONNECT_TIMEOUT_SECONDS", 1.0)
    assert connect_store(2) is None  # no store there: no training, no error


def ensemble_for(setup, rates) -> SpotTrainer:
    model, engine, made = setup
    drafter = initial_drafter(
        eagle3_config(model.config, 97, engine.runner.tap_layers), torch.arange(97), model, seed=0
    )
    learners = [learner_for(copy.deepcopy(drafter), model, lr=lr) for lr in rates]
    return SpotTrainer(learners, buffer_of(made, held_out_every=4, passes=8), budget=64, judge_every=2)


def test_an_ensemble_proposes_the_one_that_does_best(rollouts):
    """One learns too slowly to matter, one ruins itself: the third is served; the ruined one starts again
    from what is approved.
    """
    spot = ensemble_for(rollouts, (1e-7, 3e-3, 10.0))
    learners, drafter = spot.learners, copy.deepcopy(spot.serving)
    report = spot.run(lambda: False)
    assert spot.learner is learners[1]
    assert sum(report.ensemble) == pytest.approx(1) and max(report.ensemble) == report.ensemble[1] > 0.8
    assert report.approved > 0
    spot.adopt([p.detach() for p in spot.approved.parameters()])
    assert torch.equal(weights(spot.serving), weights(spot.approved))
    assert not torch.equal(weights(spot.serving), weights(drafter))
    assert not torch.equal(weights(learners[0].model), weights(learners[1].model))


def test_a_restored_ensemble_goes_on_as_the_one_that_was_stored(rollouts):
    rates = (1e-3, 3e-3)
    first, again = ensemble_for(rollouts, rates), ensemble_for(rollouts, rates)
    first.run(after(60))
    again.restore(copy.deepcopy(first.ensemble()))
    assert again.weights == first.weights != [0.5, 0.5]
    pieces = first.buffer.next_batch(64)
    for old, new in zip(first.learners, again.learners, strict=True):
        assert torch.equal(weights(old.model), weights(new.model))
        for learner in (old, new):
            learner.update(pieces, [1.0] * len(pieces))
        assert torch.equal(weights(old.model), weights(new.model))
    assert not torch.equal(weights(again.learners[0].model), weights(again.learners[1].model))
    assert spot_for(rollouts).ensemble() is None
    with pytest.raises(ValueError, match=r"it has 2 drafters, drafter\.ensemble has 3"):
        ensemble_for(rollouts, (1e-3, 1e-3, 1e-3)).restore(first.ensemble())


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (
            lambda state: state.optimizers[1]["state"][0].update(exp_avg=torch.zeros(3)),
            "exp_avg has the shape",
        ),
        (lambda state: setattr(state.models[1].fc, "weight", torch.nn.Parameter(torch.zeros(2, 2))), "shape"),
    ],
)
def test_an_ensemble_of_another_shape_changes_nothing(rollouts, broken, reason):
    stored, other = ensemble_for(rollouts, (1e-3, 3e-3)), ensemble_for(rollouts, (1e-3, 3e-3))
    stored.run(after(60))
    state, before = copy.deepcopy(stored.ensemble()), [weights(x.model) for x in other.learners]
    broken(state)
    with pytest.raises(ValueError, match=reason):
        other.restore(state)
    assert all(map(torch.equal, before, (weights(x.model) for x in other.learners)))
    assert not any(learner.optimizer.state for learner in other.learners)


def test_every_learner_gets_every_batch_and_a_stop_cuts_between_them(rollouts, monkeypatch):
    model, engine, made = rollouts
    drafter = initial_drafter(
        eagle3_config(model.config, 97, engine.runner.tap_layers), torch.arange(97), model, seed=0
    )
    learners = [learner_for(copy.deepcopy(drafter), model, lr=1e-3) for _ in range(2)]
    spot = SpotTrainer(learners, buffer_of(made, held_out_every=0), budget=64, judge_every=1000)
    seen: list[tuple[int, list]] = []
    for number, learner in enumerate(learners):
        original = learner.update
        monkeypatch.setattr(
            learner,
            "update",
            lambda p, w, stop, number=number, original=original: (
                seen.append((number, p)) or original(p, w, stop)
            ),
        )
    assert spot.run(after(2 * (UPDATE + 6) + UPDATE)).updates == 5
    assert [number for number, _ in seen] == [0, 1, 1, 0, 0, 1]  # the last one was broken off
    assert seen[0][1] == seen[1][1] != seen[2][1] == seen[3][1]


@given(st.lists(st.floats(1, 6) | st.just(math.nan), min_size=1, max_size=5), st.data())
def test_weights_are_a_distribution_that_leaves_none_behind(lengths, data):
    raw = data.draw(st.lists(st.floats(0.01, 1), min_size=len(lengths), max_size=len(lengths)))
    new = tracking_weights([x / sum(raw) for x in raw], lengths, share=0.05)
    assert sum(new) == pytest.approx(1) and min(new) >= 0.05 / len(new) - 1e-12


def test_weights_by_hand_and_back_after_a_change():
    """Two of equal weight, ln 3 / η apart: 3/4 and 1/4, mixed with a fifth of one half each."""
    gap = math.log(3) / 8
    assert tracking_weights([0.5, 0.5], [2 + gap, 2.0], rate=8, share=0.2) == pytest.approx([0.7, 0.3])
    weights = [0.5, 0.5]
    for _ in range(50):
        weights = tracking_weights(weights, [2.2, 2.0])
    for _ in range(4):
        weights = tracking_weights(weights, [2.0, 2.3])
    assert weights[1] > 0.8
