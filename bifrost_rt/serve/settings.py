"""How a server is set up."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from bifrost_rt.errors import RequestError

# A token that can be guessed is none.
SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Limits:
    """Attributes:
    batch: pictures of one run.
    waiting: pictures in the queue.
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
        max_images, max_prompt, max_steps, max_body: of one request: pictures, characters,
            denoising steps, bytes.
        grace: seconds for what runs when the server is told to stop.

    Raises:
        RequestError: a number that cannot be, or an address that others reach without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_images: int = 8
    max_prompt: int = 4000
    max_steps: int = 200
    max_body: int = 65536
    grace: float = 300
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        numbers = {
            "max-images": self.max_images,
            "max-prompt": self.max_prompt,
            "max-steps": self.max_steps,
            "max-body": self.max_body,
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
        if self.token is not None and len(self.token) < SHORTEST_TOKEN:
            raise RequestError(
                f"the token has {len(self.token)} characters, at least {SHORTEST_TOKEN} are asked "
                "for",
                hint="openssl rand -hex 32 > token",
            )
        if self.token is None and not self.loopback:
            raise RequestError(
                f"--host {self.host} is reached by other machines, and there is no token",
                hint="openssl rand -hex 32 > token, and --token-file token",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False
