"""Requests as front ends and client libraries write them, with their settings set to this server's
model and size. Each body is what the program named beside it sends to /v1/images/generations."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from tests.serve.conftest import FEW, Server, pixels

GENERATIONS = "/v1/images/generations"
BODIES: dict[str, dict[str, Any]] = {
    "Open WebUI": {"n": 1, "size": "128x128", "response_format": "b64_json"},
    "LibreChat, GPT Image": {
        **{"n": 1, "background": "auto", "output_format": "webp", "output_compression": 100},
        **{"quality": "auto", "size": "auto"},
    },
    "LibreChat, DALL-E 3": {"n": 1, "quality": "standard", "style": "vivid", "size": "128x128"},
    "SillyTavern": {
        **{"size": "128x128", "n": 1, "quality": "standard", "style": "natural"},
        **{"response_format": "b64_json", "moderation": "low"},
    },
    "LangChain": {"n": 1, "size": "128x128", "quality": "standard"},
    "LangChain.js": {
        **{"n": 1, "size": "128x128", "response_format": "url", "style": "vivid"},
        **{"quality": "standard", "user": "somebody"},
    },
    "n8n": {"response_format": "b64_json", "quality": "standard", "style": "natural"},
    "Vercel AI SDK": {"n": 1, "size": "128x128", "response_format": "b64_json"},
    "every field of OpenAI's at its neutral value": {
        **{"background": "opaque", "moderation": "auto", "n": 1, "output_compression": 100},
        **{"output_format": "png", "partial_images": 0, "quality": "auto", "size": "auto"},
        **{"stream": False, "style": "vivid", "response_format": "b64_json"},
        **{"safety_identifier": "hash", "user": ""},
    },
    "a language whose numbers are floats": {
        **{"n": 1.0, "output_compression": 100.0, "partial_images": 0.0, "seed": 7.0},
        **{"num_inference_steps": 1.0, "decoding_steps": 1.0, "cache_interval": 1.0},
    },
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_a_front_ends_request_is_drawn(server: Server, body: dict[str, Any]) -> None:
    answer = server.draw(model="alpha", **body)
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["data"]
    file = (
        server.client.get(image["url"]).content
        if body.get("response_format") == "url"
        else base64.b64decode(image["b64_json"])
    )
    assert pixels(file).shape == (128, 128, 3)
    assert server.start(**body)


@pytest.mark.parametrize("path", [GENERATIONS, "/v1/jobs"])
def test_null_is_for_what_is_not_given(server: Server, path: str) -> None:
    """Clients without optional fields send every one, and one or another that is not known here."""
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    fields = schemas["ImageRequest" if path == GENERATIONS else "JobRequest"]["properties"]
    assert len(fields) > 20
    nothing = dict.fromkeys([*fields, "complexity", "mask"])
    answer = server.client.post(path, json={**nothing, "prompt": "a cow", **FEW})
    assert answer.status_code in (200, 202), answer.text
    refused = server.client.post(path, json=nothing)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"Content-Type": ""},
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": "Application/JSON"},
        {"Content-Type": "application/vnd.api+json"},
        {"Content-Type": "application/json", "Accept": "image/png"},
        {"Content-Type": "application/json", "Accept": "text/event-stream"},
        {"Content-Type": "application/json", "Accept": "not a type"},
    ],
)
def test_a_body_is_json_unless_it_says_otherwise(server: Server, kind: dict[str, str]) -> None:
    body = json.dumps({"prompt": "a cow", **FEW}).encode()
    request = httpx.Request("POST", server.url + GENERATIONS, content=body, headers=kind)
    assert request.headers.get("content-type") == kind.get("Content-Type")
    answer = server.client.send(request)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_told_so(server: Server, kind: str) -> None:
    """A page could send these types without asking first, so they are never read as JSON."""
    headers = {"Content-Type": kind}
    answer = server.client.post(GENERATIONS, content=b'{"prompt": "a"}', headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_content_type")
    assert error["message"] == "the Content-Type must be application/json"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"size": "1024x1024"}, "size", "must be '128x128', the only one of this set, or 'auto'"),
        ({"size": "big"}, "size", "must be '128x128'"),
        ({"size": "128x128 "}, "size", "must be '128x128'"),
        ({"size": ""}, "size", "must be '128x128'"),
        ({"size": 128}, "size", "valid string"),
        ({"quality": "hd"}, "quality", "must be 'auto' or 'standard' (without effect: num_inf"),
        ({"quality": "high"}, "quality", "must be 'auto' or 'standard'"),
        ({"style": "anime"}, "style", "must be 'vivid' or 'natural'"),
        ({"background": "transparent"}, "background", "must be 'auto' or 'opaque'"),
        ({"moderation": "high"}, "moderation", "must be 'auto' or 'low'"),
        ({"output_format": "gif"}, "output_format", "must be 'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, "output_compression", "must be 100"),
        ({"partial_images": 2}, "partial_images", "must be 0"),
        ({"stream": True}, "stream", "must be false"),
        ({"stream": "false"}, "stream", "must be false"),
        ({"response_format": "png"}, "response_format", "must be 'b64_json' or 'url'"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"n": "1"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"seed": 1e300}, "seed", "valid integer"),
        ({"seed": 2.0**53 + 2}, "seed", "valid integer"),  # it may have been another number
        ({"cfg_weight": -1e39}, "cfg_weight", "must be finite in float32"),
        ({"guidance_scale": 10**400}, "guidance_scale", "valid number"),
        ({"controlnet_conditioning_scale": 1e39}, "controlnet_conditioning_scale", "finite"),
        ({"model": ""}, "model", "this server has 'alpha'"),
        ({"user": 3}, "user", "valid string"),
        ({"num_inference_step": 2}, "num_inference_step", "did you mean 'num_inference_steps'?"),
        ({"width": 128}, "width", "unknown field 'width'"),
    ],
)
@pytest.mark.parametrize("path", [GENERATIONS, "/v1/jobs"])
def test_a_refusal_names_the_field_that_was_sent(
    server: Server, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    answer = server.client.post(path, json={"prompt": "a cow", **body})
    assert answer.status_code == (404 if param == "model" else 400)
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_model_is_found_by_its_name(server: Server) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    assert [server.client.get(f"/v1/models/{model['id']}").json() for model in listed] == listed
    assert set(listed[0]) == {"id", "object", "created", "owned_by"}
    answer = server.client.get("/v1/models/dall-e-3")
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "model: this server has 'alpha'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_head_is_get_without_its_body(server: Server) -> None:
    for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz", "/v1/models", "/metrics"):
        answer = server.client.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
        assert answer.headers["content-type"] == server.client.get(path).headers["content-type"]
    assert server.client.head("/v1/jobs/none").status_code == 404
    # a stream has no end to wait for
    assert server.client.head("/v1/jobs/none/events").status_code == 405


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", GENERATIONS, "POST"),
        ("HEAD", GENERATIONS, "POST"),
        ("PUT", "/v1/jobs", "POST"),
        ("POST", "/v1/models", "GET"),
        ("OPTIONS", GENERATIONS, "POST"),  # by no browser
        ("PATCH", "/", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(
    server: Server, method: str, path: str, allowed: str
) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_slash_at_the_end_leads_to_the_same(server: Server) -> None:
    body = {"prompt": "a cow", **FEW}
    answer = server.client.post(GENERATIONS + "/", json=body, follow_redirects=True)
    assert answer.status_code == 200, answer.text
    assert server.client.get("/v1/models/", follow_redirects=True).json()["object"] == "list"


def test_the_document_of_the_api_states_what_may_be_sent(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ImageRequest"]["properties"]
    for body in BODIES.values():
        assert set(body) <= set(fields)
    assert fields["quality"]["anyOf"][0]["enum"] == ["auto", "standard"]
    for field in ("quality", "style", "background", "moderation", "stream", "partial_images"):
        assert fields[field]["description"].startswith("without effect: "), field
    assert "/v1/models/{model}" in document["paths"]
    answers = document["paths"][GENERATIONS]["post"]["responses"]
    assert {"400", "403", "405", "413", "429"} <= set(answers)
    assert "--allow-host" in answers["403"]["description"]
    assert "--cors-origin" in answers["403"]["description"]
