"""Images of which a part is drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.reference import Reference
from bifrost_rt import Generator, RequestError, images, masks, request
from tests.conftest import difference
from tests.end_to_end.conftest import PROMPTS, settings_of

FEW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "seed": 1}
WHITE, BLACK = Image.new("L", (8, 8), 255), Image.new("L", (8, 8), 0)
SIDE = 4  # tokens of the golden model's grid
IMAGE = Image.radial_gradient("L").convert("RGB")


def painted(*places: int) -> Image.Image:
    """A mask of the golden model's grid, white at these places."""
    cells = np.zeros(SIDE**2, np.uint8)
    cells[list(places)] = 255
    return Image.fromarray(cells.reshape(SIDE, SIDE))


def test_a_full_mask_is_a_generation(generator: Generator) -> None:
    arguments: dict[str, Any] = {**FEW, "cfg_weight": 2.0, "num_images_per_prompt": 2}
    drawn = generator.run("a cow", **arguments)
    edited = generator.run("a cow", image=IMAGE, mask=WHITE, **arguments)
    assert np.array_equal(edited.tokens, drawn.tokens)
    assert np.array_equal(edited.images, drawn.images)


def test_an_empty_mask_leaves_the_tokens_and_says_so(generator: Generator) -> None:
    found = generator.run("a cow", image=IMAGE, mask=BLACK, **FEW)
    assert np.array_equal(found.tokens, generator.encode(IMAGE))
    assert "visual_decode" not in found.timings
    assert [text for text in found.warnings if text.startswith("mask has no effect")]


@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("places", [(5,), (5, 6, 9, 10), tuple(range(15))])
def test_places_outside_the_mask_are_kept(
    generator: Generator, places: tuple[int, ...], steps: int
) -> None:
    found = generator.run(
        ["a cow", "a dog"], image=IMAGE, mask=painted(*places), decoding_steps=steps, **FEW
    )
    tokens = generator.encode(IMAGE)
    changed = (found.tokens != tokens).any(axis=2)
    assert [np.flatnonzero(row).tolist() for row in changed] == [list(places)] * 2


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_canvas_around_an_image_is_drawn_anew(generator: Generator, share: float) -> None:
    found = generator.run("a cow", image=IMAGE, extend=share, **FEW)
    wide = round(share * IMAGE.width)
    canvas = Image.fromarray(np.pad(np.asarray(IMAGE), [(wide, wide)] * 2 + [(0, 0)], "edge"))
    kept = (found.tokens == generator.encode(canvas)).all(axis=2)[0].reshape(SIDE, SIDE)
    inside = np.zeros((SIDE, SIDE), bool)
    first = int(np.ceil(SIDE * share / (1 + 2 * share)))
    inside[first : SIDE - first, first : SIDE - first] = True
    assert np.array_equal(kept, inside)
    assert found.parameters["extend"] == share


