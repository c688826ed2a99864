"""Pages of other origins: none by default, those that are named, in headers and in a browser."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bifrost_rt.errors import RequestError
from bifrost_rt.serve import cors
from tests.serve.conftest import FEW, LONG, Server

APP = "https://app.example"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture(scope="module")
def shared(
    serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that one origin's pages may use, if they know the token."""
    token = tmp_path_factory.mktemp("cors") / "token"
    token.write_text("correct-horse-battery")
    options = ("--cors-origin", APP, "--cors-origin", "tauri://localhost", "--max-steps", "2000")
    with serving(*options, "--token-file", str(token)) as started:
        started.client.headers["Authorization"] = "Bearer correct-horse-battery"
        yield started


@pytest.mark.parametrize("origin", [APP, "tauri://localhost"])
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/jobs", "/v1/jobs/x", "/nowhere"])
def test_a_browser_may_ask_before_it_knows_the_token(
    shared: Server, origin: str, path: str
) -> None:
    answer = httpx.options(shared.url + path, headers={"Origin": origin, **PREFLIGHT})
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-allow-methods"] == "GET, HEAD, POST, DELETE"
    asked = PREFLIGHT["Access-Control-Request-Headers"]
    assert answer.headers["access-control-allow-headers"] == asked
    assert "access-control-allow-credentials" not in answer.headers
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    [
        *("https://evil.example", "http://app.example", "https://app.example:8443", "null"),
        *("https://app.example.evil.example", "https://evilapp.example", "https://APP.example"),
    ],
)
def test_other_pages_are_refused(shared: Server, origin: str) -> None:
    headers = {"Origin": origin, **PREFLIGHT}
    answer = shared.client.options("/v1/images/generations", headers=headers)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    error = answer.json()["error"]
    assert error["code"] == "wrong_origin"
    assert "--cors-origin ORIGIN" in error["message"]
    answer = shared.client.get("/v1/models", headers={"Origin": origin})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"


def test_every_answer_can_be_read_by_the_page(shared: Server) -> None:
    """Errors too, or a page only learns that something failed."""
    page = {"Origin": APP}
    answers = [
        shared.client.get("/", headers=page),
        shared.client.get("/healthz", headers=page),
        shared.client.get("/metrics", headers=page),
        shared.client.get("/v1/models/none", headers=page),
        shared.client.get("/nowhere", headers=page),
        shared.client.put("/v1/jobs", headers=page),
        shared.client.post("/v1/jobs", json={"prompt": "a cow", **FEW}, headers=page),
        shared.client.post("/v1/jobs", json={"prompt": "a cow", "n": 99}, headers=page),
        shared.client.post("/v1/jobs", content=b"x" * 70000, headers=page),
        shared.client.get("/v1/models", headers={**page, "Authorization": "Bearer wrong"}),
        shared.client.get("/v1/models", headers={**page, "Host": "evil.example"}),
    ]
    found = [answer.status_code for answer in answers]
    assert found == [200, 200, 200, 404, 404, 405, 202, 400, 413, 401, 403]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == APP
        assert answer.headers["access-control-expose-headers"] == "Location, Retry-After"
        assert "Origin" in answer.headers["vary"]


