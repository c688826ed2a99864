"""What a request meets before any route: a count, the host that it names, the token that it has,
its size.

Plain ASGI, so that bodies and streams pass through untouched.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bifrost_rt.serve.faults import fault
from bifrost_rt.serve.metrics import Metrics
from bifrost_rt.serve.settings import Settings

# Nothing secret, and what a page or a probe must see before it can know a token.
OPEN = ("/", "/page.css", "/page.js", "/healthz", "/readyz")
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Gate:
    """Lets requests through to `app`."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._too_large = f"a request has at most {settings.max_body} bytes here"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.answered(_method(scope["method"]), route, message["status"])
            await send(message)

        headers = Headers(scope=scope)
        if self._settings.loopback and not _local(headers.get("host", "")):
            # a page elsewhere whose name was made to point here (DNS rebinding)
            answer = fault(403, "this server answers to local names only", code="wrong_host")
        elif scope["path"] not in OPEN and not self._allowed(headers):
            answer = fault(401, "a bearer token is missing or wrong", code="invalid_api_key")
            answer.headers["WWW-Authenticate"] = "Bearer"
        elif _size(headers) > self._settings.max_body:
            answer = fault(413, self._too_large)
        else:
            await self._app(scope, self._measured(receive), counted)
            return
        await answer(scope, receive, counted)

    def _measured(self, receive: Receive) -> Receive:
        """What states no size is counted while it arrives."""
        size = 0

        async def measured() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._settings.max_body:
                raise HTTPException(413, self._too_large)
            return message

        return measured

    def _allowed(self, headers: Headers) -> bool:
        token = self._settings.token
        if token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), token.encode())
        return same and scheme.lower() == "bearer"


def _size(headers: Headers) -> int:
    text = headers.get("content-length", "")
    return int(text) if text.isdecimal() else 0


def _local(host: str) -> bool:
    name = host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host
    name = name if name.startswith("[") else name.partition(":")[0]
    return name.lower() in LOCAL_NAMES


def _method(name: str) -> str:
    known = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
    return name if name in known else "other"
