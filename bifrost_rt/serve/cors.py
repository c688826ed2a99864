"""Which pages of other origins may use this server from a browser: cross-origin resource sharing.

A browser asks before it sends such a page's request (`OPTIONS`, the preflight), and shows the page
an answer only where the answer names the page's origin. There are no cookies here, so credentials
are not shared: a page sends the token as a header, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.datastructures import Headers

from bifrost_rt.errors import RequestError

ANY = "*"
# What files on disk and sandboxed frames call themselves: any page can, so it is as open as `*`.
OPAQUE = "null"
METHODS = "GET, HEAD, POST, DELETE"
EXPOSED = "Location, Retry-After"
MAX_AGE = 600  # seconds for which a browser need not ask again
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::([0-9]{1,5}))?")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2000}")


def parse(text: str) -> str:
    """Return a value of `--cors-origin` as browsers send it: lower case, without a default port.

    Raises:
        RequestError: it is no origin.
    """
    given = text.strip().lower().removesuffix("/")
    if given in (ANY, OPAQUE):
        return given
    match = _ORIGIN.fullmatch(given)
    if match is None:
        raise RequestError(
            f"--cors-origin {text}: expected an origin, like https://app.example:8443",
            hint="a scheme, a name and a port; no path, and other scripts as xn--…",
        )
    scheme, name, port = match.groups()
    return f"{scheme}://{name}" + (
        f":{port}" if port and port != _DEFAULT_PORTS.get(scheme) else ""
    )


class Origins:
    """The origins that an operator allowed; none by default.

    Attributes:
        any: every page can be one of them.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(map(parse, allowed))
        self.any = bool(self._allowed & {ANY, OPAQUE})

    def allows(self, origin: str | None) -> bool:
        """Say whether pages of an origin may read answers."""
        return origin is not None and (ANY in self._allowed or origin in self._allowed)

    def headers(self, request: Headers) -> dict[str, str]:
        """Return what every answer to this request carries, errors and streams too."""
        if not self._allowed:
            return {}
        if ANY in self._allowed:
            return {"Access-Control-Allow-Origin": ANY, "Access-Control-Expose-Headers": EXPOSED}
        headers = {"Vary": "Origin"}  # or a cache gives one origin's answer to another
        origin = request.get("origin")
        if origin is not None and self.allows(origin):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = EXPOSED
        return headers


def is_preflight(method: str, request: Headers) -> bool:
    """Say whether a browser asks, rather than a client wants to know what a path can do."""
    return (
        method == "OPTIONS" and "origin" in request and "access-control-request-method" in request
    )


def permission(request: Headers) -> dict[str, str]:
    """Return what tells a browser that a page may send what it wants to send."""
    headers = {
        "Access-Control-Allow-Methods": METHODS,
        "Access-Control-Max-Age": str(MAX_AGE),
        "Vary": "Access-Control-Request-Headers",
    }
    # client libraries add headers of their own, and `*` would leave out Authorization
    names = request.get("access-control-request-headers", "")
    if _HEADER_NAMES.fullmatch(names):
        headers["Access-Control-Allow-Headers"] = names
    if request.get("access-control-request-private-network") == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"
    return headers
