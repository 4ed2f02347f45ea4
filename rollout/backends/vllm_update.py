"""Weight updates of one vLLM server over HTTP, and what calls to a server are answered with."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

CONNECT_SECONDS = 30.0
_HEALTH_SECONDS = 5.0
_NOT_STARTED_FOR_UPDATES = (401, 403, 404)  # another token, or no such endpoint


def unreachable(error: httpx.HTTPError) -> ConnectionError:
    """Returns the error of a call that got no answer, with the server's URL."""
    return ConnectionError(f"{error.request.url}: {type(error).__name__} {error}; is the server up?")


def checked(response: httpx.Response) -> httpx.Response:
    """Returns ``response``.

    Raises:
        ConnectionError: It is an error.
    """
    if not response.is_error:
        return response
    hint = "see the server's log"
    if response.status_code in _NOT_STARTED_FOR_UPDATES:
        hint = (
            "start servers with paceline serve RUN --exchange DIRECTORY, and set rollout.vllm.exchange to "
            "that directory"
        )
    text = " ".join(response.text.split())[:300]
    raise ConnectionError(f"{response.request.url}: {response.status_code} {text}; {hint}")


async def update(
    url: str,
    start: str,
    files: Sequence[Path],
    version: str | None,
    *,
    headers: Mapping[str, str],
    seconds: float,
) -> None:
    """Lets a server read new weights.

    Args:
        url: URL of the server.
        start: Endpoint that starts the update, of the policy or of the drafter.
        files: safetensors files.
        version: The version that the server reports, or None.
        headers: Headers of every call.
        seconds: Maximum time of one call, in which the server reads one file.

    Raises:
        ConnectionError: The server is lost or refuses the weights.
    """
    timeout = httpx.Timeout(seconds, connect=CONNECT_SECONDS)
    limits = httpx.Limits(max_keepalive_connections=0)  # vLLM closes a connection after an error
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as client:
        sending = asyncio.create_task(_send(client, start, files, version))
        watching = asyncio.create_task(_watch(client))
        await asyncio.wait((sending, watching), return_when=asyncio.FIRST_COMPLETED)
        first = sending if sending.done() else watching
        for task in (sending, watching):
            task.cancel()
        await asyncio.gather(sending, watching, return_exceptions=True)
        await first


async def _send(client: httpx.AsyncClient, start: str, files: Sequence[Path], version: str | None) -> None:
    try:
        await _post(client, start)
    except ConnectionError as error:
        if "already active" not in str(error):
            raise
        await _post(client, "/finish_weight_update")  # a trainer was killed before it did
        await _post(client, start)
    for path in files:
        await _post(client, "/update_weights", {"update_info": {"path": str(path.resolve())}})
    await _post(client, "/finish_weight_update", {"weight_version": version})
    await _post(client, "/reset_prefix_cache")


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any] | None = None) -> None:
    try:
        response = await client.post(path, json=body)
    except httpx.HTTPError as error:
        raise unreachable(error) from None
    checked(response)


async def _watch(client: httpx.AsyncClient) -> None:
    """Fails as soon as the server is shutting down.

    vLLM 0.32 never answers a call during which its engine dies, and its shutdown waits for such calls; new
    connections are refused by then.
    """
    while True:
        await asyncio.sleep(_HEALTH_SECONDS)
        try:
            response = await client.get("/health", timeout=_HEALTH_SECONDS)
        except httpx.ConnectError as error:
            raise unreachable(error) from None
        except httpx.HTTPError:
            continue  # it may be busy
        if response.is_server_error:
            checked(response)
