"""Edits and variations, through OpenAI's own client and with forms that nobody should send."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from bifrost_rt import Generator
from bifrost_rt.cli import main
from tests.serve.conftest import FEW, Server, pixels
from tests.serve.test_jobs import events

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


SCENE = Image.radial_gradient("L").convert("RGB")
IMAGE = png(SCENE)
HALF = Image.new("L", (256, 256), 0)
HALF.paste(255, (128, 0, 256, 256))  # transparent is what this marks


def see_through(image: Image.Image) -> bytes:
    """The image, whose right half is transparent."""
    made = image.convert("RGBA")
    made.putalpha(HALF.point(lambda value: 255 - value))
    return png(made)


MASK = see_through(Image.new("RGB", (256, 256)))


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def drawn(answer: Any) -> list[Any]:
    return [pixels(base64.b64decode(one.b64_json)) for one in answer.data]


def test_an_edit_is_that_of_the_generator(client: openai.OpenAI, generator: Generator) -> None:
    answer = client.images.edit(
        image=IMAGE,
        mask=MASK,
        prompt="a cow",
        n=2,
        size="128x128",
        input_fidelity="low",
        extra_body={"seed": 7, "cfg_weight": 2.5, **FEW},
    )
    expected = generator.run(
        "a cow", image=IMAGE, mask=MASK, seed=7, num_images_per_prompt=2, cfg_weight=2.5, **FEW
    ).images
    for found, image in zip(drawn(answer), expected, strict=True):
        assert np.array_equal(found, np.asarray(image))
    assert answer.model_extra["seed"] == 7


def test_transparent_places_of_the_image_are_the_mask(
    client: openai.OpenAI, generator: Generator
) -> None:
    image = see_through(SCENE)
    answer = client.images.edit(image=[image], prompt="a cow", extra_body={"seed": 1, **FEW})
    expected = generator.run("a cow", image=image, mask=image, seed=1, **FEW).image
    assert np.array_equal(drawn(answer)[0], np.asarray(expected))


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations_are_of_what_the_model_says(client: openai.OpenAI, generator: Generator) -> None:
    answer = client.images.create_variation(image=IMAGE, n=2, extra_body={"seed": 2, **FEW})
    expected = generator.run(image=IMAGE, num_images_per_prompt=2, seed=2, **FEW).images
    for found, image in zip(drawn(answer), expected, strict=True):
        assert np.array_equal(found, np.asarray(image))


def test_a_served_edit_is_made_again_on_the_command_line(
    client: openai.OpenAI, alpha_set: Path, tmp_path: Path
) -> None:
    answer = client.images.edit(image=IMAGE, mask=MASK, prompt="a dog", extra_body=FEW)
    files = {"served": base64.b64decode(answer.data[0].b64_json), "image": IMAGE, "mask": MASK}
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    again = ["generate", "--engines", str(alpha_set), "--like", str(tmp_path / "served.png")]
    again += ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]
    assert main([*again, "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == files["served"]


@pytest.mark.parametrize("kind", ["edits", "variations"])
def test_a_job_tells_how_far_it_is(server: Server, generator: Generator, kind: str) -> None:
    steps = {"num_inference_steps": "40", "decoding_steps": "2"}
    files = {"image": IMAGE, **({"mask": MASK} if kind == "edits" else {})}
    answer = server.client.post(
        f"/v1/jobs/{kind}",
        files=files,
        data={"prompt": "a cow", "seed": "3", "previews": "true", **steps},
    )
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    assert answer.headers["location"] == f"/v1/jobs/{job_id}"
    seen = list(events(server, job_id))
    assert seen[-1][0] == "done"
    assert [name for name, _ in seen if name == "preview"]
    file = server.client.get(seen[-1][1]["images"][0]).content
    numbers = {name: int(value) for name, value in steps.items()}
    expected = generator.run("a cow", seed=3, **files, **numbers)  # type: ignore[arg-type]
    assert np.array_equal(pixels(file), np.asarray(expected.image))


def test_the_mllm_thinks_first(client: openai.OpenAI, generator: Generator) -> None:
    ask = "Tell me of {prompt}."
    few: dict[str, Any] = {"seed": 4, "think": ask, **FEW}
    answer = client.images.generate(prompt="a cow", extra_body=few)
    expected = generator.run("a cow", **few)
    assert answer.data[0].revised_prompt == expected.thought
    assert np.array_equal(drawn(answer)[0], np.asarray(expected.image))
    edited = client.images.edit(image=IMAGE, mask=MASK, prompt="a cow", extra_body=few)
    assert edited.data[0].revised_prompt == expected.thought


def test_a_job_tells_what_is_thought(server: Server) -> None:
    job_id = server.start(think="Tell me of {prompt}.", seed=4)
    told = [data for _, data in events(server, job_id)]
    assert told[-1]["state"] == "done"
    assert told[-1]["thought"] == told[-1]["parameters"]["prompt"]
    thinking = [one for one in told if one["stage"] == "thinking"]
    assert all(told[-1]["thought"].startswith(one["thought"].strip()) for one in thinking)
    plain = server.until(server.start(), "done")
    assert plain["thought"] is None


OPAQUE = {"image": IMAGE}
BOTH = {"image": IMAGE, "mask": MASK}
BROKEN = IMAGE[:200]


@pytest.mark.parametrize(
    ("path", "files", "data", "param", "message"),
    [
        (EDITS, {"mask": MASK}, {}, "image", "image: is missing"),
        (EDITS, OPAQUE, {}, "mask", "mask: is missing"),
        (EDITS, {**BOTH, "image": BROKEN}, {}, "image", "image is damaged"),
        (EDITS, {**BOTH, "mask": BROKEN}, {}, "mask", "mask is damaged"),
        (EDITS, {**BOTH, "image": b"words"}, {}, "image", "no image that Pillow reads"),
        (EDITS, {**BOTH, "image": b""}, {}, "image", "no image that Pillow reads"),
        (EDITS, {**BOTH, "other": IMAGE}, {}, "other", "must be text"),
        (EDITS, BOTH, {"prompt": " "}, "prompt", "is empty"),
        (EDITS, BOTH, {"n": "0"}, "n", "greater than"),
        (EDITS, BOTH, {"n": "x"}, "n", "valid integer"),
        (EDITS, BOTH, {"n": "9"}, "n", "at most 4"),
        (EDITS, BOTH, {"seed": "-1"}, "seed", "greater than"),
        (EDITS, BOTH, {"size": "1024x1024"}, "size", "must be '128x128'"),
        (EDITS, BOTH, {"previews": "true"}, "previews", "unknown field"),
        (EDITS, BOTH, {"imge": "1"}, "imge", "unknown field 'imge'"),
        (EDITS, BOTH, {"cfg_weight": "1e999"}, "cfg_weight", "finite"),
        (EDITS, BOTH, {"n": ["1", "2"]}, "n", "given 2 times"),
        (VARIATIONS, BOTH, {}, "mask", "a variation has none"),
        (VARIATIONS, OPAQUE, {"prompt": ""}, "prompt", "is empty"),
        ("/v1/jobs/edits", {"mask": MASK}, {}, "image", "image: is missing"),
    ],
)
def test_forms_that_cannot_be_served(
    server: Server,
    path: str,
    files: dict[str, bytes],
    data: dict[str, Any],
    param: str,
    message: str,
) -> None:
    data = {"prompt": "a cow", **data}
    named = {name: (f"{name}.png", content) for name, content in files.items()}
    answer = server.client.post(path, files=named, data=data)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert message in error["message"]


def test_a_prompt_that_looks_like_a_number_is_text(server: Server) -> None:
    data = {"prompt": "2", "user": "true", **{name: str(value) for name, value in FEW.items()}}
    answer = server.client.post("/v1/jobs/edits", files=BOTH, data=data)
    assert answer.json()["parameters"]["prompt"] == "2"
    server.until(answer.json()["id"], "done")


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 400),
        (b"", "multipart/form-data", 400),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x", 400),
        (b"\x00\xff" * 90, "multipart/form-data; boundary=x", 400),
        (b"image=1", "application/x-www-form-urlencoded", 400),
        (b"x" * (17 << 20), "multipart/form-data; boundary=x", 413),
    ],
)
@pytest.mark.parametrize("path", [EDITS, "/v1/jobs/variations"])
def test_bodies_that_are_no_forms(
    server: Server, path: str, content: bytes, kind: str, status: int
) -> None:
    answer = server.client.post(path, content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_image_as_text_and_two_images_are_refused(server: Server) -> None:
    text = server.client.post(EDITS, data={"prompt": "a", "image": "x"}, files={"mask": MASK})
    assert "must be a file" in text.json()["error"]["message"]
    two = [("image[]", ("a.png", IMAGE)), ("image[]", ("b.png", IMAGE))]
    answer = server.client.post(EDITS, data={"prompt": "a"}, files=two)
    assert "2 are given" in answer.json()["error"]["message"]


def test_pages_of_other_origins_send_no_forms(server: Server) -> None:
    foreign = server.client.post(EDITS, files=BOTH, headers={"Origin": "http://evil.example"})
    assert foreign.status_code == 403
    own = server.client.post(
        EDITS, files=BOTH, data={"prompt": " "}, headers={"Origin": server.url}
    )
    assert own.status_code == 400
    assert own.json()["error"]["param"] == "prompt"
