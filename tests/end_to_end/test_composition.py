"""Images composed of parts of others and of prompts for parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.reference import Reference
from bifrost_rt import Generator, RequestError, RequestTypeError, request
from bifrost_rt.cli import main
from tests.conftest import difference
from tests.end_to_end.conftest import PROMPTS, settings_of

FEW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
SIDE = 4  # tokens of the golden model's grid
LEFT, RIGHT, LOWER = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0.5, 1, 1)
IMAGE = Image.radial_gradient("L").convert("RGB")
OTHER = Image.linear_gradient("L").convert("RGB")


def half(box: tuple[float, float, float, float]) -> NDArray[np.bool_]:
    grid = np.zeros((SIDE, SIDE), bool)
    left, top, right, bottom = (round(SIDE * edge) for edge in box)
    grid[top:bottom, left:right] = True
    return grid.ravel()


def test_parts_of_images_keep_their_tokens(generator: Generator, tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.png")
    tokens = generator.encode(OTHER)
    parts: list[Any] = [(tmp_path / "a.png", LEFT), (tokens, RIGHT)]
    found = generator.run("a cow", compose=parts, **FEW)
    expected = np.where(half(LEFT)[:, None], generator.encode(IMAGE), tokens)
    assert np.array_equal(found.tokens, expected)
    assert "visual_decode" not in found.timings
    assert not [note for note in found.warnings if "mask" in note]
    drawn = generator.run("a cow", tokens=expected, **FEW)
    assert np.array_equal(found.images, drawn.images)


def test_the_later_of_two_parts_counts(generator: Generator) -> None:
    found = generator.run("a cow", compose=[(OTHER, (0, 0, 1, 1)), (IMAGE, LOWER)], **FEW)
    expected = np.where(half(LOWER)[:, None], generator.encode(IMAGE), generator.encode(OTHER))
    assert np.array_equal(found.tokens, expected)


def test_what_no_part_holds_is_an_edit(generator: Generator) -> None:
    mask = Image.fromarray(half(RIGHT).reshape(SIDE, SIDE).astype(np.uint8) * 255)
    edited = generator.run("a cow", image=IMAGE, mask=mask, keep_pixels=False, **FEW)
    found = generator.run("a cow", compose=[(IMAGE, LEFT)], **FEW)
    assert np.array_equal(found.tokens, edited.tokens)
    assert np.array_equal(found.images, edited.images)


def test_parts_under_the_images_own_prompt_are_a_generation(generator: Generator) -> None:
    arguments: dict[str, Any] = {**FEW, "cfg_weight": 2.0, "num_images_per_prompt": 2}
    plain = generator.run("a cow", **arguments)
    parts: list[Any] = [("a cow", LEFT), ("a cow", RIGHT)]
    found = generator.run("a cow", compose=parts, **arguments)
    assert difference(found.tokens, plain.tokens) < 1e-5


def test_prompts_of_parts_are_decoded_together(generator: Generator, reference: Reference) -> None:
    """As the reference does, which computes every prompt by itself."""
    prompts, inner = PROMPTS, ("a red apple", "café 猫 at dusk")
    settings = settings_of(generator, np.random.default_rng(3))
    corner = (0.75, 0.75, 1, 1)
    parts: list[Any] = [(inner[0], LEFT), (IMAGE, LOWER), (inner[1], corner)]
    masked = ~half(LOWER) | half(corner)
    regions = np.where(half(corner), 2, np.where(half(LEFT) & ~half(LOWER), 1, 0))
    expected = reference.run(
        prompts,
        tokens=np.repeat(generator.encode(IMAGE), 2, axis=0),
        masked=np.tile(masked, (2, 1)),
        regions=np.tile(regions, (2, 1)),
        region_prompts=inner,
        **settings,
    )
    found = generator.run(prompts, compose=parts, output_type="np", **settings)
    assert difference(found.tokens, expected.tokens.numpy()) < 1e-4
    assert np.abs(found.images.astype(int) - expected.image_u8.numpy().astype(int)).max() <= 1
    alone = generator.run(prompts, compose=[(IMAGE, LOWER)], output_type="np", **settings)
    changed = (difference(found.tokens[:, i], alone.tokens[:, i]) > 1e-3 for i in range(SIDE**2))
    assert np.array_equal(np.fromiter(changed, bool), masked)


def test_a_callback_sees_and_replaces_one_row_an_image(generator: Generator) -> None:
    seen: list[NDArray[np.float32]] = []

    def watch(_: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> Any:
        if "tokens" not in tensors:
            return None
        seen.append(tensors["tokens"])
        return {"tokens": np.zeros_like(seen[-1])} if step == 3 else None

    parts: list[Any] = [("a dog", LEFT)]
    arguments = {**FEW, "decoding_steps": 4, "num_images_per_prompt": 2}
    found = generator.run("a cow", compose=parts, callback_on_step_end=watch, **arguments)
    assert [one.shape for one in seen] == [found.tokens.shape] * 4
    assert np.array_equal(found.tokens, np.zeros_like(found.tokens))


@pytest.mark.parametrize(
    ("parts", "error", "said"),
    [
        ([], RequestError, "compose is an empty list"),
        ("a cow", RequestTypeError, "compose must be a list of"),
        (["a cow"], RequestTypeError, r"compose\[0\] must be \(part, box\)"),
        ([(IMAGE, LEFT), ("a", 7)], RequestTypeError, r"compose\[1\]: its box must be"),
        ([("a", (0, 0, 1))], RequestTypeError, r"compose\[0\]: its box must be"),
        ([("a", (0.5, 0, 0.5, 1))], RequestError, "left before right"),
        ([("a", (0, 0, 1, 1.5))], RequestError, "within 0 and 1"),
        ([("a", (float("nan"), 0, 1, 1))], RequestError, "within 0 and 1"),
        ([("a", (0, 0, 0.01, 1))], RequestError, "middle of no visual token"),
        ([(Path("nowhere.png"), LEFT)], RequestError, r"compose\[0\]: nowhere.png: cannot be"),
        ([(np.zeros((3, 5), np.float32), LEFT)], RequestError, "must have the shape"),
        ([(7, LEFT)], RequestTypeError, r"compose\[0\] must be a path"),
        ([("\ud800", LEFT)], RequestError, r"compose\[0\]"),
    ],
)
def test_parts_that_cannot_be(
    generator: Generator, parts: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        generator.run("a cow", compose=parts, **FEW)


def test_tokens_come_from_one_place(generator: Generator) -> None:
    parts: list[Any] = [(IMAGE, LEFT)]
    for other in ({"image": IMAGE}, {"mask": IMAGE}, {"tokens": generator.encode(IMAGE)}):
        with pytest.raises(RequestError, match="is another source"):
            generator.run("a cow", compose=parts, **other)
    with pytest.raises(RequestError, match="compose needs a prompt"):
        generator.run(compose=parts)
    with pytest.raises(RequestError, match="compose has none"):
        generator.run("a cow", compose=parts, extend=0.5)
    with pytest.raises(RequestError, match="keep_pixels keeps"):
        generator.run("a cow", compose=parts, keep_pixels=True)


def test_a_png_says_that_its_image_was_composed(
    generator: Generator, alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"num_inference_steps": 1, "seed": 1}
    found = generator.run("a cow", compose=[(IMAGE, LEFT)], **few)
    other = generator.run("a cow", compose=[(IMAGE, RIGHT)], **few)
    hashes = [one.parameters["injected"]["compose"] for one in (found, other)]
    assert len(set(hashes)) == 2
    assert found.parameters["injected"].keys() == {"compose"}
    (path,) = found.save(tmp_path / "a.png")
    assert main(["generate", "--engines", str(alpha_set), "--like", str(path)]) == 1
    assert "was composed of parts, which an image does not hold" in capsys.readouterr().err


def test_more_rows_than_a_set_takes_are_refused(generator: Generator) -> None:
    import dataclasses

    facts = generator.manifest
    bounds = {**facts.dimensions, "images": dataclasses.replace(facts.dimensions["images"], max=3)}
    limited = dataclasses.replace(facts, dimensions=bounds)
    regions = np.arange(SIDE**2) % 3
    asked: dict[str, Any] = {"regions": regions, "region_prompts": ("a", "b")}
    assert request.check(limited, prompt="a cow", **asked).images == 1
    with pytest.raises(RequestError, match="decoded as 6 rows"):
        request.check(limited, prompt=["a cow", "a dog"], **asked)
