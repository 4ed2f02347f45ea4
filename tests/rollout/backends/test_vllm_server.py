"""The client of vLLM servers, against servers that answer as vLLM 0.32's do."""

import asyncio
import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from paceline.rollout import FinishReason, Request, SamplingParams
from paceline.rollout.backends.exchange import confined
from paceline.rollout.backends.vllm_guard import UpdateGuard
from paceline.rollout.backends.vllm_server import VllmServers


@contextmanager
def server(answer, metrics="", update=lambda path: 200):
    """A server whose completions are ``answer(body)`` → (tokens, log-probs, finish reason), or a status;
    ``update(path)`` is the status of health checks and of what belongs to weight updates.
    """
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
            status = update(self.path) if self.path == "/health" else 200
            self.reply(status, metrics if self.path == "/metrics" else {"data": [{"id": "policy"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            calls.append((self.path, body))
            if self.path != "/v1/completions":
                self.reply(update(self.path), {})
                return
            found = answer(body)
            if isinstance(found, int):
                self.reply(found, {"error": {"message": "too long"}})
                return
            tokens, logprobs, reason = found
            self.reply(
                200,
                {
                    "choices": [
                        {
                            "token_ids": tokens,
                            "logprobs": {"token_logprobs": logprobs},
                            "finish_reason": reason,
                        }
                    ]
                },
            )

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
            [i, i + 1, 9],
            SamplingParams(max_tokens=7, temperature=0.5, top_k=3, top_p=0.9, stop_token_ids=(2,)),
            i,
            f"g{i // 3}",
        )
        for i in range(12)
    ]
    with server(echo) as (first, calls), server(echo) as (second, others):
        servers = VllmServers([first, second], max_slots=2)
        seen = []
        rollouts = servers.generate(
            requests, on_finish=lambda index, rollout: seen.append((index, rollout.token_ids))
        )
        servers.close()
    assert [r.token_ids for r in rollouts] == [[9, i + 1, i] for i in range(12)]
    assert sorted(seen) == [(i, [9, i + 1, i]) for i in range(12)]
    assert all(
        r.finish_reason is FinishReason.STOP and r.logprobs == [-0.5] * 3 and r.segments == [(0, 3)]
        for r in rollouts
    )
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
    assert sent == [
        str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "drafter/model.safetensors")
    ]
    assert rollout.segments == [(3, 2)]


def test_a_rank_that_does_not_send_sends_nothing(tmp_path):
    with server(echo) as (url, calls):
        servers = VllmServers([url], max_slots=2, sends=False)
        servers.update_policy([tmp_path / "a.safetensors"], version=1)
        servers.update_drafter(tmp_path)
        servers.close()
    assert not calls


def test_a_server_that_stops_answering_during_an_update_is_named(tmp_path):
    """The others have the weights by then."""
    over = threading.Event()

    def frozen(path):
        over.wait(60 if path == "/update_weights" else 0)
        return 200

    with server(echo) as (first, calls), server(echo, update=frozen) as (second, _):
        servers = VllmServers([second, first], max_slots=2, update_seconds=0.5)
        with pytest.raises(ConnectionError) as found:
            servers.update_drafter(tmp_path)
        over.set()
        servers.close()
    assert str(found.value).startswith(f"{second}/update_weights: ReadTimeout")
    assert str(found.value).endswith("(1 of 2 servers took the weights)")
    assert calls[-1][0] == "/reset_prefix_cache"


def test_a_server_whose_engine_dies_during_an_update_is_left(tmp_path):
    """vLLM does not answer the call then."""
    over = threading.Event()

    def dying(path):
        over.wait(60 if path == "/update_weights" else 0)
        return 503 if path == "/health" else 200

    with server(echo, update=dying) as (url, _):
        servers = VllmServers([url], max_slots=2)
        with pytest.raises(ConnectionError, match=f"{url}/health: 503"):
            servers.update_drafter(tmp_path)
        over.set()
        servers.close()


def test_all_servers_that_refuse_weights_are_named(tmp_path):
    def refuse(path):
        return 500 if path == "/finish_weight_update" else 200

    with server(echo, update=refuse) as (first, _), server(echo, update=refuse) as (second, _):
        servers = VllmServers([first, second], max_slots=2)
        with pytest.raises(ConnectionError) as found:
            servers.update_policy([tmp_path / "a.safetensors"], version=1)
        servers.close()
    line = str(found.value)
    assert f"{first}/finish_weight_update: 500" in line and f"{second}/finish_weight_update: 500" in line
    assert "--exchange" not in line and "(0 of 2 servers took the weights)" in line and "\n" not in line


def test_failures_are_rollouts_that_say_so():
    def answer(body):
        if body["prompt"][0] == 1:
            return 400
        return [5, 6], [-0.1, None if body["prompt"][0] == 2 else -0.2], "length"

    with server(answer) as (url, _):
        servers = VllmServers([url], max_slots=4)
        failed, nan, good = servers.generate(
            [Request([i, 7], SamplingParams(max_tokens=2), i) for i in (1, 2, 3)]
        )
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


def test_updates_are_read_from_the_exchange_directory_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PACELINE_EXCHANGE", raising=False)
    with pytest.raises(ValueError, match="takes no new weights"):
        confined(str(tmp_path / "a.safetensors"))
    inside, outside = tmp_path / "exchange", tmp_path / "other"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.safetensors").touch()
    (inside / "link.safetensors").symlink_to(outside / "a.safetensors")
    monkeypatch.setenv("PACELINE_EXCHANGE", str(inside))
    assert confined(str(inside / "a.safetensors")) == inside / "a.safetensors"
    for path in (
        outside / "a.safetensors",
        inside / ".." / "other" / "a.safetensors",
        inside / "link.safetensors",
        inside / "a.bin",
    ):
        with pytest.raises(ValueError, match=r"rollout\.vllm\.exchange"):
            confined(str(path))


def ask(guard, path, **headers):
    """The status that a request gets."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(n.encode(), v.encode()) for n, v in headers.items()],
    }
    asyncio.run(guard(scope, None, send))
    return sent[0]["status"]


def test_development_endpoints_need_the_token(monkeypatch):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    monkeypatch.delenv("PACELINE_UPDATE_TOKEN", raising=False)
    with pytest.raises(RuntimeError, match="not set"):
        UpdateGuard(app)
    monkeypatch.setenv("PACELINE_UPDATE_TOKEN", "right")
    guard = UpdateGuard(app)
    for path in ("/v1/completions", "/health", "/metrics"):
        assert ask(guard, path) == 200
    for path in (
        "/update_weights",
        "/collective_rpc",
        "/sleep",
        "/reset_prefix_cache",
        "/health/../update_weights",
        "/v1",
        "/anything",
    ):
        assert ask(guard, path) == 401
        assert ask(guard, path, authorization="Bearer wrong") == 401
        assert ask(guard, path, authorization="Basic right") == 401
        assert ask(guard, path, authorization="Bearer right") == 200


def test_the_client_shows_its_token():
    headers = []

    class Asked(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            headers.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Asked)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    with pytest.raises(ConnectionError, match="--exchange"):
        VllmServers([f"http://127.0.0.1:{httpd.server_port}"], 1, token="abc")
    httpd.shutdown()
    httpd.server_close()
    assert headers == ["Bearer abc"]


def test_plain_requests_say_so_and_share_no_prefix_with_others():
    with server(echo) as (url, calls):
        servers = VllmServers([url], max_slots=2)
        asked = [Request([1, 2, i], SamplingParams(max_tokens=3), group=0) for i in range(2)]
        servers.generate(asked)
        rollouts = servers.generate_plain(asked)
        servers.generate_plain(asked)
        servers.close()
    assert [r.token_ids for r in rollouts] == [[0, 2, 1], [1, 2, 1]]
    bodies = [body for path, body in calls if path == "/v1/completions"]
    assert ["vllm_xargs" in body for body in bodies] == [False] * 2 + [True] * 4
    assert bodies[2]["vllm_xargs"] == {"paceline_plain": 1}
    salts = [body.get("cache_salt") for body in bodies]
    assert salts[:2] == [None, None] and salts[2] == salts[3] != salts[4] == salts[5]


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_server_without_the_adaptive_scheduler_is_recognised(adaptive):
    metrics = "paceline:draft_depth 0.0" if adaptive else "vllm:num_requests_running 0.0"
    with server(echo, metrics) as (first, _), server(echo, "paceline:draft_depth 3.0") as (second, _):
        servers = VllmServers([first, second], max_slots=2)
        assert servers.adaptive is adaptive
        servers.close()
