"""The same service on many devices, with Ray Serve.

    serve run bifrost_rt.serve.ray_app:app engines=engines/sets/default replicas=2
    serve run bifrost_rt.serve.ray_app:app engines=… replicas=4 gpus=0.5 token_file=/etc/token

One door keeps queue, jobs and limits; replicas draw, each with an opened set of its own. A replica
takes one batch at a time, and what the door hears of a batch that nobody wants is cancelled there.
Requests therefore never meet a door that does not know their job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import abc
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from bifrost_rt import cache, manifest
from bifrost_rt.chat import ChatResult, OnText
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.generator import Generator
from bifrost_rt.messages import Turn
from bifrost_rt.pipeline import Output
from bifrost_rt.request import Request
from bifrost_rt.serve import read_token
from bifrost_rt.serve.app import create_app
from bifrost_rt.serve.job_queue import JobQueue
from bifrost_rt.serve.jobs import Stage
from bifrost_rt.serve.metrics import Metrics
from bifrost_rt.serve.settings import Limits, Settings
from bifrost_rt.serve.worker import Local, OnStep, Said

Step = tuple[int, Stage, int, NDArray[np.uint8] | None, Said | None]


# a list in YAML; `serve run` has texts alone
Names = Annotated[
    tuple[str, ...],
    BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given),
]


class Arguments(BaseModel):
    """What `serve run` or its YAML file says, with the names and defaults of `bifrost-rt serve`.
    Paths are as the workers see them."""

    model_config = ConfigDict(extra="forbid")

    engines: str
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0, description="of Ray's, for each replica")
    gpus: float = Field(0, ge=0, description="of each replica; 0.5 puts two on one device")
    backend: str | None = None
    memory_budget: str | None = None
    no_cache: bool = False
    host: str = Field("127.0.0.1", description="where Ray's proxy listens")
    token_file: str | None = None
    allow_host: Names = ()
    cors_origin: Names = ()
    max_images: int = Settings.max_images
    max_prompt: int = Settings.max_prompt
    max_steps: int = Settings.max_steps
    max_body: int = Settings.max_body
    max_image_body: int = Settings.max_image_body
    fetch_host: Names = ()
    max_batch: int = Limits.batch
    max_waiting: int = Limits.waiting
    keep: int = Limits.keep
    preview_every: int = Limits.preview_every or 0


class _StoppedError(Exception):
    """The door no longer listens."""


class Replica:
    """An opened engine set on one device, or a part of one."""

    def __init__(
        self, engines: str, backend: str | None, memory_budget: str | None, no_cache: bool = False
    ) -> None:
        if no_cache:
            os.environ[cache.OFF] = "1"  # the process is this replica's
        self._generator = Generator(engines, backend=backend, memory_budget=memory_budget)
        self._worker = Local(self._generator)
        self._thread = ThreadPoolExecutor(1)

    def no_previews(self) -> str | None:
        """Return the generator's own reason."""
        return self._worker.no_previews()

    def reloads(self) -> bool:
        """Return the generator's answer."""
        return self._worker.reloads()

    def look(self, arguments: Mapping[str, Any]) -> Request:
        """Make a request of arguments of `Generator.run`."""
        return self._thread.submit(self._worker.look, arguments).result()

    async def paint(
        self, requests: Sequence[Request], preview_every: int | None
    ) -> AsyncIterator[Step | list[Output]]:
        """Draw: every step as it is done, and the outputs at last. Ends when nobody listens."""
        paint = self._worker.paint
        async for told in self._streamed(
            lambda tell: paint(requests, lambda *step: tell(step), preview_every)
        ):
            yield told

    async def answer(
        self, turns: Sequence[Turn], parameters: ChatParameters
    ) -> AsyncIterator[str | ChatResult]:
        """Answer: every token's piece of text, and the result at last. Ends when nobody listens."""
        answer = self._worker.answer
        async for told in self._streamed(lambda tell: answer(turns, parameters, tell)):
            yield told

    async def _streamed(self, work: Callable[[Callable[[Any], None]], Any]) -> AsyncIterator[Any]:
        """Run in the worker's thread what tells of its progress: what it tells, and its result."""
        loop, steps = asyncio.get_running_loop(), asyncio.Queue[tuple[Any] | None]()
        stopped = threading.Event()

        def tell(step: Any) -> None:
            if stopped.is_set():
                raise _StoppedError
            loop.call_soon_threadsafe(steps.put_nowait, (step,))

        def run() -> Any:
            try:
                return work(tell)
            finally:
                loop.call_soon_threadsafe(steps.put_nowait, None)

        done = loop.run_in_executor(self._thread, run)
        try:
            while (step := await steps.get()) is not None:
                yield step[0]
            yield await done
        finally:
            stopped.set()
            await asyncio.wait([done])
            done.exception()  # has been raised above, or nobody is left to hear of it


