"""Requests that nobody would write, thousands of them: made from the server's own document of its
API, fitting it and violating it, and made from nothing but bytes.

Whatever comes, the answer is no 5xx (but for numbers so large that no image comes of them), comes
soon, is an error in OpenAI's shape or what was asked for, and holds no trace. `-m slow` sends ten
thousand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.patience import PATIENCE
from tests.serve.conftest import FEW, Server

SECONDS = PATIENCE
FEW_EXAMPLES, MANY_EXAMPLES = 60, 10_000


@pytest.fixture(scope="module")
def target(serving: Callable[..., Any]) -> Iterator[Server]:
    """What a generated request may ask for is cheap."""
    limits = ("--max-steps", "2", "--max-images", "2", "--max-body", "20000")
    with serving(*limits, "--cors-origin", "http://x", "--allow-host", "x") as started:
        yield started


def check(answer: httpx.Response | Any) -> None:
    text = answer.text
    assert answer.status_code < 500 or answer.json()["error"]["code"] == "not_finite", text
    assert "Traceback" not in text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


def send_cases(target: Server, examples: int) -> int:
    schema = schemathesis.openapi.from_dict(target.client.get("/openapi.json").json())
    schema.config.update(base_url=target.url)
    operations = [found.ok() for found in schema.get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    # drawing is what most of them shall be about
    cases = [
        operation.as_strategy(generation_mode=mode)
        for operation in operations
        for mode in modes
        for _ in range(6 if operation.method.upper() == "POST" else 1)
        if not (mode is GenerationMode.NEGATIVE and nothing_to_violate(operation))
    ]
    sent = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(cases))
    def send(case: Any) -> None:
        nonlocal sent
        sent += 1
        check(case.call(timeout=SECONDS))

    send()
    return sent


def nothing_to_violate(operation: Any) -> bool:
    return not (list(operation.iter_parameters()) or operation.body)


def send_bytes(target: Server, examples: int) -> None:
    """Bodies, paths and headers that no schema leads to."""
    paths = st.one_of(
        st.sampled_from(["/v1/images/generations", "/v1/jobs", "/", "/v1/jobs/x/images/-1"]),
        st.text(max_size=60).map(lambda text: "/" + text),
        st.lists(st.sampled_from(["..", "%2e%2e", "page.js", "v1", "jobs", "\\", "%00", "~"])).map(
            lambda parts: "/" + "/".join(parts)
        ),
    )
    known = ["prompt", "n", "seed", "cfg_weight", "size", "quality", "stream", "partial_images"]
    keys = st.one_of(st.sampled_from(known), st.text())
    values = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())
    )
    near = st.dictionaries(keys, values, max_size=6).map(lambda body: {**FEW, **body})
    names = ["Accept", "Content-Type", "Authorization", "Expect", "Range", "Origin", "Host"]
    asks = ["Access-Control-Request-Method", "Access-Control-Request-Headers"]
    texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
    headers = st.dictionaries(
        st.sampled_from([*names, *asks]),
        st.one_of(st.sampled_from(["http://x", "x"]), texts),
        max_size=3,
    )

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(
        method=st.sampled_from(["GET", "POST", "POST", "DELETE", "PUT", "HEAD", "OPTIONS", "BREW"]),
        path=paths,
        body=st.one_of(st.binary(max_size=300), near),
        given_headers=headers,
    )
    def send(method: str, path: str, body: Any, given_headers: dict[str, str]) -> None:
        content = body if isinstance(body, bytes) else json_with_nan(body)
        kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
        began = time.monotonic()
        try:
            answer = target.client.request(
                method,
                target.url + path,
                content=content,
                headers={**kind, **given_headers},
                timeout=SECONDS,
            )
        except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeEncodeError):
            return  # never left this process
        assert time.monotonic() - began < SECONDS
        if answer.status_code == 204:  # a preflight of an allowed origin
            assert answer.headers["access-control-allow-origin"] == "http://x"
        if method != "HEAD" and not answer.text.startswith("Invalid HTTP request"):
            check(answer)

    send()


def json_with_nan(body: dict[str, Any]) -> bytes:
    import json

    return json.dumps(body, default=str).encode("utf-8", "surrogatepass")


def test_generated_requests(target: Server) -> None:
    send_all(target, FEW_EXAMPLES)


@pytest.mark.slow
def test_ten_thousand_generated_requests(target: Server) -> None:
    send_all(target, MANY_EXAMPLES)


def send_all(target: Server, examples: int) -> None:
    assert send_cases(target, examples) >= examples
    send_bytes(target, examples)
    answered = 'bifrost_requests_total{{method="POST",route="{}",status="{}"}}'.format
    assert target.figure(answered("/v1/images/generations", 400)) > examples / 100
    if examples == MANY_EXAMPLES:  # so many that images are drawn among them
        assert target.figure(answered("/v1/images/generations", 200)) > examples / 100
        assert target.figure(answered("/v1/jobs", 202)) > examples / 100
    assert target.draw().status_code == 200
