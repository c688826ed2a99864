"""How a server is set up."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from bifrost_rt.errors import RequestError
from bifrost_rt.serve.cors import Origins
from bifrost_rt.serve.fetching import is_name
from bifrost_rt.serve.hosts import Hosts

# A token that can be guessed is none.
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Limits:
    """Attributes:
    batch: images of one run.
    waiting: images in the queue.
    keep: finished jobs that are remembered.
    preview_every: denoising steps from preview to preview; None draws none.
    """

    batch: int = 4
    waiting: int = 64
    keep: int = 64
    preview_every: int | None = 4


@dataclass(frozen=True)
class Settings:
    """Attributes:
        token: what requests must carry as `Authorization: Bearer …`; None asks for nothing.
        allow_hosts: names in the Host header besides this machine's own; `*` is any.
        cors_origins: origins whose pages may use the server from a browser; `*` is any.
        max_images, max_prompt, max_steps, max_body: of one request: images, characters,
            denoising steps, bytes.
        max_image_body: bytes of a request that may hold images.
        fetch_hosts: names from which images are fetched that a conversation gives by address; see
            `fetching.py`.
        grace: seconds for what runs when the server is told to stop.

    Raises:
        RequestError: a number, name or origin that cannot be, or a server without a token that
            others reach: by its address, by any name, or from any page.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    allow_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_images: int = 8
    max_prompt: int = 4000
    max_steps: int = 200
    max_body: int = 65536
    max_image_body: int = 16 << 20
    fetch_hosts: tuple[str, ...] = ()
    grace: float = 300
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        numbers = {
            "max-images": self.max_images,
            "max-prompt": self.max_prompt,
            "max-steps": self.max_steps,
            "max-body": self.max_body,
            "max-image-body": self.max_image_body,
            "max-batch": self.limits.batch,
            "max-waiting": self.limits.waiting,
            "preview-every": self.limits.preview_every or 1,
        }
        for name, value in numbers.items():
            if value < 1:
                raise RequestError(f"--{name} cannot be {value}")
        if self.grace < 0 or self.limits.keep < 0:
            raise RequestError("--grace and --keep cannot be negative")
        if not 0 <= self.port < 65536:
            raise RequestError(f"--port must be from 0 to 65535, got {self.port}")
        if bad := [name for name in self.fetch_hosts if not is_name(name)]:
            raise RequestError(
                f"--fetch-host {bad[0]}: expected a name or an address, like images.example",
                hint="leave scheme and path out; a port other than 443 stands behind a colon",
            )
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise RequestError(
                f"the token has {len(self.token)} characters, at least {SHORTEST_TOKEN} are asked "
                "for",
                hint="openssl rand -hex 32 > token",
            )
        self._refuse_what_is_open_to_all()

    def _refuse_what_is_open_to_all(self) -> None:
        hosts, origins = Hosts(self.allow_hosts), Origins(self.cors_origins)
        if self.token is not None:
            return
        if not self.loopback:
            open_to = f"--host {self.host} is reached by other machines"
            hint = "openssl rand -hex 32 > token, and --token-file token"
        elif hosts.any:
            open_to = "--allow-host * answers to names that foreign pages point here"
            hint = "name the hosts that are meant, or --token-file token"
        elif origins.any:
            open_to = f"--cors-origin {' '.join(self.cors_origins)} lets every page on the web draw"
            hint = "name the origins that are meant, or --token-file token"
        else:
            return
        raise RequestError(f"{open_to}, and there is no token", hint=hint)

    @property
    def hosts(self) -> Hosts | None:
        """The names that requests may call the server by; None: any."""
        return Hosts(self.allow_hosts) if self.loopback or self.allow_hosts else None

    @property
    def origins(self) -> Origins:
        """The pages that may use the server from a browser."""
        return Origins(self.cors_origins)

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False