def test_a_mask_stays_where_it_was_on_the_image(generator: Generator) -> None:
    """The middle cells of the canvas are the whole image: its left half is masked."""
    left = Image.new("L", (2, 1))
    left.putpixel((0, 0), 255)
    found = generator.run("a cow", image=IMAGE, mask=left, extend=0.5, **FEW)
    canvas = masks.canvas(IMAGE, Image.new("L", IMAGE.size), 0.5)[0]
    kept = (found.tokens == generator.encode(canvas)).all(axis=2)[0].reshape(SIDE, SIDE)
    assert kept.sum() == SIDE * SIDE // 8
    assert kept[SIDE // 4 : 3 * SIDE // 4, SIDE // 2 : 3 * SIDE // 4].all()


@pytest.mark.parametrize(
    ("extend", "image", "said"),
    [
        (0.5, None, "extend draws a canvas around an image; pass one as image"),
        (-0.1, IMAGE, "extend must be 0 to 2, got -0.1"),
        (2.5, IMAGE, "extend must be 0 to 2, got 2.5"),
        (float("nan"), IMAGE, "extend must be finite"),
    ],
)
def test_canvases_that_cannot_be_drawn(
    generator: Generator, extend: float, image: Image.Image | None, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        generator.run("a cow", image=image, extend=extend)


def test_tokens_are_those_of_the_reference_loop(generator: Generator, reference: Reference) -> None:
    tokens = np.repeat(generator.encode(IMAGE), 2, axis=0)
    rng = np.random.default_rng(3)
    mask = rng.random(SIDE**2) < 0.6
    prompts, settings = PROMPTS, settings_of(generator, rng)
    expected = reference.run(prompts, tokens=tokens, masked=np.tile(mask, (2, 1)), **settings)
    found = generator.run(
        prompts,
        tokens=tokens,
        mask=painted(*np.flatnonzero(mask)),
        output_type="np",
        **settings,
    )
    assert difference(found.tokens, expected.tokens.numpy()) < 1e-4
    assert np.abs(found.images.astype(int) - expected.image_u8.numpy().astype(int)).max() <= 1


def test_edits_with_other_masks_are_drawn_together(generator: Generator) -> None:
    """Each gets the tokens that it would get alone."""
    facts, tokens = generator.manifest, generator.encode(IMAGE)
    runs = [
        request.check(
            facts,
            prompt=prompt,
            tokens=tokens,
            masked=masks.touched(mask, SIDE).ravel(),
            decoding_steps=3,
            **FEW,
        )
        for prompt, mask in (("a cow", painted(1)), ("a dog", WHITE), ("a cow", BLACK))
    ]
    together = generator.draw(request.merge(runs)).tokens
    alone = np.concatenate([generator.draw(one).tokens for one in runs])
    assert difference(together, alone) < 1e-5
    assert np.array_equal(together[2], tokens[0])


def places(mask: Any, size: tuple[int, int] | None = None) -> NDArray[np.bool_]:
    return masks.touched(images.painted(mask), SIDE, size).ravel()


def grid(*rows: str) -> NDArray[np.bool_]:
    return np.array([character == "#" for row in rows for character in row])


def test_a_mask_touches_every_token_that_it_reaches_into() -> None:
    canvas = np.zeros((64, 64), np.uint8)
    canvas[15:17, 20] = 255
    assert np.array_equal(places(canvas), grid(".#..", ".#..", "....", "...."))
    canvas[15, 20] = 0
    assert np.array_equal(places(canvas), grid("....", ".#..", "....", "...."))
    # fewer pixels than tokens, and sizes that do not divide
    assert np.array_equal(
        places(np.diag([255, 0, 255]).astype(np.uint8)),
        grid("##..", "##..", "..##", "..##"),
    )


def test_a_mask_is_stretched_to_the_image_and_cut_with_it() -> None:
    left = np.zeros((10, 10), np.uint8)
    left[:, :5] = 255
    half = grid("##..", "##..", "##..", "##..")
    assert np.array_equal(places(left), half)
    assert np.array_equal(places(left, (300, 100)), half)
    left[:, 3:] = 0  # of the image's middle nothing
    assert not places(left, (300, 100)).any()
    assert np.array_equal(places(np.full((1, 1), 255, np.uint8)), np.ones(16, bool))


def test_masks_of_every_kind(tmp_path: Path) -> None:
    """Transparent is masked, whatever its colour is; else white is, in any mode."""
    half = np.zeros((8, 8), np.uint8)
    half[:4] = 255
    expected = grid("####", "####", "....", "....")
    white = Image.fromarray(half)
    for mode in ("L", "1", "RGB", "P", "CMYK"):
        assert np.array_equal(places(white.convert(mode)), expected), mode
    clear = Image.merge("RGBA", (white, white, white, Image.fromarray(255 - half)))
    assert np.array_equal(places(clear), expected)
    opaque = Image.merge("LA", (Image.new("L", (8, 8)), Image.fromarray(255 - half)))
    assert np.array_equal(places(opaque), expected)
    sixteen = Image.fromarray(half.astype(np.uint16) * 257)
    assert np.array_equal(places(sixteen), expected)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    white.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(places(tmp_path / "turned.png"), expected)


def test_what_cannot_be_masked_is_named(generator: Generator) -> None:
    with pytest.raises(RequestError, match="mask says what to draw anew of an image or of tokens"):
        generator.run("a cow", mask=WHITE)
    with pytest.raises(RequestError, match="mask is no image that Pillow reads"):
        generator.run("a cow", image=IMAGE, mask=b"no mask")


def test_what_an_image_was_made_from_is_named_by_hash(generator: Generator) -> None:
    found = generator.run("a cow", image=IMAGE, mask=painted(1), **FEW)
    named = found.parameters["injected"]
    assert set(named) == {"image", "mask"}
    other = generator.run("a cow", image=IMAGE, mask=painted(2), **FEW).parameters["injected"]
    assert (other["image"] == named["image"], other["mask"] == named["mask"]) == (True, False)
