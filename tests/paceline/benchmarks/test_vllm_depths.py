"""Settings of vLLM take turns, each in a process that waits, and medians count."""

import sys
from pathlib import Path

import pytest

from paceline.benchmarks.common.peers import Peers
from paceline.benchmarks.decoding.vllm_depths import DepthRow, depths_table, take_turns
from paceline.rl.errors import UserError
from paceline.rollout import Request, SamplingParams
from tests.engines import tiny_llama

INTERPRETER = """#!{python}
import json, sys
script, model, source, target, turns = sys.argv[1:]
work = json.load(open(source))
print("INFO: loaded")
for line in sys.stdin:
    index, kind = json.loads(line)
    if kind == "broken":
        sys.exit("out of memory")
    requests = work["workloads"][index][kind]
    result = {{"seconds": 2.0, "tokens": sum(r["tokens"] for r in requests)}}
    result["speculative"] = work["speculative"]
    print("PASS", json.dumps(result), flush=True)
"""


@pytest.fixture
def peers(tmp_path):
    path = tmp_path / "python"
    path.write_text(INTERPRETER.format(python=sys.executable))
    path.chmod(0o755)
    return Peers(tiny_llama(), Path("unused"), path)


def requests(tokens):
    return [Request([1, 2], SamplingParams(max_tokens=tokens), seed=0)]


def test_processes_wait_for_their_turns(peers):
    workloads = [(1, requests(5), requests(3)), (2, requests(7), requests(4))]
    with peers.vllm_turns(workloads, None) as plain, peers.vllm_turns(workloads, {"method": "x"}) as drafting:
        assert [plain((0, "warm"))["tokens"], drafting((1, "timed"))["tokens"]] == [3, 7]
        assert plain((1, "warm"))["speculative"] is None
        assert drafting((1, "warm"))["speculative"] == {"method": "x"}
        with pytest.raises(UserError, match=r"vLLM failed in .*: out of memory; .*make peers"):
            plain((0, "broken"))


def test_settings_decode_in_turn_and_in_another_order_each_time():
    said = []

    def decodes(setting, speeds):
        def decode(request):
            said.append((setting, *request))
            speed = speeds.pop(0) if request[1] == "timed" else 1.0
            return {"tokens": speed, "seconds": 1.0, "drafts": 2, "accepted": 3, "depths": {"0": 4}}

        return decode

    turns = {"plain": decodes("plain", [10.0, 2.0, 12.0]), "adaptive": decodes("adaptive", [9.0, 8.0, 30.0])}
    plain, adaptive = take_turns("16", 5, turns, rounds=3)
    assert said[:2] == [("plain", 5, "warm"), ("adaptive", 5, "warm")]
    assert [setting for setting, *_ in said[2:]] == [
        *("plain", "adaptive"),
        *("adaptive", "plain"),
        *("plain", "adaptive"),
    ]
    assert plain.rounds == [10.0, 2.0, 12.0]
    assert (plain.speed, adaptive.speed) == (10.0, 9.0)
    assert adaptive.acceptance_length == 2.5
    assert adaptive.depths == {"0": 12}


def test_the_table_compares_medians():
    rows = [
        DepthRow("16", "plain", [100.0, 1.0, 200.0], None),
        DepthRow("16", "3", [80.0, 80.0, 80.0], 2.0),
        DepthRow("16", "adaptive", [90.0, 95.0, 99.0], 2.0),
    ]
    *_, best, plain = (next(iter(column.cells)) for column in depths_table(rows).columns)
    assert (best, plain) == ("0.95", "0.95")
