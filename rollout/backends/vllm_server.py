"""vLLM behind one or more servers: on other machines, with their own parallelism, fed over HTTP and a shared
file system.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx

from paceline.rollout.api import Request, Rollout, RolloutStats
from paceline.rollout.backends.exchange import DIRECTORY, TOKEN, make_token
from paceline.rollout.backends.vllm_conversion import finished, refused, sampling
from paceline.rollout.engine.engine import StepRecord

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_PATIENCE_SECONDS = 3600.0  # for one completion, which may wait in the server's queue


class VllmServers:
    """A `ServedBackend` over servers started with `serve_command`.

    Requests go to servers in turn, the samples of a group to one server, which keeps their prompt. How deep
    drafts are is each server's own schedule by batch size: vLLM takes it at its start.

    Args:
        urls: Of the servers, such as ``http://node1:8000``.
        max_slots: Requests in flight at one server.
        sends: Whether this process sends weights; of several ranks one does.
        token: Of the servers' exchange directory, see `paceline.rollout.backends.exchange`; None for servers
            that were started otherwise.

    Attributes:
        records: Empty: servers do not say what a step took.

    Raises:
        ConnectionError: where a server does not answer, or was not started for weight updates.
    """

    def __init__(
        self, urls: Sequence[str], max_slots: int, *, sends: bool = True, token: str | None = None
    ) -> None:
        limits = httpx.Limits(max_connections=max_slots, max_keepalive_connections=max_slots)
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._clients = [
            httpx.Client(base_url=url, timeout=_PATIENCE_SECONDS, limits=limits, headers=headers)
            for url in urls
        ]
        self._max_slots, self._sends = max_slots, sends
        self._version = 0
        self.records: list[StepRecord] = []
        self._models = [
            str(self._call(c, "GET", "/v1/models").json()["data"][0]["id"]) for c in self._clients
        ]
        if sends:
            for client in self._clients:
                self._call(client, "POST", "/init_weight_transfer_engine", {"init_info": {}})

    def generate(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None = None,
        *,
        on_finish: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """See `Decoder.generate`; ``on_step`` is not called. A server that is lost fails its requests."""
        groups = [number if r.group is None else ("group", r.group) for number, r in enumerate(requests)]
        server_of = {group: order % len(self._clients) for order, group in enumerate(dict.fromkeys(groups))}
        places = [server_of[group] for group in groups]
        done: list[Rollout | None] = [None] * len(requests)
        stop = threading.Event()
        with ThreadPoolExecutor(self._max_slots * len(self._clients)) as pool:
            futures = {
                pool.submit(self._complete, r, place, stop): i
                for i, (r, place) in enumerate(zip(requests, places, strict=True))
            }
            try:
                for future in as_completed(futures):
                    index = futures[future]
                    done[index] = rollout = future.result()
                    if on_finish is not None:
                        on_finish(index, rollout)
            # what has not been sent is not: the pool's end then waits for what is in flight alone
            except BaseException:
                stop.set()
                raise
        return [r for r in done if r is not None]

    def _complete(self, request: Request, place: int, stop: threading.Event) -> Rollout:
        if stop.is_set():
            return refused(request, InterruptedError("cancelled"), self._version)
        begin = time.perf_counter()
        body = {
            "model": self._models[place],
            "prompt": list(request.prompt_ids),
            "return_token_ids": True,
            **sampling(request),
        }
        try:
            choice = self._call(self._clients[place], "POST", "/v1/completions", body).json()["choices"][0]
        except ConnectionError as error:
            return refused(request, error, self._version)
        stats = RolloutStats(seconds=time.perf_counter() - begin)
        logprobs = [float("nan") if x is None else float(x) for x in choice["logprobs"]["token_logprobs"]]
        return finished(request, choice["token_ids"], logprobs, choice["finish_reason"], stats, self._version)

    def update_policy(self, shards: Sequence[Path], version: int) -> None:
        """See `ServedBackend.update_policy`."""
        self._version = version
        self._send("/start_weight_update", shards, str(version))

    def update_drafter(self, directory: Path) -> None:
        """See `ServedBackend.update_drafter`."""
        self._send("/start_draft_weight_update", [directory / "model.safetensors"], None)

    def _send(self, start: str, files: Sequence[Path], version: str | None) -> None:
        """To all servers at once."""
        if not self._sends:
            return

        def send(client: httpx.Client) -> None:
            self._call(client, "POST", start)
            for path in files:
                self._call(client, "POST", "/update_weights", {"update_info": {"path": str(path.resolve())}})
            self._call(client, "POST", "/finish_weight_update", {"weight_version": version})
            self._call(client, "POST", "/reset_prefix_cache")

        with ThreadPoolExecutor(len(self._clients)) as pool:
            list(pool.map(send, self._clients))

    @staticmethod
    def _call(
        client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        try:
            answer = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ConnectionError(
                f"{client.base_url}{path.lstrip('/')}: {type(error).__name__} {error}; is the server up?"
            ) from None
        if answer.is_error:
            said = " ".join(answer.text.split())[:300]
            raise ConnectionError(
                f"{client.base_url}{path.lstrip('/')}: {answer.status_code} {said}; start servers with "
                "paceline serve RUN --exchange DIRECTORY, and name that directory in rollout.vllm.exchange"
            )
        return answer

    def close(self) -> None:
        """See `ServedBackend.close`; the servers go on."""
        for client in self._clients:
            client.close()


def serve_command(
    model: Path | str,
    *,
    drafter: Path | None = None,
    depth: int = 4,
    schedule: Sequence[tuple[int, int, int]] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    max_slots: int = 64,
    max_context: int = 4096,
    updates: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """The arguments of ``vllm serve`` for a policy and its drafter.

    What a request leaves out takes vLLM's neutral defaults, not those of the policy's
    ``generation_config.json``.

    Args:
        model: Directory or hub id of the policy.
        drafter: Directory in the export format; None serves without drafts.
        depth: Most draft tokens of a step.
        schedule: (from, to, draft tokens) by batch size, such as `DepthBandit.schedule` learns; empty drafts
            ``depth`` always.
        host: Address that the server listens on.
        port: Of the server.
        max_slots: Sequences decoded together.
        max_context: Most tokens of prompt and completion together.
        updates: Take new weights from a trainer. The endpoints are vLLM's development ones: the environment
            of the server needs what `serve_environment` gives.
        more: Further arguments, such as ``--tensor-parallel-size 4``.
    """
    command = [
        "vllm",
        "serve",
        str(model),
        "--host",
        host,
        "--port",
        str(port),
        "--max-num-seqs",
        str(max_slots),
    ]
    command += [
        "--max-model-len",
        str(max_context),
        "--logprobs-mode",
        "processed_logprobs",
        "--generation-config",
        "vllm",
    ]
    if updates:
        command += ["--weight-transfer-config", json.dumps({"backend": "paceline_files"})]
        command += ["--middleware", "paceline.rollout.backends.vllm_guard.UpdateGuard"]
    if drafter is not None:
        speculative: dict[str, Any] = {
            "method": "eagle3",
            "model": str(drafter),
            "num_speculative_tokens": depth,
        }
        if schedule:
            speculative["num_speculative_tokens_per_batch_size"] = [list(entry) for entry in schedule]
        command += ["--speculative-config", json.dumps(speculative)]
    return [*command, *more]


def serve_environment(exchange: Path, host: str) -> dict[str, str]:
    """Environment variables of a server that takes new weights: through ``exchange`` alone, and with its
    token.

    On an address that other machines reach, completions need the token too.

    Raises:
        OSError: when the directory cannot be written.
    """
    token = make_token(exchange)
    found = {"VLLM_SERVER_DEV_MODE": "1", DIRECTORY: str(exchange.resolve()), TOKEN: token}
    return found if host in LOOPBACK else {**found, "VLLM_API_KEY": token}


def sglang_command(
    model: Path | str, drafter: Path | None, depth: int, host: str, port: int, more: Sequence[str] = ()
) -> list[str]:
    """The arguments that start SGLang with the same policy and drafter, by its documentation; it was not run
    here.

    Args:
        model, drafter, host, port, more: As for `serve_command`.
        depth: Draft tokens of a step: a chain, as vLLM drafts.
    """
    chain = {
        "--speculative-draft-model-path": drafter,
        "--speculative-num-steps": depth,
        "--speculative-eagle-topk": 1,
        "--speculative-num-draft-tokens": depth + 1,
    }
    speculative = [str(part) for entry in chain.items() for part in entry]
    command = [
        "python",
        "-m",
        "sglang.launch_server",
        "--model-path",
        str(model),
        "--host",
        host,
        "--port",
        str(port),
    ]
    command += ["--sampling-defaults", "openai"]  # neutral, whatever the policy's generation_config.json says
    if drafter is not None:
        command += ["--speculative-algorithm", "EAGLE3", *speculative]
    return [*command, *more]
