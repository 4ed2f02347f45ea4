"""Command lines and environments of servers."""

import json
from pathlib import Path

import pytest

from paceline.rollout import Request, SamplingParams
from paceline.rollout.backends.exchange import make_token, read_token
from paceline.rollout.backends.serve_command import serve_command, serve_environment, sglang_command
from paceline.rollout.backends.vllm_conversion import sampling


def test_the_command_that_starts_a_server():
    command = serve_command(
        "policy",
        drafter=Path("drafter"),
        schedule=[(1, 8, 4), (9, 64, 0)],
        updates=True,
        more=["--tensor-parallel-size", "2"],
    )
    assert command[:3] == ["vllm", "serve", "policy"]
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative["num_speculative_tokens_per_batch_size"] == [[1, 8, 4], [9, 64, 0]]
    assert speculative["method"] == "eagle3"
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": "paceline_files"}
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    assert "--weight-transfer-config" not in serve_command("policy")


def test_a_policys_generation_config_adds_nothing():
    """Neither on the server nor in a request, and not in SGLang either."""
    command = serve_command("policy")
    assert command[command.index("--generation-config") + 1] == "vllm"
    body = sampling(Request([1], SamplingParams()))
    assert (
        body["repetition_penalty"],
        body["min_p"],
        body["presence_penalty"],
        body["frequency_penalty"],
    ) == (1.0, 0.0, 0.0, 0.0)
    command = sglang_command("policy", None, 4, "127.0.0.1", 8000)
    assert command[command.index("--sampling-defaults") + 1] == "openai"
    assert "--speculative-algorithm" not in command


def test_a_server_chooses_its_depths_unless_it_gets_a_schedule():
    command = serve_command("policy", drafter=Path("drafter"))
    assert command[command.index("--scheduler-cls") + 1].endswith("vllm_scheduler.AdaptiveScheduler")
    assert "--scheduler-cls" not in serve_command("policy", drafter=Path("drafter"), schedule=[(1, 8, 4)])
    assert "--scheduler-cls" not in serve_command("policy")


def test_a_server_that_drafts_in_one_pass_has_a_fixed_depth():
    command = serve_command("policy", drafter=Path("drafter"), depth=5, parallel=True)
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert (speculative["parallel_drafting"], speculative["num_speculative_tokens"]) == (True, 5)
    assert "--scheduler-cls" not in command
    with pytest.raises(ValueError, match="leave the schedule out"):
        serve_command("policy", drafter=Path("drafter"), parallel=True, schedule=[(1, 8, 4)])


def test_the_token_of_an_exchange_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("PACELINE_UPDATE_TOKEN", raising=False)
    environment = serve_environment(tmp_path / "exchange", "127.0.0.1")
    token = read_token(tmp_path / "exchange")
    assert environment["PACELINE_UPDATE_TOKEN"] == token == make_token(tmp_path / "exchange")
    assert environment["PACELINE_EXCHANGE"] == str(tmp_path / "exchange")
    assert "VLLM_API_KEY" not in environment
    # completions ask for it there
    assert serve_environment(tmp_path / "exchange", "0.0.0.0")["VLLM_API_KEY"] == token
    assert [p.stat().st_mode & 0o077 for p in (tmp_path / "exchange").iterdir()] == [0]
    with pytest.raises(OSError, match="token"):
        read_token(tmp_path)
