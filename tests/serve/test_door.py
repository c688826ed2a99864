"""What comes in through the door: sizes, hosts, content, and settings that would leave it open."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from bifrost_rt.cli import main
from bifrost_rt.serve.metrics import Metrics
from bifrost_rt.serve.middleware import Gate
from bifrost_rt.serve.settings import Settings
from tests.serve.conftest import FEW, Server


def test_probes_and_figures(server: Server) -> None:
    assert server.client.get("/healthz").text == "ok\n"
    assert server.client.get("/readyz").text == "ready\n"
    drawn = server.figure("bifrost_images_total")
    server.draw(n=2)
    assert server.figure("bifrost_images_total") == drawn + 2
    server.client.get("/nowhere/at/all")
    text = server.client.get("/metrics").text
    assert 'bifrost_requests_total{method="GET",route="none",status="404"}' in text
    assert "/nowhere" not in text
    assert 'bifrost_stage_seconds_count{stage="denoise"}' in text


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"x" * 70000, {}, 413),
        (b'{"prompt": "' + b"a" * 70000 + b'"}', {}, 413),
        (b"", {}, 400),
        (b"{", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 30000, {}, 400),
        (b'{"prompt": "a", "n": ' + b"9" * 6000 + b"}", {}, 400),
        (b'{"prompt": "a", "cfg_weight": NaN}', {}, 400),
        (b'{"prompt": "a", "cfg_weight": 1e999}', {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b'{"prompt": "a", "\\ud800": 1}', {}, 400),
        (b'{"prompt": "a", "prompt\\u0000": 1}', {}, 400),
        (b'{"prompt": null}', {}, 400),
        (b'["prompt"]', {}, 400),
        (b'{"prompt": "a"}', {"Content-Type": "text/plain"}, 400),
        (b'{"prompt": "a"}', {"Host": "evil.example"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/jobs"])
def test_bodies_that_are_no_requests(
    server: Server, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    headers = {"Content-Type": "application/json", **headers}
    answer = server.client.post(path, content=body, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_cut_off_too(server: Server) -> None:
    chunks = (b"x" * 1000 for _ in range(100))
    answer = server.client.post(
        "/v1/jobs", content=chunks, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml",
        "/page.js/../../server.py",
        "/%2e%2e/server.py",
        "//etc/passwd",
        "/docs",
    ],
)
def test_paths_lead_nowhere(server: Server, path: str) -> None:
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port)) as s:
        s.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: s.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 404")


def test_a_nonsensical_range_is_not_heard(server: Server) -> None:
    answer = server.client.get("/page.js", headers={"Range": "bytes=x"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/javascript")


def test_the_document_of_the_api_can_be_read(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    assert document["info"]["title"] == "bifrost-rt"
    assert "/v1/images/generations" in document["paths"]
    assert len(json.dumps(document)) < 100_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "is reached by other machines, and there is no token\nhint: open"),
        (["--host", "example"], "is reached by other machines"),
        (["--token-file", "nowhere"], "cannot be read as a token"),
        (["--token-file", "short"], "the token has 3 characters"),
        (["--token-file", "utf16"], "cannot be read as a token: utf16: expected text in UTF-8"),
        (["--token-file", "umlaut"], "cannot be read as a token: it is not ASCII"),
        (["--max-batch", "0"], "--max-batch cannot be 0"),
        (["--preview-every", "-1"], "--preview-every cannot be -1"),
        (["--grace", "-1"], "cannot be negative"),
        (["--allow-host", "http://images.example"], "--allow-host http://images.example: expected"),
        (["--allow-host", "images.example:443"], "leave scheme, port and path out"),
        (["--allow-host", "*"], "foreign pages point here, and there is no token\nhint: name the"),
        (["--cors-origin", "app.example"], "--cors-origin app.example: expected an origin, like"),
        (
            ["--cors-origin", "*"],
            "lets every page on the web draw, and there is no token\nhint: name",
        ),
        (["--cors-origin", "null"], "lets every page on the web draw, and there is no token"),
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--engines", "nowhere"], "read an engine set here: no such folder"),
    ],
)
def test_a_server_that_is_not_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("abc\n")
    Path("utf16").write_text("correct-horse-battery", encoding="utf-16")
    Path("umlaut").write_text("correct-horse-bättery", encoding="utf-8")
    given = [] if "--port" in options else ["--port", "0"]
    assert main(["serve", *given, *options]) == 1
    assert message in capsys.readouterr().err


ALLOWED = ("--allow-host", "Images.Example.", "--allow-host", "192.0.2.7")
OURS = ("localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.1.2.3:1", "[::1]:8000")
PROXIED = ("images.example", "Images.Example:443", "images.example.", "192.0.2.7:8000")
FOREIGN = (
    *("evil.example", "images.example.evil.example", "evil-images.example", "192.0.2.70", ""),
    *("127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "[::2]", "[::1", "@localhost"),
)


@pytest.mark.parametrize("host", [*OURS, *PROXIED, *FOREIGN])
def test_a_server_answers_to_its_own_names_and_those_it_was_given(host: str) -> None:
    assert Settings().hosts.answers(host) is (host in OURS)
    given = Settings(allow_hosts=("images.example", "192.0.2.7"))
    assert given.hosts.answers(host) is (host in (*OURS, *PROXIED))


def test_on_an_address_that_others_reach_any_name_will_do_unless_some_are_given() -> None:
    reached = {"host": "0.0.0.0", "token": "correct-horse-battery"}
    assert Settings(**reached).hosts is None
    named = Settings(**reached, allow_hosts=("images.example", "fd00::1")).hosts
    names = ("images.example", "[fd00::1]:8000", "localhost", "evil.example")
    assert [named.answers(name) for name in names] == [True, True, True, False]
    assert Settings(token=reached["token"], allow_hosts=("*",)).hosts.answers("evil.example")


def test_a_proxy_that_keeps_the_host_is_told_of_the_option_and_served_with_it(
    server: Server, serving: Callable[..., Any]
) -> None:
    proxied = {"Host": "images.example", "X-Forwarded-Proto": "https"}
    refused = server.client.get("/readyz", headers=proxied)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "wrong_host"
    assert "--allow-host NAME" in refused.json()["error"]["message"]
    with serving(*ALLOWED) as behind:
        for path in ("/", "/readyz", "/metrics", "/v1/models", "/openapi.json"):
            assert behind.client.get(path, headers=proxied).status_code == 200, path
        body = {"prompt": "a cow", "response_format": "url", **FEW}
        answer = behind.client.post("/v1/images/generations", json=body, headers=proxied)
        url = answer.json()["data"][0]["url"]
        # an address that the proxy's clients reach
        assert url.startswith("https://images.example/v1/jobs/")
        path = url.removeprefix("https://images.example")
        assert behind.client.get(path, headers=proxied).headers["content-type"] == "image/png"
        assert behind.client.get("/", headers={"Host": "evil.example"}).status_code == 403


def test_an_accident_is_answered_in_the_same_shape_and_counted() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ZeroDivisionError("secret")

    metrics = Metrics()
    gate = Gate(broken, Settings(cors_origins=("https://app.example",)), metrics)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(gate)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/models", headers={"Origin": "https://app.example"})

    answer = asyncio.run(ask())
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert b'bifrost_requests_total{method="GET",route="none",status="500"} 1.0' in metrics.text()


def test_a_taken_port_is_said_at_once(
    server: Server, alpha_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(server.client.base_url.port)
    assert main(["serve", "--engines", str(alpha_set), "--port", port]) == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_what_is_not_installed_is_said() -> None:
    code = (
        "import sys\nsys.modules['uvicorn'] = None\n"
        "from importlib import util\nfind = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'uvicorn' else find(name)\n"
        "from bifrost_rt.cli import main\nraise SystemExit(main(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: serving needs uvicorn, not installed here\nhint: pip install 'bifrost-rt[serve]'\n"
    )
