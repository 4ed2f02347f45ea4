"""Guards the development endpoints of a vLLM server, weight updates among them, by a token."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from paceline.rollout.backends.exchange import TOKEN

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_OPEN_PATHS = ("/health", "/ping", "/version", "/metrics", "/load")
_INFERENCE_PREFIX = "/v1/"  # guarded by vLLM's own --api-key


class UpdateGuard:
    """ASGI middleware for ``vllm serve --middleware`` that requires a bearer token for development endpoints.

    Inference and health checks pass without the token. vLLM's ``VLLM_SERVER_DEV_MODE`` opens weight updates,
    and with them endpoints that call any method of its workers; ``--api-key`` guards none of these.

    Args:
        app: The server's ASGI application.

    Raises:
        RuntimeError: The environment has no token: a server without one must not start.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        token = os.environ.get(TOKEN)
        if not token:
            raise RuntimeError(
                f"{TOKEN} is not set: start the server with paceline serve --exchange DIRECTORY"
            )
        self._app, self._token = app, _digest(token.encode())

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] not in ("http", "websocket") or self._passes(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b'{"error": "this endpoint needs the token of the exchange directory"}'
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def _passes(self, scope: _Scope) -> bool:
        path = str(scope["path"]).removeprefix(str(scope.get("root_path", "")))
        if path in _OPEN_PATHS or path.startswith(_INFERENCE_PREFIX):
            return True
        header = next((value for name, value in scope["headers"] if name.lower() == b"authorization"), b"")
        scheme, _, token = bytes(header).partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(_digest(token), self._token)


def _digest(token: bytes) -> bytes:
    """Hashes a token to 32 bytes, so that the comparison takes the same time for tokens of any length."""
    return hashlib.sha256(token).digest()
