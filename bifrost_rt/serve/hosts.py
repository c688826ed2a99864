"""The names that requests may call this server by, in their Host header.

A page elsewhere can have its own name point at this machine (DNS rebinding). Its browser then takes
the server for a part of that page, and only the name in the Host header tells the two apart.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from bifrost_rt.errors import RequestError

ANY = "*"
LOCAL_NAMES = frozenset({"localhost", "[::1]"})  # and 127.0.0.0/8, see `is_local`
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


def parse(text: str) -> str:
    """Return a value of `--allow-host` as browsers write it: lower case, IPv6 addresses in
    brackets.

    Raises:
        RequestError: it is no name and no address.
    """
    name = text.strip().lower().removesuffix(".")
    if name == ANY:
        return name
    try:
        address = ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"--allow-host {text}: expected a name or an address, like images.example",
                hint="leave scheme, port and path out, and write other scripts as xn--…",
            ) from None
        return name
    return f"[{address}]" if address.version == 6 else str(address)


def name_of(header: str) -> str:
    """Return the name in a Host header, without its port, in lower case."""
    bracketed = header.startswith("[") and "]" in header
    name = header[: header.index("]") + 1] if bracketed else header.partition(":")[0]
    return name.lower().removesuffix(".")


def is_local(name: str) -> bool:
    """Say whether a name leads to this machine for everybody, whatever a name server says."""
    if name in LOCAL_NAMES:
        return True
    try:
        return ipaddress.IPv4Address(name).is_loopback
    except ValueError:
        return False


class Hosts:
    """This machine's own names, and those that an operator allowed.

    Attributes:
        any: every name is allowed.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(map(parse, allowed))
        self.any = ANY in self._allowed

    def answers(self, header: str) -> bool:
        """Say whether a request with this Host header is let in."""
        name = name_of(header)
        return self.any or name in self._allowed or is_local(name)
