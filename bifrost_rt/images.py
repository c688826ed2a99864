"""Images as users have them -> RGB pixels, or one clear error."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bifrost_rt.errors import RequestError, RequestTypeError

# Larger files are refused before they are unpacked: nobody's camera makes them, and a few kilobytes
# can claim to be so large.
MOST_PIXELS = 100_000_000

ImageLike: TypeAlias = "str | Path | bytes | Image.Image | NDArray[np.uint8]"


def read(image: Any, name: str = "image") -> Image.Image:
    """Return an image in RGB, as a person sees it: turned as its EXIF data says, the first frame of
    an animation, on white where it is transparent.

    Args:
        image: a path, the bytes of a file, a `PIL.Image`, or uint8 [H, W], [H, W, 3] or [H, W, 4].
        name: what errors call it.

    Raises:
        RequestError: not an image, damaged, or of too many pixels.
        RequestTypeError: nothing that could be an image.
    """
    return _whole(image, name, _rgb)


def painted(image: Any, name: str = "mask") -> Image.Image:
    """Return what an image marks, in grey ("L"): how transparent it is where it has transparency,
    else how white. Arguments and errors are those of `read`."""
    return _whole(image, name, _marked)


def transparent(image: Any, name: str = "image") -> bool:
    """Say whether any place of an image is masked by its own transparency. Arguments and errors
    are those of `read`."""
    return bool(np.asarray(_whole(image, name, _transparency)).any())


def _whole(image: Any, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if isinstance(image, Image.Image):
        opened = image
    elif isinstance(image, np.ndarray):
        opened = _from_array(image, name)
    elif isinstance(image, (str, os.PathLike)):
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise RequestError(
                f"{name}: {os.fspath(image)}: cannot be read: {error.strerror}"
            ) from None
        opened = _open(data, f"{name}: {os.fspath(image)}")
    elif isinstance(image, (bytes, bytearray, memoryview)):
        opened = _open(bytes(image), name)
    else:
        raise RequestTypeError(
            f"{name} must be a path, the bytes of a file, a PIL image or an array, "
            f"got {type(image).__name__}"
        )
    _refuse_large(opened, name)
    try:
        return convert(_upright(opened))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for what is cut off
        raise RequestError(f"{name} is damaged: {error}", hint="save or send it again") from None


def _open(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by us
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise RequestError(f"{name}: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise RequestError(
            f"{name} is no image that Pillow reads", hint="use PNG, JPEG or WebP"
        ) from None


def _refuse_large(image: Image.Image, name: str) -> None:
    width, height = image.size
    if not width or not height:
        raise RequestError(f"{name} has {width} x {height} pixels, expected at least one")
    if width * height > MOST_PIXELS:
        raise RequestError(
            f"{name} has {width} x {height} pixels; at most {MOST_PIXELS // 10**6} million are "
            "read",
            hint="make it smaller first",
        )


def _from_array(array: NDArray[Any], name: str) -> Image.Image:
    colours = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or colours not in (1, 3, 4):
        raise RequestError(
            f"{name} must be uint8 [H, W], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype}{list(array.shape)}"
        )
    if array.size == 0:
        raise RequestError(f"{name} has no pixels: {list(array.shape)}")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and colours == 1 else array)


def _upright(image: Image.Image) -> Image.Image:
    """Return the first frame, turned as its EXIF data says, of 8 bit."""
    image.seek(0) if getattr(image, "is_animated", False) else None
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bit(image)
    return image


def _marked(image: Image.Image) -> Image.Image:
    return _transparency(image) if image.has_transparency_data else image.convert("L")


def _transparency(image: Image.Image) -> Image.Image:
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey values of 16 bit, of which Pillow would keep those up to 255 alone."""
    values = np.nan_to_num(np.asarray(image))
    whole = 1.0 if values.max() <= 1 else 255.0  # of floating point, either is usual
    most = whole if values.dtype.kind == "f" else 65535.0
    scaled = np.clip(values.astype(np.float64) * (255.0 / most), 0, 255)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
