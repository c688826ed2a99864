"""Jobs: progress, previews, cancelling, and what is left of them."""

from __future__ import annotations

import base64
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bifrost_rt import Generator
from tests.patience import PATIENCE, until
from tests.serve.conftest import FEW, HANG_UP, LONG, Server, pixels


def events(server: Server, job_id: str) -> Iterator[tuple[str, Any]]:
    with server.client.stream("GET", f"/v1/jobs/{job_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


def test_a_job_tells_how_far_it_is(server: Server, generator: Generator) -> None:
    steps = {"num_inference_steps": 40, "decoding_steps": 30}
    job_id = server.start(prompt="a dog", seed=3, previews=True, **steps)
    seen = list(events(server, job_id))
    places = [(data["stage"], data["step"]) for name, data in seen if name == "progress"]
    order = {None: 0, "decoding": 1, "denoising": 2}
    assert places == sorted(places, key=lambda place: (order[place[0]], place[1]))
    assert seen[-1][0] == "done"
    done = seen[-1][1]
    assert done["seconds"]["denoise"] > 0
    assert done["parameters"]["seed"] == 3
    previews = [data for name, data in seen if name == "preview"]
    assert previews
    assert all(data["step"] % 4 == 0 for data in previews)
    assert pixels(base64.b64decode(previews[0]["webp"])).shape == (128, 128, 3)
    file = server.client.get(done["images"][0])
    expected = generator.run("a dog", seed=3, **steps).image
    assert np.array_equal(pixels(file.content), np.asarray(expected))
    # who comes late hears how it ended
    assert [name for name, _ in events(server, job_id)] == ["done"]


def test_a_cancelled_job_ends_and_the_next_begins(server: Server) -> None:
    job_id = server.start(**LONG)
    server.until(job_id, "running")
    assert server.client.delete(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"
    assert server.draw().status_code == 200
    assert server.job(job_id)["step"] < LONG["num_inference_steps"]  # it was not waited for
    assert server.client.delete(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"
    assert list(events(server, job_id))[-1][0] == "cancelled"
    assert server.client.get(f"/v1/jobs/{job_id}/images/0").status_code == 404


@pytest.mark.parametrize("path", ["", "/events", "/images/0"])
@pytest.mark.parametrize("name", ["0" * 32, "..%2f..%2fmanifest.json", "%00", "a\\..\\b", "é"])
def test_no_such_job(server: Server, name: str, path: str) -> None:
    answer = server.client.get(f"/v1/jobs/{name}{path}")
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_hangs_up_cancels(server: Server) -> None:
    cancelled = 'bifrost_jobs_total{state="cancelled"}'
    before = server.figure(cancelled)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(
            "/v1/images/generations", json={"prompt": "a cow", **LONG}, timeout=HANG_UP
        )
    until(lambda: server.figure(cancelled) > before)
    assert server.figure(cancelled) == before + 1
    assert server.figure("bifrost_running_jobs") == 0
    assert server.draw().status_code == 200


def test_fifty_cancels_at_random_moments_leave_nothing(
    serving: Callable[..., Any], generator: Generator
) -> None:
    rng = random.Random(0)
    with serving("--max-batch", "3") as server:
        memory = []
        for i in range(51):
            steps = {"num_inference_steps": 20, "decoding_steps": 10}
            body = {**steps, "seed": i, "n": rng.randint(1, 2), "previews": rng.random() < 0.5}
            job_id = server.start(**body)
            time.sleep(rng.random() * 0.3)
            server.client.delete(f"/v1/jobs/{job_id}")
            if i % 25 == 0:
                memory.append(_resident(server))
        assert server.figure("bifrost_waiting_images") == 0
        assert server.figure("bifrost_running_jobs") == 0
        assert memory[2] < memory[1] * 1.05
        answer = server.draw(seed=5)
        expected = generator.run("a cow", seed=5, **FEW).image
        image = base64.b64decode(answer.json()["data"][0]["b64_json"])
        assert np.array_equal(pixels(image), np.asarray(expected))


def test_only_so_many_finished_jobs_are_remembered(serving: Callable[..., Any]) -> None:
    with serving("--keep", "2") as server:
        jobs = [server.start(seed=i) for i in range(4)]
        server.until(jobs[-1], "done")
        assert [server.client.get(f"/v1/jobs/{j}").status_code for j in jobs] == [
            404,
            404,
            200,
            200,
        ]


def test_what_runs_is_finished_and_what_waits_is_told(serving: Callable[..., Any]) -> None:
    with serving("--max-batch", "1", "--max-steps", "2000") as server:
        answers: dict[str, httpx.Response] = {}

        def ask(name: str, **body: Any) -> None:
            answers[name] = httpx.post(
                f"{server.url}/v1/images/generations",
                json={"prompt": "a cow", "decoding_steps": 1, **body},
                timeout=PATIENCE,
            )

        threads = [
            threading.Thread(target=ask, args=("runs",), kwargs={"num_inference_steps": 300})
        ]
        threads[0].start()
        while server.figure("bifrost_running_jobs") == 0:
            time.sleep(0.01)
        threads.append(threading.Thread(target=ask, args=("waits",), kwargs=FEW))
        threads[1].start()
        while server.figure("bifrost_waiting_images") == 0:
            time.sleep(0.01)
        status, _ = server.stop()
        for thread in threads:
            thread.join()
    assert status == 0
    assert answers["runs"].status_code == 200
    assert len(answers["runs"].json()["data"]) == 1
    assert answers["waits"].status_code == 503
    assert "shutting down" in answers["waits"].json()["error"]["message"]


def test_a_server_whose_grace_ends_stops_well(serving: Callable[..., Any]) -> None:
    with serving("--grace", "1", "--max-steps", "2000") as server:
        job_id = server.start(n=4, **LONG)
        server.until(job_id, "running")
        server.stop()  # its status is looked at


def _resident(server: Server) -> int:
    with open(f"/proc/{server.process.pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["VmRSS"].split()[0])


def test_ctrl_c_ends_it_without_a_trace(alpha_set: Path) -> None:
    server = Server(alpha_set)
    assert server.draw().status_code == 200
    server.client.close()
    status, log = server.stop(signal.SIGINT)
    assert status == 0, log
    assert "Traceback" not in log
