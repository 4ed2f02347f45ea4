"""The client of vLLM servers, against servers that answer as vLLM 0.32's do."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rollout import FinishReason, Request, SamplingParams
from rollout.backends.vllm_server import VllmServers, serve_command


@contextmanager
def server(answer):
    """A server whose completions are ``answer(body)`` → (tokens, log-probs, finish reason), or a status."""
    calls = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def reply(self, status, data):
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply(200, {"data": [{"id": "policy"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            calls.append((self.path, body))
            if self.path != "/v1/completions":
                self.reply(200, {})
                return
            found = answer(body)
            if isinstance(found, int):
                self.reply(found, {"error": {"message": "too long"}})
                return
            tokens, logprobs, reason = found
            self.reply(200, {"choices": [{"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}]})

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", calls
    finally:
        httpd.shutdown()
        httpd.server_close()


def echo(body):
    """The prompt backwards."""
    return body["prompt"][::-1], [-0.5] * len(body["prompt"]), "stop"


def test_groups_keep_their_server_and_results_their_order():
    requests = [
        Request(
            [i, i + 1, 9], SamplingParams(max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, stop_token_ids=(2,)), i, f"g{i // 3}"
        )
        for i in range(12)
    ]
    with server(echo) as (first, calls), server(echo) as (second, others):
        servers = VllmServers([first, second], max_slots=2)
        seen = []
        rollouts = servers.generate(requests, on_finish=lambda index, rollout: seen.append((index, rollout.token_ids)))
        servers.close()
    assert [r.token_ids for r in rollouts] == [[9, i + 1, i] for i in range(12)]
    assert sorted(seen) == [(i, [9, i + 1, i]) for i in range(12)]
    assert all(r.finish_reason is FinishReason.STOP and r.logprobs == [-0.5] * 3 and r.segments == [(0, 3)] for r in rollouts)
    asked = [[body for path, body in found if path == "/v1/completions"] for found in (calls, others)]
    groups = [{body["seed"] // 3 for body in bodies} for bodies in asked]
    assert groups[0] | groups[1] == {0, 1, 2, 3}
    assert not groups[0] & groups[1]
    body = asked[0][0]
    assert (body["temperature"], body["top_k"], body["top_p"], body["max_tokens"]) == (0.5, 3, 0.9, 7)
    assert body["stop_token_ids"] == [2]
    assert body["ignore_eos"]
    assert body["return_token_ids"]


def test_weights_are_sent_in_vllms_order(tmp_path):
    with server(echo) as (url, calls):
        servers = VllmServers([url], max_slots=2)
        servers.update_policy([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], version=3)
        servers.update_drafter(tmp_path / "drafter")
        rollout = servers.generate([Request([1, 2], SamplingParams(max_tokens=4), 0)])[0]
        servers.close()
    assert [path for path, _ in calls] == [
        "/init_weight_transfer_engine",
        "/start_weight_update",
        "/update_weights",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/start_draft_weight_update",
        "/update_weights",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/v1/completions",
    ]
    sent = [body["update_info"]["path"] for path, body in calls if path == "/update_weights"]
    assert sent == [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "drafter/model.safetensors")]
    assert rollout.segments == [(3, 2)]


def test_a_rank_that_does_not_send_sends_nothing(tmp_path):
    with server(echo) as (url, calls):
        servers = VllmServers([url], max_slots=2, sends=False)
        servers.update_policy([tmp_path / "a.safetensors"], version=1)
        servers.update_drafter(tmp_path)
        servers.close()
    assert not calls


def test_failures_are_rollouts_that_say_so():
    def answer(body):
        if body["prompt"][0] == 1:
            return 400
        return [5, 6], [-0.1, None if body["prompt"][0] == 2 else -0.2], "length"

    with server(answer) as (url, _):
        servers = VllmServers([url], max_slots=4)
        failed, nan, good = servers.generate([Request([i, 7], SamplingParams(max_tokens=2), i) for i in (1, 2, 3)])
        servers.close()
    assert failed.finish_reason is FinishReason.FAILED
    assert "400" in failed.error
    assert "too long" in failed.error
    assert nan.finish_reason is FinishReason.FAILED
    assert "not finite" in nan.error
    assert math.isnan(nan.logprobs[1])
    assert good.finish_reason is FinishReason.LENGTH


def test_a_server_that_is_not_there_is_named():
    with server(echo) as (url, _):
        pass
    with pytest.raises(ConnectionError, match="is the server up") as found:
        VllmServers([url], max_slots=1)
    assert "\n" not in str(found.value)


def test_the_command_that_starts_a_server():
    command = serve_command(
        "policy", drafter=Path("drafter"), schedule=[(1, 8, 4), (9, 64, 0)], more=["--tensor-parallel-size", "2"]
    )
    assert command[:3] == ["vllm", "serve", "policy"]
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative["num_speculative_tokens_per_batch_size"] == [[1, 8, 4], [9, 64, 0]]
    assert speculative["method"] == "eagle3"
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": "paceline_files"}
    assert command[-2:] == ["--tensor-parallel-size", "2"]
