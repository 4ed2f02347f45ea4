"""``vllm serve``, configured through the environment alone; the engine core is a process of its own."""

import json
import re
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import torch
from transformers import LlamaForCausalLM

from tests.engines import tiny_llama
from tests.vllm.servers import environment_of_server, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
PORT = 8741
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random policy whose greedy completions soon repeat themselves."""
    path = tmp_path_factory.mktemp("policy")
    tiny_llama(64, sharpness=8.0, hidden=256).save_pretrained(path)
    return path


@contextmanager
def server(policy, log, options):
    """A server, with ``PACELINE_VLLM`` if there are options; stopped as an operator stops it."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(policy), "--port", str(PORT)]
    command += ["--enforce-eager", "--skip-tokenizer-init", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--max-num-seqs", "8", "--generation-config", "vllm"]
    variables = {"PACELINE_VLLM": json.dumps(options)} if options else {}
    with serving(command, PORT, log, environment_of_server(**variables)) as process:
        yield process


def get(path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return None


def complete(policy, prompts, tokens=160):
    """Greedy completions of all prompts, decoded together."""
    body = {
        "model": str(policy),
        "prompt": prompts,
        "max_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "detokenize": False,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        choices = json.loads(answer.read())["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]


def greedy(policy, prompts, tokens):
    """What transformers decodes."""
    model = LlamaForCausalLM.from_pretrained(policy, dtype=torch.float32)
    found = model.generate(
        torch.tensor(prompts), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return found[:, len(prompts[0]) :].tolist()


@pytest.mark.ci
def test_a_server_that_drafts_says_what_the_policy_says(policy, tmp_path):
    """The plugin reaches the engine core's process, chooses depths there, and reports them."""
    prompts = [[1 + i, 5, 6, 7] for i in range(4)]
    with server(policy, tmp_path / "log", {"speculative": NGRAM}):
        for _ in range(3):
            assert complete(policy, prompts, 64) == greedy(policy, prompts, 64)
        metrics = get("/metrics")
    depths = re.findall(r'paceline:steps_total\{draft_depth="(\d)"\}', metrics)
    assert len(depths) >= 2 and "paceline:speculation_on" in metrics


def test_drafts_and_adaptivity_come_from_the_environment_and_survive_a_restart(policy, tmp_path):
    prompts = [[1 + i, 5, 6, 7] for i in range(4)]
    with server(policy, tmp_path / "plain.log", None):
        wanted = complete(policy, prompts)
        assert "paceline:" not in get("/metrics")
    state = tmp_path / "state"
    options = {"speculative": NGRAM, "state": str(state)}
    with server(policy, tmp_path / "first.log", options):
        for _ in range(3):
            assert complete(policy, prompts) == wanted
        assert complete(policy, prompts[:1]) == wanted[:1]
        time.sleep(2.1)  # files are written when nothing is decoded, at most every two seconds
        assert complete(policy, prompts[:1]) == wanted[:1]
        metrics = get("/metrics")
    used = re.findall(r'paceline:steps_total\{draft_depth="(\d)"\}', metrics)
    assert len(used) >= 2, metrics
    schedule = json.loads((state / "depths.json").read_text())["schedule"]
    assert schedule[0][0] == 1 and schedule[-1][1] == 4
    for name in (
        "draft_depth",
        "acceptance_length",
        "speculation_on 1.0",
        'watchdog_trips_total{reason="dead"}',
    ):
        assert f"paceline:{name}" in metrics
    with server(policy, tmp_path / "second.log", options):
        assert complete(policy, prompts) == wanted
    assert "restored, the schedule is [(1, " in (tmp_path / "second.log").read_text()


def test_a_wrong_option_stops_the_server_with_one_line(policy, tmp_path):
    log = tmp_path / "wrong.log"
    with pytest.raises(AssertionError), server(policy, log, {"probe_second": 3}):
        pass
    assert any(
        "PACELINE_VLLM: the key 'probe_second' is unknown" in line for line in log.read_text().splitlines()
    )
