"""Images that a conversation gives by address, from hosts that the operator named.

Whoever may send requests chooses the address, so it could lead anywhere that this machine reaches:
https alone, named hosts alone, no private address behind a name, nothing larger or slower than the
limits, and a redirect is an address like any other on the same host.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable
from urllib.parse import SplitResult, urljoin, urlsplit

from bifrost_rt.errors import RequestError
from bifrost_rt.serve import hosts

SECONDS = 20.0  # for one image, all in all
MOST_REDIRECTS = 3
_CHUNK = 1 << 16


def is_name(text: str) -> bool:
    """Say whether a value of `--fetch-host` is a name or an address, perhaps with a port."""
    if text.strip() == hosts.ANY:
        return False
    try:
        split = urlsplit(f"//{text.strip()}")
        hosts.parse(split.hostname or "")
        return split.port != 0 and not (split.path or split.username or split.query)
    except (RequestError, ValueError):
        return False


class Fetcher:
    """Reads images from the hosts that it was given.

    Args:
        names: like images.example, 192.0.2.7 or images.example:8443.
        most: bytes of an image.
    """

    def __init__(self, names: Iterable[str], most: int) -> None:
        self._hosts = {_host_of(urlsplit(f"//{name.strip()}")) for name in names}
        self._names = {name for name, _ in self._hosts}
        self._most = most
        self._tls = ssl.create_default_context() if self._hosts else None

    def __call__(self, url: str, where: str) -> bytes:
        """Return the bytes behind an address.

        Args:
            where: what errors call the image.

        Raises:
            RequestError: the address is not allowed, or does not answer with so many bytes in time.
        """
        if not self._hosts:
            raise RequestError(
                f"{where}: images are not fetched from addresses here",
                hint="send the image itself, as data:image/png;base64,…; the server fetches from "
                "hosts that it is started with: --fetch-host NAME",
            )
        deadline = time.monotonic() + SECONDS
        first = None
        for _ in range(1 + MOST_REDIRECTS):
            split = self._allowed(url, where)
            if first is not None and _host_of(split) != first:
                raise RequestError(f"{where}: the address redirects to another host")
            first = _host_of(split)
            try:
                found = self._get(split, where, deadline)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                reason = "it took too long" if isinstance(error, TimeoutError) else error
                raise RequestError(
                    f"{where}: {first[0]} does not give the image: {reason}"
                ) from None
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise RequestError(f"{where}: the address redirects more than {MOST_REDIRECTS} times")

    def _allowed(self, url: str, where: str) -> SplitResult:
        try:
            split = urlsplit(url)
            host = _host_of(split)
        except ValueError:
            raise RequestError(f"{where}: the url cannot be read as an address") from None
        if split.scheme != "https":
            raise RequestError(
                f"{where}: the url must begin with https:// or data:, as images are fetched here"
            )
        if host not in self._hosts or split.username is not None:
            raise RequestError(
                f"{where}: images are not fetched from that host here",
                hint="send the image itself, as data:image/png;base64,…; the server fetches from "
                "hosts that it is started with: --fetch-host NAME",
            )
        return split

    def _get(self, split: SplitResult, where: str, deadline: float) -> bytes | str:
        """Return the bytes of the image, or where a redirect leads."""
        name, port = _host_of(split)
        address = self._address(name, port, where)
        connection = http.client.HTTPSConnection(name, port)
        with socket.create_connection(address, _left(deadline)) as plain:
            assert self._tls is not None
            with self._tls.wrap_socket(plain, server_hostname=name.strip("[]")) as tls:
                connection.sock = tls
                path = (split.path or "/") + (f"?{split.query}" if split.query else "")
                connection.request("GET", path, headers={"Accept": "image/*"})
                with connection.getresponse() as answer:
                    return self._read(answer, tls, where, deadline)

    def _read(
        self, answer: http.client.HTTPResponse, tls: ssl.SSLSocket, where: str, deadline: float
    ) -> bytes | str:
        if answer.status in (301, 302, 303, 307, 308):
            return answer.headers.get("Location", "")
        if answer.status != 200:
            raise RequestError(f"{where}: the address is answered with {answer.status}")
        data = bytearray()
        while True:
            tls.settimeout(_left(deadline))
            chunk = answer.read1(_CHUNK)
            if not chunk:
                return bytes(data)
            data += chunk
            if len(data) > self._most:
                raise RequestError(f"{where}: the image has more than {self._most} bytes")

    def _address(self, name: str, port: int, where: str) -> tuple[str, int]:
        """Say where the name leads now; the connection goes there and nowhere else."""
        found = socket.getaddrinfo(name.strip("[]"), port, type=socket.SOCK_STREAM)
        for *_, place in found:
            address = ipaddress.ip_address(str(place[0]).partition("%")[0])
            named = hosts.parse(str(address)) in self._names
            if named or (address.is_global and not address.is_multicast):
                return str(place[0]), port
        raise RequestError(
            f"{where}: {name} leads to a private address",
            hint="the server fetches from it where --fetch-host names the address too",
        )


def _host_of(split: SplitResult) -> tuple[str, int]:
    """Name and port of an address, as hosts are compared.

    Raises:
        ValueError: there is none.
    """
    return hosts.parse(split.hostname or ""), split.port or 443


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left
