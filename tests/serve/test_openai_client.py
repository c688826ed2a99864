"""What an application that knows OpenAI's image API meets, through OpenAI's own client."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from bifrost_rt import Generator
from bifrost_rt.cli import main
from tests.serve.conftest import FEW, LONG, Server, pixels


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_images_are_those_of_the_generator(client: openai.OpenAI, generator: Generator) -> None:
    answer = client.images.generate(
        prompt="a red circle", n=2, size="128x128", extra_body={"seed": 7, **FEW}
    )
    expected = generator.run("a red circle", seed=7, num_images_per_prompt=2, **FEW).images
    assert len(answer.data) == 2
    for found, image in zip(answer.data, expected, strict=True):
        assert np.array_equal(pixels(base64.b64decode(found.b64_json)), np.asarray(image))
    assert (answer.size, answer.output_format) == ("128x128", "png")
    assert answer.model_extra["seed"] == 7


def test_a_drawn_seed_gives_the_image_again(client: openai.OpenAI) -> None:
    first = client.images.generate(prompt="a cow", extra_body=FEW)
    seed = first.model_extra["seed"]
    again = client.images.generate(prompt="a cow", extra_body={**FEW, "seed": seed})
    assert again.data[0].b64_json == first.data[0].b64_json


def test_a_served_png_is_made_again_on_the_command_line(
    client: openai.OpenAI, alpha_set: Path, tmp_path: Path
) -> None:
    answer = client.images.generate(prompt="a dog", n=2, extra_body=FEW)
    served = base64.b64decode(answer.data[1].b64_json)
    (tmp_path / "served.png").write_bytes(served)
    again = ["generate", "--engines", str(alpha_set), "--like", str(tmp_path / "served.png")]
    assert main([*again, "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == served


def test_urls_and_formats(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a cow", response_format="url", output_format="webp", extra_body=FEW
    )
    assert answer.data[0].b64_json is None
    file = httpx.get(answer.data[0].url)
    assert file.headers["content-type"] == "image/webp"
    assert pixels(file.content).shape == (128, 128, 3)


def test_the_model_has_a_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["alpha"]
    assert client.models.retrieve("alpha").owned_by == "bifrost-rt"
    with pytest.raises(openai.NotFoundError, match="this server has 'alpha'") as raised:
        client.models.retrieve("dall-e-3")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")
    client.images.generate(prompt="a cow", model="alpha", user="u", extra_body=FEW)


def test_every_parameter_of_the_client_has_its_neutral_value(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a cow",
        model="alpha",
        n=1.0,  # type: ignore[arg-type]
        size="128x128",
        quality="auto",
        style="vivid",
        background="auto",
        moderation="auto",
        output_format="png",
        output_compression=100,
        partial_images=0,
        response_format=None,
        stream=False,
        user="somebody",
        extra_body=FEW,
    )
    assert pixels(base64.b64decode(answer.data[0].b64_json)).shape == (128, 128, 3)
    nothing = dict.fromkeys(
        ("n", "size", "quality", "style", "background", "moderation", "output_format", "stream")
    )
    assert client.images.generate(prompt="a cow", **nothing, extra_body=FEW).data


@pytest.mark.parametrize(
    ("changes", "error", "param", "message"),
    [
        ({"size": "1024x1024"}, openai.BadRequestError, "size", "size: must be '128x128'"),
        ({"size": "big"}, openai.BadRequestError, "size", "size: must be '128x128'"),
        ({"n": 9}, openai.BadRequestError, "n", "at most 4"),
        ({"n": 0}, openai.BadRequestError, "n", "greater than or equal to 1"),
        ({"prompt": " "}, openai.BadRequestError, "prompt", "is empty"),
        ({"prompt": "x" * 4001}, openai.BadRequestError, "prompt", "at most 4000"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model", "this server has 'alpha'"),
        ({"quality": "hd"}, openai.BadRequestError, "quality", "'auto' or 'standard'"),
        ({"extra_body": {"steps": 4}}, openai.BadRequestError, "steps", "unknown field 'steps'"),
        ({"extra_body": {"seed": -1}}, openai.BadRequestError, "seed", "greater than or equal"),
        ({"extra_body": {"seed": "1"}}, openai.BadRequestError, "seed", "valid integer"),
        ({"extra_body": {"cfg_weight": 1e39}}, openai.BadRequestError, "cfg_weight", "finite in"),
    ],
)
def test_refusals_have_openais_shape(
    client: openai.OpenAI,
    changes: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str | None,
    message: str,
) -> None:
    with pytest.raises(error, match=message) as raised:
        client.images.generate(**{"prompt": "a cow", **changes})
    assert raised.value.type == "invalid_request_error"
    assert raised.value.param == param


def test_a_full_queue_says_when_to_come_back(server: Server, client: openai.OpenAI) -> None:
    jobs = [server.start(n=4, **{**LONG, "decoding_steps": i + 1}) for i in range(1)]
    server.until(jobs[0], "running")
    jobs += [server.start(n=4, **{**LONG, "decoding_steps": i + 2}) for i in range(2)]
    with pytest.raises(openai.RateLimitError, match="8 images are waiting") as raised:
        client.images.generate(prompt="a cow")
    assert int(raised.value.response.headers["retry-after"]) >= 1
    assert raised.value.code == "queue_full"
    for job in jobs:
        assert server.client.delete(f"/v1/jobs/{job}").json()["state"] == "cancelled"
    assert server.draw().status_code == 200


def test_a_token_is_asked_for(serving: Callable[..., Any], alpha_set: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct-horse-battery\n")
    with serving("--token-file", str(tmp_path / "token")) as locked:

        def client(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0)

        with client("correct-horse-battery") as allowed:
            assert allowed.images.generate(prompt="a cow", extra_body=FEW).data
        for wrong in ("correct-horse-batter", "correct-horse-batteryy", "Ärger", "-"):
            headers = [(b"authorization", b"Bearer " + wrong.encode())]
            answer = locked.client.get("/v1/models", headers=headers)
            assert answer.status_code == 401
        with client("wrong") as refused, pytest.raises(openai.AuthenticationError) as raised:
            refused.images.generate(prompt="a cow")
        assert raised.value.code == "invalid_api_key"
        for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz"):
            assert locked.client.get(path).status_code == 200, path
        for path in ("/metrics", "/openapi.json", "/v1/about", "/nowhere"):
            assert locked.client.get(path).status_code == 401, path
