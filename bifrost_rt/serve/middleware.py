"""What a request meets before any route: a count, the host that it names, the page that it comes
from, the token that it has, its size.

Plain ASGI, so that bodies and streams pass through untouched.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bifrost_rt.serve import cors
from bifrost_rt.serve.errors import CHAT, FORMS, fault, unexpected
from bifrost_rt.serve.metrics import Metrics
from bifrost_rt.serve.settings import Settings

# Nothing secret, and what a page or a probe must see before it can know a token.
OPEN = ("/", "/page.css", "/page.js", "/healthz", "/readyz")
STREAM = "/events"  # the end of paths whose answer goes on


class Gate:
    """Lets requests through to `app`."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._hosts = settings.hosts
        self._origins = settings.origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        headers = Headers(scope=scope)
        # HEAD is GET whose body the HTTP server leaves out; a stream would not end
        headless = method == "HEAD" and not path.endswith(STREAM)
        inner = {**scope, "method": "GET"} if headless else scope
        begun = False

        async def answered(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = getattr(inner.get("route"), "path", "none")
                self._metrics.answered(_method(method), route, message["status"])
                answer = MutableHeaders(scope=message)
                for name, value in self._origins.headers(headers).items():
                    if name == "Vary":
                        answer.add_vary_header(value)
                    else:
                        answer[name] = value
            await send(message)

        answer = self._answer(method, path, headers)
        if answer is not None:
            await answer(scope, receive, answered)
            return
        try:
            await self._app(inner, self._measured(receive, self._most(path)), answered)
        except Exception as error:
            if begun:
                raise
            await unexpected(method, path, error)(scope, receive, answered)

    def _answer(self, method: str, path: str, headers: Headers) -> Response | None:
        """Return what is answered here; None lets the request through."""
        if self._hosts is not None and not self._hosts.answers(headers.get("host", "")):
            return fault(
                403,
                "this server does not answer to the name in the Host header; it is started with "
                "--allow-host NAME for names besides this machine's own",
                code="wrong_host",
            )
        if cors.is_preflight(method, headers):
            if self._origins.allows(headers.get("origin")):
                return Response(status_code=204, headers=cors.permission(headers))
            return fault(
                403,
                "pages of other origins may not use this server; it is started with "
                "--cors-origin ORIGIN for those that may",
                code="wrong_origin",
            )
        if path not in OPEN and not self._allowed(headers):
            answer = fault(401, "a bearer token is missing or wrong", code="invalid_api_key")
            answer.headers["WWW-Authenticate"] = "Bearer"
            return answer
        if _size(headers) > (most := self._most(path)):
            return fault(413, _too_large(most))
        if method == "POST" and path in FORMS and self._foreign(headers):
            return fault(
                403,
                "pages of other origins may not use this server; it is started with "
                "--cors-origin ORIGIN for those that may",
                code="wrong_origin",
            )
        if method == "POST" and self._unasked(headers):
            return fault(
                400,
                "a page must send its request with Content-Type: application/json",
                code="invalid_content_type",
            )
        return None

    def _unasked(self, headers: Headers) -> bool:
        """Say whether a page sends a body without a type. Browsers do so without a preflight, so
        any page could have its visitors' servers draw."""
        origin = headers.get("origin")
        typeless = not headers.get("content-type")
        return typeless and origin is not None and not self._origins.allows(origin)

    def _foreign(self, headers: Headers) -> bool:
        """Say whether a page of another origin sends a form. Browsers do so without a preflight."""
        origin = headers.get("origin")
        if origin is None or self._origins.allows(origin):
            return False
        return origin.partition("://")[2] != headers.get("host")

    def _most(self, path: str) -> int:
        """Return bytes that a request may have."""
        with_images = path == CHAT or path in FORMS
        return self._settings.max_image_body if with_images else self._settings.max_body

    def _measured(self, receive: Receive, most: int) -> Receive:
        """Count the bytes of what states no size while it arrives."""
        size = 0

        async def measured() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, _too_large(most))
            return message

        return measured

    def _allowed(self, headers: Headers) -> bool:
        token = self._settings.token
        if token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), token.encode())
        return same and scheme.lower() == "bearer"


def _too_large(most: int) -> str:
    return f"a request has at most {most} bytes here"


def _size(headers: Headers) -> int:
    text = headers.get("content-length", "")
    return int(text) if text.isdecimal() else 0


def _method(name: str) -> str:
    known = ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH")
    return name if name in known else "other"
