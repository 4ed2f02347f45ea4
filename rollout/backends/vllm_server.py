"""vLLM behind one or more servers, which are fed over HTTP and a shared file system.

The servers may run on other machines and have parallelism of their own.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx

from paceline.rollout.api import Request, Rollout, RolloutStats
from paceline.rollout.backends.vllm_conversion import finished, marked_plain, rejected, sampling
from paceline.rollout.backends.vllm_update import CONNECT_SECONDS, checked, unreachable, update
from paceline.rollout.engine.engine import StepRecord

_COMPLETION_SECONDS = 3600.0  # a completion may wait in the server's queue


class VllmServers:
    """A `ServedBackend` over servers started with `paceline.rollout.backends.serve_command.serve_command`.

    Groups of samples go to the servers in turn; the samples of a group go to one server, which caches their
    prompt. Each server has its own schedule of draft depths by batch size, which vLLM takes at its start.

    Args:
        urls: URLs of the servers, such as ``http://node1:8000``.
        max_slots: Maximum number of requests in flight at one server.
        sends: Whether this process sends weights; of several ranks, exactly one does.
        token: Token of the servers' exchange directory, see `paceline.rollout.backends.exchange`; None for
            servers that were started without one.
        update_seconds: Maximum time of one call of a weight update, in which a server reads one file.

    Attributes:
        records: Always empty, because servers do not report what a step took.

    Raises:
        ConnectionError: A server does not answer, or was not started for weight updates.
    """

    def __init__(
        self,
        urls: Sequence[str],
        max_slots: int,
        *,
        sends: bool = True,
        token: str | None = None,
        update_seconds: float = 600.0,
    ) -> None:
        self._urls, self._sends, self._update_seconds = list(urls), sends, update_seconds
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        limits = httpx.Limits(max_connections=max_slots, max_keepalive_connections=max_slots)
        timeout = httpx.Timeout(_COMPLETION_SECONDS, connect=CONNECT_SECONDS)
        self._clients = [
            httpx.Client(base_url=url, timeout=timeout, limits=limits, headers=self._headers) for url in urls
        ]
        self._max_slots = max_slots
        self._version = 0
        self.records: list[StepRecord] = []
        self._models = [
            str(self._call(c, "GET", "/v1/models").json()["data"][0]["id"]) for c in self._clients
        ]
        for client in self._clients if sends else ():
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
        """Sends new policy weights to all servers, see `ServedBackend.update_policy`.

        Raises:
            ConnectionError: A server is lost or refused the weights; the others have taken them.
        """
        self._version = version
        self._send("/start_weight_update", shards, str(version))

    def update_drafter(self, directory: Path) -> None:
        """Sends new drafter weights to all servers, see `ServedBackend.update_drafter`.

        Raises:
            ConnectionError: A server is lost or refused the weights; the others draft with them.
        """
        self._send("/start_draft_weight_update", [directory / "model.safetensors"], None)

    def _send(self, start: str, files: Sequence[Path], version: str | None) -> None:
        """Sends files to all servers in parallel; a server that fails does not stop the others."""
        if not self._sends:
            return

        def send(url: str) -> str | None:
            try:
                asyncio.run(
                    update(url, start, files, version, headers=self._headers, seconds=self._update_seconds)
                )
            except ConnectionError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(len(self._urls)) as pool:
            failures = [line for line in pool.map(send, self._urls) if line is not None]
        if failures:
            taken = f"{len(self._urls) - len(failures)} of {len(self._urls)} servers took the weights"
            raise ConnectionError(f"{'; '.join(failures)} ({taken})")

    @staticmethod
    def _call(
        client: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        try:
            response = client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise unreachable(error) from None
        return checked(response)

    def close(self) -> None:
        """Closes the connections; the servers keep running."""
        for client in self._clients:
            client.close()
