"""One process with one generator, under uvicorn."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys

import uvicorn

from bifrost_rt.errors import BifrostError
from bifrost_rt.generator import Generator
from bifrost_rt.serve.app import create_app
from bifrost_rt.serve.job_queue import JobQueue
from bifrost_rt.serve.metrics import Metrics
from bifrost_rt.serve.settings import Settings
from bifrost_rt.serve.worker import Local


class Server(uvicorn.Server):
    """uvicorn, which on SIGTERM or Ctrl-C lets answers finish that are on their way. The queue is
    stopped first, so that what waits is told and streams come to an end."""

    def __init__(self, config: uvicorn.Config, job_queue: JobQueue) -> None:
        super().__init__(config)
        self._job_queue = job_queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what runs."""
        self._job_queue.stop()
        await super().shutdown(sockets)


def run(
    engines: str | None, backend: str | None, memory_budget: str | None, settings: Settings
) -> int:
    """Open the set, listen, and serve until told to stop. The address goes to stdout, all else to
    stderr."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    listening = _listen(settings)  # before the engines are opened: a taken port is said at once
    with listening, Generator(engines, backend=backend, memory_budget=memory_budget) as generator:
        job_queue = JobQueue([Local(generator)], settings.limits, Metrics())
        if settings.limits.preview_every and job_queue.no_previews:
            logging.warning("no previews: %s", job_queue.no_previews)
        app = create_app(job_queue, generator.manifest, settings)
        config = uvicorn.Config(
            app, log_config=None, timeout_graceful_shutdown=int(settings.grace), server_header=False
        )
        listening.listen(config.backlog)  # from here on, who connects is answered
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"http://{host}:{listening.getsockname()[1]}/", flush=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # uvicorn handles it, then raises it again
        Server(config, job_queue).run([listening])
    return 0


def _listen(settings: Settings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as unless_bound:
            listening = unless_bound.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            unless_bound.pop_all()
    except OSError as error:
        raise BifrostError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}",
            hint="choose another with --host and --port; --port 0 takes a free one",
        ) from None
    return listening
