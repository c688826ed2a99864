"""What a client is told beside its images, and instead of black ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bifrost_rt import Generator
from tests.serve.conftest import FEW, Server

LONG_PROMPT = "a photo of a wooden bridge over a river " * 12


def test_a_prompt_that_is_cut_is_said_with_its_images(server: Server, generator: Generator) -> None:
    warnings = generator.run(LONG_PROMPT, seed=1, **FEW).warnings
    assert len(warnings) == 3
    assert server.draw(prompt=LONG_PROMPT).json()["warnings"] == warnings
    assert server.draw(prompt="a cow").json()["warnings"] == []
    job = server.until(server.start(prompt=LONG_PROMPT), "done", "failed")
    assert (job["state"], job["warnings"]) == ("done", warnings)


def test_each_of_two_that_are_drawn_together_hears_its_own(
    serving: Callable[..., Any],
) -> None:
    with serving("--max-batch", "4") as server:
        blocker = server.start(num_inference_steps=200, decoding_steps=1)
        server.until(blocker, "running")
        jobs = [server.start(prompt=text) for text in ("a cow", LONG_PROMPT, "a dog")]
        server.client.delete(f"/v1/jobs/{blocker}")
        said = [server.until(job, "done", "failed")["warnings"] for job in jobs]
        assert server.figure("bifrost_batch_images_count") == 2
    assert [len(one) for one in said] == [0, 3, 0]
    assert all(text.startswith("prompt 0: truncated: ") for text in said[1])


@pytest.mark.parametrize(
    ("field", "stage"),
    [("cfg_weight", "visual_decode"), ("controlnet_conditioning_scale", "denoise")],
)
def test_an_image_that_would_be_black_is_an_error(server: Server, field: str, stage: str) -> None:
    answer = server.draw(**{field: 3e38})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "not_finite")
    assert error["message"].startswith(f"engine `{stage}`: ")
    assert f"hint: {field}=3e+38: use a value like the default" in error["message"]
    job = server.until(server.start(**{field: 3e38}, previews=True), "done", "failed")
    assert job["state"] == "failed"
    assert (job["images"], job["error"]["code"]) == ([], "not_finite")
    assert server.draw(seed=1).status_code == 200


def test_a_token_file_with_a_byte_order_mark(serving: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfcorrect-horse-battery\r\n")
    with serving("--token-file", str(tmp_path / "token")) as locked:
        for token, status in (("correct-horse-battery", 200), ("correct-horse", 401)):
            headers = {"Authorization": f"Bearer {token}"}
            assert locked.client.get("/v1/models", headers=headers).status_code == status
