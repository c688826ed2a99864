"""What comes in through the door: sizes, hosts, content, and settings that would leave it open."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bifrost_rt.cli import main
from tests.serve.conftest import Server


def test_probes_and_figures(server: Server) -> None:
    assert server.client.get("/healthz").text == "ok\n"
    assert server.client.get("/readyz").text == "ready\n"
    drawn = server.figure("bifrost_pictures_total")
    server.draw(n=2)
    assert server.figure("bifrost_pictures_total") == drawn + 2
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
    assert len(json.dumps(document)) < 50_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "is reached by other machines, and there is no token\nhint: open"),
        (["--host", "example"], "is reached by other machines"),
        (["--token-file", "nowhere"], "cannot be read as a token"),
        (["--token-file", "short"], "the token has 3 characters"),
        (["--max-batch", "0"], "--max-batch cannot be 0"),
        (["--preview-every", "-1"], "--preview-every cannot be -1"),
        (["--grace", "-1"], "cannot be negative"),
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
    given = [] if "--port" in options else ["--port", "0"]
    assert main(["serve", *given, *options]) == 1
    assert message in capsys.readouterr().err


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
