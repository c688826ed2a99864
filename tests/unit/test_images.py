"""Whatever users call an image becomes RGB as they see it, or one line that says why not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import RequestError, RequestTypeError, images

RED, GREEN, BLUE = (200, 10, 20), (10, 180, 30), (20, 30, 220)


def two_by_one() -> Image.Image:
    """Red on the left, green on the right."""
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    return image


def encoded(image: Image.Image, fmt: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    array = np.asarray(image)
    assert array.dtype == np.uint8
    return [tuple(int(v) for v in pixel) for pixel in array.reshape(-1, 3)]


def test_paths_bytes_images_and_arrays_are_the_same(tmp_path: Path) -> None:
    image, file = two_by_one(), tmp_path / "a.png"
    image.save(file)
    for given in (image, file, str(file), file.read_bytes(), np.asarray(image)):
        found = images.read(given)
        assert found.mode == "RGB"
        assert pixels(found) == [RED, GREEN]


def test_what_is_transparent_lies_on_white() -> None:
    clear = Image.new("RGBA", (2, 1), (*BLUE, 0))
    clear.putpixel((1, 0), (*BLUE, 255))
    assert pixels(images.read(encoded(clear))) == [(255, 255, 255), BLUE]
    palette = two_by_one().quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    found = pixels(images.read(encoded(palette, transparency=palette.getpixel((0, 0)))))
    assert found[0] == (255, 255, 255)


def test_exif_turns_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter to the right is right
    found = images.read(encoded(two_by_one(), exif=exif))
    assert found.size == (1, 2)
    assert pixels(found) == [RED, GREEN]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    grey = Image.new("L", (3, 2), 255)
    found = images.read(grey.convert(mode) if mode != "HSV" else grey.convert("RGB").convert(mode))
    assert found.mode == "RGB"
    assert set(pixels(found)) == {(255, 255, 255)}


def test_16_bit_is_scaled_and_not_cut_off() -> None:
    grey = np.array([[0, 32768, 65535]], np.uint16)
    found = images.read(encoded(Image.fromarray(grey)))
    assert pixels(found) == [(0,) * 3, (128,) * 3, (255,) * 3]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], np.float32))
    assert pixels(images.read(floats)) == [(0,) * 3, (128,) * 3, (255,) * 3, (0,) * 3]


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    found = np.asarray(images.read(data), int)
    assert np.abs(found - RED).max() <= 8  # a palette
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert np.abs(np.asarray(images.read(opened), int) - RED).max() <= 8


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="^image is no image that Pillow reads\nhint: use PNG"):
        images.read(data)
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(RequestError, match=r"^image: .*a\.png is no image that Pillow reads"):
        images.read(tmp_path / "a.png")


def test_what_was_cut_off_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for fmt in ("PNG", "JPEG"):
        data = encoded(Image.fromarray(noise), fmt)
        with pytest.raises(RequestError, match="^image is damaged: "):
            images.read(data[: len(data) // 2])


def chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


@pytest.mark.parametrize("side", [11_000, 60_000])
def test_a_bomb_is_refused_before_it_is_unpacked(side: int) -> None:
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9))
    with pytest.raises(RequestError, match="pixels"):
        images.read(data + chunk(b"IEND", b""))


def test_files_and_types_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^image: .*gone\.png: cannot be read: No such file"):
        images.read(tmp_path / "gone.png")
    with pytest.raises(RequestError, match=r"^image: .*: cannot be read: Is a directory"):
        images.read(tmp_path)
    for given in (None, 5, ["a.png"], {"url": "x"}):
        with pytest.raises(RequestTypeError, match="^image must be a path, the bytes of a file"):
            images.read(given, "image")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 3), np.float32),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros(3, np.uint8),
    ],
)
def test_arrays_of_another_kind_are_refused(array: Any) -> None:
    with pytest.raises(RequestError, match="^image must be uint8 .*, got "):
        images.read(array)


def test_arrays_without_pixels_are_refused() -> None:
    with pytest.raises(RequestError, match="^image has no pixels"):
        images.read(np.zeros((0, 2, 3), np.uint8))
