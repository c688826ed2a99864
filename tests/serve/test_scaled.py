"""The same service as an application of Ray Serve: two replicas on a local Ray, for real."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from bifrost_rt import Generator
from tests.patience import PATIENCE, until
from tests.serve.conftest import FEW, HANG_UP, LONG, Server, pixels

pytest.importorskip("ray.serve", reason="pip install 'bifrost-rt[ray]'")


# `allow_host` as `serve run` has it on a command line, `cors_origin` as a YAML file can
ARGUMENTS = {
    **{"max_batch": 1, "max_images": 8},
    **{"allow_host": "images.example,localhost", "cors_origin": ["https://app.example"]},
}


class Scaled(Server):
    """`serve run`, as a user types it, with a configuration that has a port of its own."""

    def __init__(self, engines: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = {
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [
                {
                    "import_path": "bifrost_rt.serve.ray_app:app",
                    "args": {"engines": str(engines), "replicas": 2, "cpus": 0.5, **ARGUMENTS},
                }
            ],
        }
        (folder / "scaled.yaml").write_text(json.dumps(config))  # JSON is YAML
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("serve"), "run", str(folder / "scaled.yaml")],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
                # a shell's background job ignores it, and so would what it starts
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

        def ready() -> bool:
            assert self.process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/readyz").status_code == 200
            return False

        until(ready)


@pytest.fixture(scope="module")
def scaled(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scaled]:
    server = Scaled(alpha_set, tmp_path_factory.mktemp("scaled"))
    yield server
    server.client.close()
    server.process.send_signal(signal.SIGINT)
    try:
        server.process.wait(timeout=PATIENCE)
    finally:
        server.process.kill()


def test_an_image_is_that_of_the_generator(scaled: Scaled, generator: Generator) -> None:
    answer = scaled.draw(prompt="a dog", seed=3, n=2).json()
    expected = generator.run("a dog", seed=3, num_images_per_prompt=2, **FEW).images
    for found, image in zip(answer["data"], expected, strict=True):
        assert np.array_equal(pixels(base64.b64decode(found["b64_json"])), np.asarray(image))


def test_two_replicas_draw_at_once_and_stop_when_they_are_told(scaled: Scaled) -> None:
    """A replica draws one batch at a time, so two that go on are two replicas."""
    long = {**LONG, "num_inference_steps": 200}
    jobs = [scaled.start(previews=True, n=4, **long) for _ in range(2)]
    for job in jobs:
        scaled.until(job, "running")
    until(lambda: min(scaled.job(job)["step"] for job in jobs) > 5)
    assert max(scaled.job(job)["step"] for job in jobs) < 200
    for job in jobs:
        assert scaled.client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    # both are free again: neither waited for a long job's end
    assert [scaled.draw(seed=i).status_code for i in range(3)] == [200] * 3
    assert max(scaled.job(job)["step"] for job in jobs) < 200


def test_progress_comes_through(scaled: Scaled) -> None:
    job = scaled.start(num_inference_steps=40, decoding_steps=2, previews=True)
    text = scaled.client.get(f"/v1/jobs/{job}/events").text
    names = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert names[-1] == "done"
    assert {"progress", "preview"} <= set(names)


def test_an_answer_is_that_of_the_generator(scaled: Scaled, generator: Generator) -> None:
    messages = [{"role": "user", "content": "hello"}]
    expected = generator.chat(messages, max_new_tokens=12, temperature=1.0, seed=2).text
    body = {"messages": messages, "max_tokens": 12, "temperature": 1.0, "seed": 2}
    answer = scaled.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == expected
    text = scaled.client.post("/v1/chat/completions", json={**body, "stream": True}).text
    *events, end = [line[6:] for line in text.splitlines() if line]
    assert end == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    long = scaled.client.post("/v1/chat/completions", json={**body, "max_tokens": 0})
    assert long.json()["error"]["param"] == "max_tokens"


def test_an_answer_that_nobody_waits_for_ends(scaled: Scaled) -> None:
    before = scaled.figure('bifrost_answers_total{state="cancelled"}')
    asked = {"max_tokens": 4000, "stream": True}
    body = {"messages": [{"role": "user", "content": "hello"}], **asked}
    with scaled.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    until(lambda: scaled.figure('bifrost_answers_total{state="cancelled"}') == before + 1)
    assert [scaled.draw(seed=i).status_code for i in range(3)] == [200] * 3


def test_a_client_that_hangs_up_cancels(scaled: Scaled) -> None:
    before = scaled.figure('bifrost_jobs_total{state="cancelled"}')
    body = {"prompt": "a cow", **LONG, "num_inference_steps": 200, "n": 8}
    with pytest.raises(httpx.ReadTimeout):
        scaled.client.post("/v1/images/generations", json=body, timeout=HANG_UP)
    until(lambda: scaled.figure('bifrost_jobs_total{state="cancelled"}') == before + 1)


def test_refusals_are_the_same(scaled: Scaled) -> None:
    assert scaled.draw(n=99).status_code == 400
    assert scaled.client.get("/v1/jobs/none").status_code == 404
    spoiled = scaled.draw(cfg_weight=3e38)
    assert spoiled.status_code == 500
    assert spoiled.json()["error"]["code"] == "not_finite"
    assert spoiled.json()["error"]["message"].startswith("engine `visual_decode`: tokens reach")
    assert "Traceback" not in spoiled.text


def test_warnings_come_through(scaled: Scaled) -> None:
    warnings = scaled.draw(prompt="a wooden bridge over a river " * 20).json()["warnings"]
    assert [text[:28] for text in warnings] == ["prompt 0: truncated: the MLLM"[:28]] + [
        f"prompt 0: truncated: {name} reads"[:28] for name in ("CLIP", "T5")
    ]


def test_the_door_answers_to_its_names_alone(scaled: Scaled) -> None:
    assert scaled.client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert scaled.draw(size="1024x1024").json()["error"]["param"] == "size"


def test_hosts_and_origins_are_the_same(scaled: Scaled) -> None:
    page = {"Host": "images.example", "Origin": "https://app.example"}
    answer = scaled.client.get("/v1/models/alpha", headers=page)
    assert answer.json()["id"] == "alpha"
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    asked = {**page, "Access-Control-Request-Method": "POST"}
    assert scaled.client.options("/v1/jobs", headers=asked).status_code == 204
    foreign = {**asked, "Origin": "https://evil.example"}
    assert scaled.client.options("/v1/jobs", headers=foreign).status_code == 403


def test_arguments_are_the_settings_of_the_command() -> None:
    from bifrost_rt.cli.options import parser
    from bifrost_rt.serve.ray_app import Arguments

    ours = {name.replace("-", "_") for name in vars(parser().parse_args(["serve"]))}
    of_the_process = {"command", "debug", "port", "grace"}
    assert ours - of_the_process == set(Arguments.model_fields) - {"replicas", "cpus", "gpus"}
    given = Arguments.model_validate({"engines": "x", "allow_host": "a,b", "cors_origin": ["c"]})
    assert (given.allow_host, given.cors_origin) == (("a", "b"), ("c",))