def test_a_stream_can_be_read_by_the_page(shared: Server) -> None:
    job = shared.start(**LONG)
    with shared.client.stream("GET", f"/v1/jobs/{job}/events", headers={"Origin": APP}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["access-control-allow-origin"] == APP
        assert next(stream.iter_lines()).startswith("event: ")
    shared.client.delete(f"/v1/jobs/{job}", headers={"Origin": APP})


def test_a_public_page_may_reach_a_private_address_if_it_is_named(shared: Server) -> None:
    headers = {"Origin": APP, **PREFLIGHT, "Access-Control-Request-Private-Network": "true"}
    answer = shared.client.options("/v1/jobs", headers=headers)
    assert answer.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("names", ["x\u00e9", "a;b", "x" * 3000])
def test_only_names_of_headers_are_sent_back(shared: Server, names: str) -> None:
    headers = [
        *((name.encode(), value.encode()) for name, value in PREFLIGHT.items() if "Method" in name),
        (b"Origin", APP.encode()),
        (b"Access-Control-Request-Headers", names.encode()),
    ]
    answer = shared.client.options("/v1/jobs", headers=headers)
    assert answer.status_code == 204
    assert "access-control-allow-headers" not in answer.headers


def test_no_page_is_allowed_by_default(server: Server) -> None:
    answer = server.client.options("/v1/jobs", headers={"Origin": APP, **PREFLIGHT})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "wrong_origin"
    answer = server.client.get("/v1/models", headers={"Origin": APP})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "vary" not in answer.headers


@pytest.mark.parametrize("origin", [APP, "null", "http://127.0.0.1:1"])
def test_a_page_cannot_have_images_drawn_without_being_asked(server: Server, origin: str) -> None:
    """A body without a type is sent by browsers without a preflight."""
    request = httpx.Request(
        "POST", server.url + "/v1/jobs", content=b'{"prompt": "a"}', headers={"Origin": origin}
    )
    assert "content-type" not in request.headers
    answer = server.client.send(request)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_content_type"


def test_a_page_that_is_allowed_may_leave_the_type_out(shared: Server) -> None:
    request = shared.client.build_request(
        "POST", "/v1/jobs", content=b'{"prompt": "a", "decoding_steps": 1}', headers={"Origin": APP}
    )
    assert shared.client.send(request).status_code == 202


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://app.example", "https://app.example"),
        (" HTTPS://App.Example/ ", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("https://app.example:80", "https://app.example:80"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
        ("http://xn--mnchen-3ya.example", "http://xn--mnchen-3ya.example"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_an_origin_is_written_as_browsers_send_it(given: str, origin: str) -> None:
    assert cors.parse(given) == origin


@pytest.mark.parametrize(
    "given",
    [
        *("app.example", "https://", "https://app.example/page", "https://*.example", ""),
        *("https://app.example:port", "https://me@app.example", "https://münchen.example"),
    ],
)
def test_what_is_no_origin_is_refused(given: str) -> None:
    with pytest.raises(RequestError, match="--cors-origin .*expected an origin"):
        cors.parse(given)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a web site, which is two origins: 127.0.0.1 and localhost."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "index.html").write_text("<!doctype html><link rel=icon href=data:,><title>x</title>")
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield site.server_port
        site.shutdown()
        thread.join()


DRAW = """async ([url, headers, body]) => {
    const answer = await fetch(`${url}/v1/jobs`, {
        method: "POST", headers: { "Content-Type": "application/json", ...headers }, body,
    });
    const said = await answer.json();
    if (!answer.ok) return [answer.status, said.error.param, null];
    const events = await fetch(url + answer.headers.get("Location") + "/events", { headers });
    const ended = (await events.text()).trim().split("\\n\\n").at(-1).split("\\n")[0];
    const file = await fetch(url + `/v1/jobs/${said.id}/images/0`, { headers });
    return [answer.status, ended, (await file.blob()).type];
}"""
FAILS = "async ([url]) => fetch(`${url}/v1/models`).then(() => 'read', (error) => error.name)"


def test_a_browser_lets_the_named_page_draw_and_no_other(
    browser: Any, elsewhere: int, serving: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("correct-horse-battery")
    named = f"http://127.0.0.1:{elsewhere}"
    token = {"Authorization": "Bearer correct-horse-battery", "X-Stainless-OS": "any"}
    options = ("--cors-origin", named, "--token-file", str(tmp_path / "token"))
    with serving(*options) as started:
        page = browser.new_page()
        page.goto(named)
        body = '{"prompt": "a cow", "num_inference_steps": 1, "decoding_steps": 1}'
        drawn = page.evaluate(DRAW, [started.url, token, body])
        assert drawn == [202, "event: done", "image/png"]
        # an error can be read too
        body = '{"prompt": "a cow", "size": "1024x1024"}'
        assert page.evaluate(DRAW, [started.url, token, body]) == [400, "size", None]
        assert page.evaluate(DRAW, [started.url, {}, body]) == [401, None, None]
        page.goto(f"http://localhost:{elsewhere}")
        assert page.evaluate(FAILS, [started.url]) == "TypeError"
        page.close()
