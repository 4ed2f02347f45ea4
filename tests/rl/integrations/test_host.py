"""What hosts log of a step, and that their decode steps are measured."""

from types import SimpleNamespace

import pytest

from paceline.drafter_trainer.spot_trainer import LearnerReport
from paceline.rl.integrations.host import HostedRollouts, step_report
from paceline.rl.types import RankRollouts


def test_hosts_log_what_training_costs_ranks_that_decode():
    batch = RankRollouts([], [], seconds=2.0)
    unknown = step_report(batch, LearnerReport(held_back_seconds=3.0))
    assert unknown["paceline/drafter_held_back_seconds"] == 3.0
    assert "paceline/drafter_slowdown" not in unknown
    known = step_report(batch, LearnerReport(slowdown=0.04))
    assert known["paceline/drafter_slowdown"] == pytest.approx(0.04)


def test_every_decode_step_of_a_host_is_measured():
    hosted, measured = HostedRollouts.__new__(HostedRollouts), []

    def generate(requests, on_step):
        return [on_step(step) for step in ("first", "second")] and []

    hosted.engine = SimpleNamespace(generate=generate, records=[])
    hosted.drafter = SimpleNamespace(beat=measured.append)
    hosted.rollouts([])
    assert measured == ["first", "second"]
