"""vLLM behind one or more servers, which are fed over HTTP and a shared file system.

The servers may run on other machines and have parallelism of their own.
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
from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER
from paceline.rollout.backends.exchange import DIRECTORY, TOKEN, make_token
from paceline.rollout.backends.vllm_conversion import finished, marked_plain, rejected, sampling
from paceline.rollout.engine.engine import StepRecord

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_TIMEOUT_SECONDS = 3600.0  # for one completion, which may wait in the server's queue


class VllmServers:
    """A `ServedBackend` over servers started with `serve_command`.

    Groups of samples go to the servers in turn; the samples of a group go to one server, which caches their
    prompt. Each server has its own schedule of draft depths by batch size, which vLLM takes at its start.

    Args:
        urls: URLs of the servers, such as ``http://node1:8000``.
        max_slots: Maximum number of requests in flight at one server.
        sends: Whether this process sends weights; of several ranks, exactly one does.
        token: Token of the servers' exchange directory, see `paceline.rollout.backends.exchange`; None for
            servers that were started without one.

    Attributes:
        records: Always empty, because servers do not report what a step took.

    Raises:
        ConnectionError: A server does not answer, or was not started for weight updates.
    """

    def __init__(
        self, urls: Sequence[str], max_slots: int, *, sends: bool = True, token: str | None = None
    ) -> None:
        limits = httpx.Limits(max_connections=max_slots, max_keepalive_connections=max_slots)
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._clients = [
            httpx.Client(base_url=url, timeout=_TIMEOUT_SECONDS, limits=limits, headers=headers)
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
        """Decodes the requests, see `Decoder.generate`; ``on_step`` is not called.

        Requests fail if their server cannot be reached.
        """
        return self._generate(requests, on_finish, {})

    def generate_plain(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None = None,
        *,
        on_finish: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Decodes without drafts, see `ServedBackend.generate_plain`; servers must be `adaptive`."""
        return self._generate(requests, on_finish, marked_plain(time.time_ns()))

    @property
    def adaptive(self) -> bool:
        """Whether every server has the adaptive scheduler, according to its metrics."""
        return all("paceline:draft_depth" in self._call(c, "GET", "/metrics").text for c in self._clients)

    def _generate(
        self,
        requests: Sequence[Request],
        on_finish: Callable[[int, Rollout], None] | None,
        marks: dict[str, Any],
    ) -> list[Rollout]:
        groups = [number if r.group is None else ("group", r.group) for number, r in enumerate(requests)]
        server_of = {group: order % len(self._clients) for order, group in enumerate(dict.fromkeys(groups))}
        servers = [server_of[group] for group in groups]
        done: list[Rollout | None] = [None] * len(requests)
        stop = threading.Event()
        with ThreadPoolExecutor(self._max_slots * len(self._clients)) as pool:
            futures = {
                pool.submit(self._complete, r, server, stop, marks): i
                for i, (r, server) in enumerate(zip(requests, servers, strict=True))
            }
            try:
                for future in as_completed(futures):
                    index = futures[future]
                    done[index] = rollout = future.result()
                    if on_finish is not None:
                        on_finish(index, rollout)
            # requests not yet sent are dropped, so that leaving the pool waits only for those in flight
            except BaseException:
                stop.set()
                raise
        return [r for r in done if r is not None]

    def _complete(
        self, request: Request, server: int, stop: threading.Event, marks: dict[str, Any]
    ) -> Rollout:
        if stop.is_set():
            return rejected(request, InterruptedError("cancelled"), self._version)
        begin = time.perf_counter()
        body = {
            "model": self._models[server],
            "prompt": list(request.prompt_ids),
            "return_token_ids": True,
            **sampling(request),
            **marks,
        }
        try:
            choice = self._call(self._clients[server], "POST", "/v1/completions", body).json()["choices"][0]
        except ConnectionError as error:
            return rejected(request, error, self._version)
        stats = RolloutStats(seconds=time.perf_counter() - begin)
        logprobs = [float("nan") if x is None else float(x) for x in choice["logprobs"]["token_logprobs"]]
        return finished(request, choice["token_ids"], logprobs, choice["finish_reason"], stats, self._version)

    def update_policy(self, shards: Sequence[Path], version: int) -> None:
        """Sends new policy weights to all servers, see `ServedBackend.update_policy`."""
        self._version = version
        self._send("/start_weight_update", shards, str(version))

    def update_drafter(self, directory: Path) -> None:
        """Sends new drafter weights to all servers, see `ServedBackend.update_drafter`."""
        self._send("/start_draft_weight_update", [directory / "model.safetensors"], None)

    def _send(self, start: str, files: Sequence[Path], version: str | None) -> None:
        """Sends files to all servers in parallel."""
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
            response = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ConnectionError(
                f"{client.base_url}{path.lstrip('/')}: {type(error).__name__} {error}; is the server up?"
            ) from None
        if response.is_error:
            text = " ".join(response.text.split())[:300]
            raise ConnectionError(
                f"{client.base_url}{path.lstrip('/')}: {response.status_code} {text}; start servers with "
                "paceline serve RUN --exchange DIRECTORY, and set rollout.vllm.exchange to that directory"
            )
        return response

    def close(self) -> None:
        """Closes the connections; the servers keep running."""
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
    """Returns the ``vllm serve`` command line for a policy and its drafter.

    Parameters that a request leaves out take vLLM's neutral defaults, not those of the policy's
    ``generation_config.json``.

    Args:
        model: Directory or hub id of the policy.
        drafter: Directory in the export format; None serves without drafts.
        depth: Maximum draft tokens of a step.
        schedule: (from, to, draft tokens) by batch size, such as `DepthControl.schedule` learns; empty lets
            the adaptive scheduler choose from 0 to ``depth`` in each step.
        host: Address that the server listens on.
        port: Port that the server listens on.
        max_slots: Maximum number of sequences decoded together.
        max_context: Maximum tokens of prompt and completion together.
        updates: Whether the server accepts new weights from a trainer. The endpoints are vLLM's development
            ones: the environment of the server needs the variables of `serve_environment`.
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
        else:
            command += ["--scheduler-cls", ADAPTIVE_SCHEDULER]
        command += ["--speculative-config", json.dumps(speculative)]
    return [*command, *more]


def serve_environment(exchange: Path, host: str) -> dict[str, str]:
    """Returns the environment variables of a server that accepts new weights.

    The server reads weights from ``exchange`` alone, and asks for its token. On an address that other
    machines can reach, completions need the token too.

    Raises:
        OSError: The directory cannot be written.
    """
    token = make_token(exchange)
    variables = {"VLLM_SERVER_DEV_MODE": "1", DIRECTORY: str(exchange.resolve()), TOKEN: token}
    return variables if host in LOOPBACK else {**variables, "VLLM_API_KEY": token}


def sglang_command(
    model: Path | str, drafter: Path | None, depth: int, host: str, port: int, more: Sequence[str] = ()
) -> list[str]:
    """Returns the command line that starts SGLang with the same policy and drafter.

    It follows SGLang's documentation and was not run here.

    Args:
        model: Directory or hub id of the policy.
        drafter: Directory in the export format; None serves without drafts.
        depth: Draft tokens of a step, which form a chain as in vLLM.
        host: Address that the server listens on.
        port: Port that the server listens on.
        more: Further arguments.
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
    command += ["--sampling-defaults", "openai"]  # neutral, unlike the policy's generation_config.json
    if drafter is not None:
        command += ["--speculative-algorithm", "EAGLE3", *speculative]
    return [*command, *more]
