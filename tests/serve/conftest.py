"""Servers as a user starts them: a process, an address on stdout, a signal to stop."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.patience import PATIENCE, until

# The smallest job, and one that lasts.
FEW = {"num_inference_steps": 1, "decoding_steps": 1}
LONG = {"num_inference_steps": 2000, "decoding_steps": 1}
HANG_UP = httpx.Timeout(PATIENCE, read=0.5)  # of a client that asked for something LONG

# what a browser asks of its maker is of no use here, and a container has no sandbox for root
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


class Server:
    """A running `bifrost-rt serve`."""

    def __init__(self, engines: Path, *options: str) -> None:
        command = [sys.executable, "-m", "bifrost_rt", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--engines", str(engines), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.log: list[str] = []
        self._reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,))
        self._reader.start()
        self.url = self.process.stdout.readline().strip().rstrip("/")
        assert self.url, self.stop()
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Tell it to stop; its exit status and its log."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        status = self.process.wait(timeout=PATIENCE)
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()
        return status, "".join(self.log)

    def draw(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/images/generations", json={"prompt": "a cow", **FEW, **body})

    def start(self, **body: Any) -> str:
        answer = self.client.post("/v1/jobs", json={"prompt": "a cow", **FEW, **body})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.client.get(f"/v1/jobs/{job_id}").json())

    def until(self, job_id: str, *states: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["state"] in states else None

        found = until(reached)
        assert found is not None
        return found

    def figure(self, name: str) -> float:
        """One of Prometheus' figures."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        return 0.0


@pytest.fixture(scope="session")
def serving(alpha_set: Path) -> Callable[..., AbstractContextManager[Server]]:
    """`with serving("--max-batch", "2") as server`. Whatever it did, its log holds no trace."""

    @contextlib.contextmanager
    def start(*options: str, engines: Path = alpha_set) -> Iterator[Server]:
        server = Server(engines, *options)
        try:
            yield server
        finally:
            server.client.close()
            status, log = server.stop()
        assert status == 0, log
        assert "Traceback" not in log

    return start


@pytest.fixture(scope="session")
def server(serving: Callable[..., AbstractContextManager[Server]]) -> Iterator[Server]:
    """One server for the tests that leave it as they found it."""
    with serving("--max-steps", "2000", "--max-images", "4", "--max-waiting", "8") as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window. It ends with the module: it holds this thread's event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        reason = "no Chromium here: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=list(QUIET))
        yield opened
        opened.close()


def pixels(file: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))