class Remote:
    """A worker that is a replica somewhere. Which one, Ray decides for each batch."""

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas

    def look(self, arguments: Mapping[str, Any]) -> Request:
        """Have them looked at."""
        try:
            request: Request = self._replicas.look.remote(arguments).result()
        except RayTaskError as error:
            raise error.cause from error
        return request

    def paint(
        self, requests: Sequence[Request], on_step: OnStep, preview_every: int | None
    ) -> list[Output]:
        """Have them drawn."""
        call = self._replicas.options(stream=True).paint.remote(requests, preview_every)
        with contextlib.closing(_told(call)) as all_told:
            for told in all_told:
                if isinstance(told, list):
                    return told
                on_step(*told)
        raise AssertionError("a replica ended without images")

    def answer(
        self, turns: Sequence[Turn], parameters: ChatParameters, on_text: OnText
    ) -> ChatResult:
        """Have it answered."""
        call = self._replicas.options(stream=True).answer.remote(turns, parameters)
        with contextlib.closing(_told(call)) as all_told:
            for told in all_told:
                if isinstance(told, ChatResult):
                    return told
                on_text(told)
        raise AssertionError("a replica ended without an answer")

    def reloads(self) -> bool:
        """Return a replica's answer: all have the same set and budget."""
        answer: bool = self._replicas.reloads.remote().result()
        return answer

    def no_previews(self) -> str | None:
        """Return a replica's reason: all have the same set and budget."""
        reason: str | None = self._replicas.no_previews.remote().result()
        return reason

    def close(self) -> None:
        """Ray ends the replicas."""


def _told(call: Any) -> abc.Generator[Any, None, None]:
    """Yield what a replica tells. Who ends this early ends the replica's work."""
    try:
        yield from call
    except RayTaskError as error:
        raise error.cause from error  # whose text is the message, without the replica's trace
    finally:
        call.cancel()  # without effect where it has ended


class Ingress:
    """HTTP, the queue and the jobs."""

    def __init__(self, given: Arguments, replicas: DeploymentHandle[Any]) -> None:
        self._manifest = manifest.read(Path(given.engines))
        self._settings = Settings(
            host=given.host,
            token=None if given.token_file is None else read_token(given.token_file),
            allow_hosts=given.allow_host,
            cors_origins=given.cors_origin,
            max_images=given.max_images,
            max_prompt=given.max_prompt,
            max_steps=given.max_steps,
            max_body=given.max_body,
            max_image_body=given.max_image_body,
            fetch_hosts=given.fetch_host,
            limits=Limits(
                batch=given.max_batch,
                waiting=given.max_waiting,
                keep=given.keep,
                preview_every=given.preview_every or None,
            ),
        )
        workers = [Remote(replicas)] * given.replicas
        self._replicas, self._workers = replicas, workers

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Ray asks for it once, before the first request."""
        job_queue = await asyncio.to_thread(
            JobQueue, self._workers, self._settings.limits, Metrics()
        )
        return create_app(job_queue, self._manifest, self._settings)


_Replica: Any = serve.deployment(max_ongoing_requests=1)(Replica)
_Door: Any = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})(
    serve.ingress()(Ingress)
)


def app(arguments: dict[str, Any]) -> Any:
    """Return the application that `serve run` deploys; see `Arguments`."""
    given = Arguments.model_validate(arguments)
    replicas = _Replica.options(
        num_replicas=given.replicas,
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
    ).bind(given.engines, given.backend, given.memory_budget, given.no_cache)
    return _Door.bind(given, replicas)
