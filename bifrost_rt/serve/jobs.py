"""A job or an answer: what was asked, how far it is, what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bifrost_rt.chat import ChatResult
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.messages import Turn
from bifrost_rt.request import Request

State = Literal["queued", "running", "done", "failed", "cancelled"]
Stage = Literal["thinking", "decoding", "denoising"]


@dataclass(frozen=True)
class Failure:
    """Why a job has no images, or a conversation no answer: in words for the client, the HTTP
    status that says so, and a code for programs."""

    message: str
    status: int
    code: str | None = None


@dataclass(eq=False, kw_only=True)
class Work:
    """What is waited for. Its fields change under the queue's lock; `watch` is for any thread with
    an event loop.

    Attributes:
        version: grows with every change.
    """

    id: str = field(default_factory=lambda: secrets.token_hex(16))
    created: float = field(default_factory=time.time)
    state: State = "queued"
    failure: Failure | None = None
    version: int = 0
    _watchers: set[_Watcher] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")

    def changed(self) -> None:
        """Wake everyone who watches."""
        self.version += 1
        with self._lock:
            for watcher in self._watchers:
                watcher.wake()

    async def watch(self) -> AsyncIterator[int]:
        """Yield the version now and after every change, until it is finished. Who reads slowly
        misses versions between; none are kept."""
        watcher = _Watcher(asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._watchers.add(watcher)
        try:
            seen = -1
            while True:
                watcher.event.clear()
                if self.version != seen:
                    seen = self.version
                    finished = self.finished
                    yield seen
                    if finished:
                        return
                else:
                    await watcher.event.wait()
        finally:
            with self._lock:
                self._watchers.discard(watcher)

    async def wait(self) -> None:
        """Return when it is finished."""
        async for _ in self.watch():
            pass


@dataclass(eq=False)
class Job(Work):
    """Images on their way.

    Attributes:
        request: checked; its images are drawn in one run, alone or with those of other jobs.
        arguments: of `Generator.run`, where images are among them: the request is made of them
            before it is drawn, and until then `request` stands for what else is asked for.
        file_format: of the images, as Pillow calls it.
        previews: whether someone wants to see it become.
        thought: what the MLLM has said so far of its prompt, where it is to.
        preview: (denoising step, WebP) of the first image.
        files: of the images, when it is done.
        warnings: what was asked for and not done, in words; see `bifrost_rt.notes`.
    """

    request: Request
    file_format: str = "PNG"
    previews: bool = False
    stage: Stage | None = None
    step: int = 0
    thought: str | None = None
    preview: tuple[int, bytes] | None = None
    arguments: dict[str, Any] | None = None
    files: list[bytes] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps its present stage has; 0 where nobody knows."""
        if self.stage == "thinking":
            return 0
        decoding, options = self.stage == "decoding", self.request.parameters
        return options.decoding_steps if decoding else options.num_inference_steps


@dataclass(eq=False)
class Answer(Work):
    """Words on their way.

    Attributes:
        turns: the conversation, checked.
        parameters: how it is answered.
        pieces: of the text, as they come; there are only ever more of them.
        warnings: what was asked for and has no effect, in words.
        first_token: when it came, as `created` counts.
        result: there when it is done.
    """

    turns: Sequence[Turn]
    parameters: ChatParameters
    warnings: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    first_token: float | None = None
    result: ChatResult | None = None

    async def begun(self) -> None:
        """Return when there is a first piece, or it is finished."""
        async for _ in self.watch():
            if self.pieces:
                return


@dataclass(frozen=True, eq=False)
class _Watcher:
    loop: asyncio.AbstractEventLoop
    event: asyncio.Event

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self.loop.call_soon_threadsafe(self.event.set)
