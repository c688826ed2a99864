"""What an application that knows OpenAI's chat API meets, through OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from bifrost_rt import Generator, chat_params
from bifrost_rt.serve.schema import ChatRequest, OpenAIChatRequest, chat_fields
from tests.patience import until
from tests.serve.conftest import HANG_UP, Server

CHAT = "/v1/chat/completions"
TOKENS = 12
HELLO = [{"role": "user", "content": "hello"}]
LONG = {"messages": HELLO, "max_tokens": 4000}


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def uri(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def looking(file: bytes, question: str = "What is this?") -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": uri(file), "detail": "auto"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


RED = file_of(Image.new("RGB", (70, 90), (200, 20, 20)))
# larger than other requests may be
NOISE = file_of(Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)))


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.mark.parametrize("file", [RED, NOISE], ids=["small", "large"])
def test_an_answer_is_the_generators(
    client: openai.OpenAI, generator: Generator, file: bytes
) -> None:
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
    answer = client.chat.completions.create(
        model="alpha",
        messages=[{"role": "developer", "content": "Be brief."}, *looking(file)],
        max_completion_tokens=TOKENS,
        **sampled,
        extra_body={"top_k": 40, "repetition_penalty": 1.1},
    )
    image = {"type": "image", "image": file}
    asked = [image, {"type": "text", "text": "What is this?"}]
    expected = generator.chat(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}],
        max_new_tokens=TOKENS,
        **sampled,
        top_k=40,
        repetition_penalty=1.1,
    )
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.usage.completion_tokens == expected.usage.completion_tokens
    assert answer.usage.total_tokens == expected.usage.total_tokens
    details = answer.usage.prompt_tokens_details.model_dump()
    assert details["image_tokens"] == expected.usage.image_tokens > 0
    assert answer.model_extra == {"seed": 3, "warnings": []}


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, server: Server) -> None:
    asked: dict[str, Any] = {
        "model": "alpha",
        "messages": looking(RED),
        "max_tokens": 40,
        "temperature": 1,
        "seed": 5,
    }
    whole = client.chat.completions.create(**asked)
    kept = "bifrost_cached_prompt_tokens_total"
    read = {name: server.figure(name) for name in (kept, "bifrost_completion_tokens_total")}
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *said, end, usage = chunks
    assert said[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content for chunk in said)
    assert text == whole.choices[0].message.content
    assert {chunk.choices[0].finish_reason for chunk in said} == {None}
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason
    assert end.model_extra["seed"] == 5
    assert usage.choices == []
    assert usage.usage.completion_tokens == whole.usage.completion_tokens
    # the same conversation again: all of it but its last token was there
    cached = usage.usage.prompt_tokens_details.cached_tokens
    assert cached == usage.usage.prompt_tokens - 1
    assert len({chunk.id for chunk in chunks}) == 1
    assert server.figure(kept) == read[kept] + cached
    assert server.figure("bifrost_first_token_seconds_count") >= 2
    without = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_a_conversation_goes_on_with_what_the_client_got(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="alpha", messages=looking(RED), max_tokens=TOKENS)
    turns = [*looking(RED), first.choices[0].message, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model="alpha", messages=turns, max_tokens=TOKENS)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_every_parameter_of_the_client_has_its_neutral_value(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="alpha",
        messages=HELLO,
        max_tokens=2.0,  # type: ignore[arg-type]
        n=1,
        stop=[],
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        logprobs=False,
        modalities=["text"],
        response_format={"type": "text"},
        parallel_tool_calls=True,
        tool_choice="auto",
        tools=[],
        reasoning_effort="none",
        service_tier="auto",
        store=False,
        metadata={"a": "b"},
        prompt_cache_key="k",
        user="somebody",
        verbosity="medium",
        safety_identifier="hash",
        stream=False,
        extra_body={"web_search_options": None, "audio": None},
    )
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].finish_reason == "length"


def test_the_http_api_takes_every_option() -> None:
    fields = {field for name in chat_params.OPTIONS for field in chat_fields(name)}
    assert ChatRequest.model_fields.keys() - OpenAIChatRequest.model_fields.keys() == fields
    for name, option in chat_params.OPTIONS.items():
        for field in chat_fields(name):
            body = ChatRequest.model_validate({"messages": [], field: 7})
            assert body.options() == {**dict.fromkeys(chat_params.OPTIONS), name: 7}
            described = ChatRequest.model_json_schema()["properties"][field]
            assert described["description"].startswith(option.help)


def test_what_has_no_effect_is_said(client: openai.OpenAI) -> None:
    asked = {"model": "alpha", "messages": HELLO, "max_tokens": 1, "top_p": 0.5}
    warnings = ["top_p has no effect: temperature is 0, which takes the likeliest token"]
    assert client.chat.completions.create(**asked).model_extra["warnings"] == warnings
    first = next(iter(client.chat.completions.create(**asked, stream=True)))
    assert first.model_extra["warnings"] == warnings


def part(url: str, **more: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url, **more}}]}]


def bomb() -> bytes:
    """A few kilobytes that claim to be 400 million pixels."""
    file = bytearray(RED)
    file[16:24] = (20000).to_bytes(4, "big") * 2
    file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
    return bytes(file)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"messages": []}, "messages", "messages is an empty list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role must be one of sys"),
        ({"messages": [{"role": "user", "content": []}]}, "messages", "content is an empty list"),
        ({"messages": [{"role": "user"}]}, "messages", "content must be a text or a list"),
        ({"messages": [{**HELLO[0], "nam": "x"}]}, "messages", "unknown field 'nam'"),
        ({"messages": [7]}, "messages", "must be a message with role and content"),
        ({"messages": part(uri(b"no image"))}, "messages", "no image that Pillow reads"),
        ({"messages": part(uri(RED[:-30]))}, "messages", "is damaged"),
        ({"messages": part(uri(bomb()))}, "messages", "pixels"),
        ({"messages": part("data:image/png;base64,%%")}, "messages", "not base64"),
        ({"messages": part(uri(RED), detail="low")}, "messages", "looked at in full"),
        ({"messages": part("https://a.example/x.png")}, "messages", "--fetch-host NAME"),
        ({"messages": part("file:///etc/passwd")}, "messages", "--fetch-host NAME"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
            "messages",
            "type must be text or image_url",
        ),
        ({"messages": looking(RED) * 5}, "messages", "at most 4 images"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, None, "it may have 4095"),
        ({"extra_body": {"temperature": -1}}, "temperature", "a number from 0 to 100"),
        ({"extra_body": {"temperature": float("nan")}}, "temperature", "finite in"),
        ({"n": 2}, "n", "must be 1"),
        ({"stop": ["x"]}, "stop", "must be empty"),
        ({"stop": "x"}, "stop", "valid list"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "must be 'text'"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"extra_body": {"max_token": 4}}, "max_token", "did you mean 'max_tokens'"),
    ],
)
def test_refusals_have_openais_shape(
    client: openai.OpenAI, stream: bool, changes: dict[str, Any], param: str | None, message: str
) -> None:
    asked = {"model": "alpha", "messages": HELLO, "max_tokens": 1, **changes}
    if "extra_body" in changes:  # the client writes no NaN
        del asked["extra_body"]
        asked |= changes["extra_body"]
        body = json.dumps({**asked, "stream": stream})
        kind = {"Content-Type": "application/json"}
        answer = httpx.post(f"{client.base_url}chat/completions", content=body, headers=kind)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert message in error["message"]
        return
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        client.chat.completions.create(**asked, stream=stream)
    assert (raised.value.type, raised.value.param) == ("invalid_request_error", param)


def test_another_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'alpha'"):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_cancels(server: Server, stream: bool) -> None:
    cancelled = 'bifrost_answers_total{state="cancelled"}'
    before = server.figure(cancelled)
    if stream:
        with server.client.stream("POST", CHAT, json={**LONG, "stream": True}) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.client.post(CHAT, json=LONG, timeout=HANG_UP)
    until(lambda: server.figure(cancelled) == before + 1)
    assert server.figure("bifrost_running_jobs") == 0
    assert server.draw().status_code == 200


def test_the_size_of_a_request(serving: Callable[..., Any]) -> None:
    with serving("--max-image-body", "100000", "--max-waiting", "1") as server:
        assert len(NOISE) > 100000 > 65536
        for name, status in (("x" * 70000, 400), ("x" * 200000, 413)):
            body = {"messages": HELLO, "max_tokens": 1, name: 1}
            assert server.client.post(CHAT, json=body).status_code == status
        answer = server.client.post("/v1/jobs", json={"prompt": "a", "x": "x" * 70000})
        assert answer.status_code == 413
        about = server.client.get("/v1/about").json()
        assert (about["no_chat"], about["no_vision"]) == (None, None)
