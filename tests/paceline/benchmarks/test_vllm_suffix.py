"""The comparison of group drafts inside vLLM: what is decoded, and what its ratios divide; vLLM is played."""

from pathlib import Path

from paceline.benchmarks.common.harness import Workload
from paceline.benchmarks.decoding import vllm_suffix
from paceline.benchmarks.decoding.vllm_suffix import BATCHES, SETTINGS, SuffixRow, measure, suffix_table
from paceline.rollout import Request, SamplingParams


class Bench:
    """A long-tailed batch of two prompts, after one of others."""

    policy, path, params, tail_cap = None, None, SamplingParams(stop_token_ids=(1,)), 32

    def workloads(self, only):
        assert only == ["tail"]
        ended = SamplingParams(max_tokens=5)
        timed = [Request([2 + i % 2], ended, seed=i) for i in range(4)]
        return [Workload("tail", 4, timed, [Request([9], ended, seed=1)])]

    def with_natural_lengths(self, requests):
        assert all(r.params == SamplingParams(max_tokens=32, stop_token_ids=(1,)) for r in requests)
        return list(requests)


def test_all_settings_warm_up_and_then_decode_two_epochs_of_the_same_prompts(monkeypatch):
    calls = []

    class Peers:
        def __init__(self, policy, path, python):
            pass

        def run_vllm(self, workloads, repeats, speculative, *, environment, **options):
            calls.append((speculative, options, environment, workloads))
            return [{"tokens": 10, "seconds": 2.0} for _ in workloads]

    monkeypatch.setattr(vllm_suffix, "Peers", Peers)
    rows = list(measure(Bench(), Path("python"), Path("arctic"), SETTINGS, rounds=2))
    order = list(dict.fromkeys((row.round, row.setting) for row in rows))
    assert [setting for _, setting in order[:5]] == [setting for _, setting in order[:4:-1]]
    assert [row.batch for row in rows[:3]] == list(BATCHES)
    for _, _, _, workloads in calls:
        assert workloads == calls[0][3]
    (_, others, first), (_, epoch, again_first), (_, again, _) = calls[0][3]
    assert [r.prompt_ids for r in epoch] == [r.prompt_ids for r in again]
    assert not {r.seed for r in epoch} & {r.seed for r in again}
    prompts = [{tuple(r.prompt_ids) for r in batch} for batch in (others, epoch, first + again_first)]
    assert not prompts[0] & prompts[1] and prompts[2] <= prompts[0]
    by_method = {
        speculative["method"]: (speculative, environment) for speculative, _, environment, _ in calls[1:5]
    }
    assert by_method["custom_class"][0]["num_speculative_tokens_per_batch_size"][0] == [1, 1, 0]
    assert by_method["suffix"][1]["VLLM_PLUGINS"] == "paceline"
    assert by_method["suffix"][1]["PYTHONPATH"].startswith(str(Path("arctic").resolve()))


def test_ratios_are_of_the_fastest_rounds():
    rows = [
        SuffixRow(number, "epoch 1", setting, 100, seconds, 20, 30 if setting == "group" else 0)
        for setting, times in (("plain", (1.0, 3.0)), ("ngram", (5.0, 2.0)), ("group", (1.0, 0.5)))
        for number, seconds in enumerate(times, 1)
    ]
    table = suffix_table(rows)
    cells = [list(column.cells) for column in table.columns]
    assert cells[2] == ["100.0", "50.0", "200.0"]
    assert cells[3] == ["1.00", "0.50", "2.00"]
    assert cells[4] == ["", "1.00", "4.00"]
    assert cells[5][2] == "2.50" and cells[6][2] == "0.30"
