"""Parts of several images and prompts -> the visual tokens of one grid."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import images, latents_file, request, unicode
from bifrost_rt.errors import RequestError, RequestTypeError
from bifrost_rt.images import ImageLike

# Left, top, right, bottom, of the image's sides: (0, 0, 0.5, 1) is the left half.
Box: TypeAlias = "tuple[float, float, float, float]"
Part: TypeAlias = "tuple[str | ImageLike | NDArray[np.floating[Any]], Box]"


@dataclass(frozen=True)
class Composition:
    """One grid of N visual tokens.

    Attributes:
        tokens: [N, D], 0 where they are predicted.
        masked: [N], the positions that are predicted.
        prompts: those of parts, each once.
        regions: int64 [N], under which prompt a position is predicted: 0 for the image's own, i for
            `prompts[i - 1]`.
        digest: sha256 of all of it, as it was given.
    """

    tokens: NDArray[np.float32]
    masked: NDArray[np.bool_]
    prompts: tuple[str, ...]
    regions: NDArray[np.int64]
    digest: str


def read(
    parts: Sequence[Part],
    shape: tuple[int, int],
    encode: Callable[[Any], NDArray[np.float32]],
) -> Composition:
    """Lay parts on a grid; of parts that overlap, the later one counts.

    Args:
        parts: what and where. A text is a prompt; a path, a `PIL.Image`, uint8 pixels or the bytes
            of a file an image; floating point [N, D] or [1, N, D] CLIP latents. Of images and
            latents, the part is taken that lies in the box.
        shape: N, D.
        encode: an image in RGB -> its CLIP latents, [1, N, D].

    Raises:
        RequestError, RequestTypeError: naming the part, what it must be and what was given.
    """
    if isinstance(parts, (str, bytes)) or not isinstance(parts, Sequence):
        raise RequestTypeError(f"compose must be a list of (part, box), got {type(parts).__name__}")
    if not parts:
        raise RequestError("compose is an empty list", hint="pass at least one (part, box)")
    count = shape[0]
    side = round(count**0.5)
    tokens = np.zeros(shape, np.float32)
    masked, regions = np.ones(count, bool), np.zeros(count, np.int64)
    prompts: list[str] = []
    known: list[tuple[NDArray[np.bool_], Any]] = []  # read when all else can be served
    facts: list[Any] = []
    for i, one in enumerate(parts):
        name = f"compose[{i}]"
        if isinstance(one, (str, bytes)) or not isinstance(one, Sequence) or len(one) != 2:
            raise RequestTypeError(f"{name} must be (part, box), got {one!r:.80}")
        what, box = one[0], _box(name, one[1])
        inside = _inside(name, box, side)
        if isinstance(what, str):
            unicode.check(name, what)
            if what not in prompts:
                prompts.append(what)
            regions[inside], masked[inside] = 1 + prompts.index(what), True
            facts.append(["prompt", what, box])
            continue
        found: Any
        if isinstance(what, np.ndarray) and what.dtype.kind == "f":
            alone = what[0] if what.ndim == 3 and len(what) == 1 else what
            found = request.floats(f"{name}: CLIP latents", alone, shape)
            facts.append(["tokens", latents_file.digest(found), box])
        else:
            found = images.read(what, name)
            facts.append(["image", latents_file.digest(np.asarray(found)), box])
        known.append((inside, found))
        regions[inside], masked[inside] = 0, False
    for inside, found in known:
        latents = found if isinstance(found, np.ndarray) else encode(found)[0]
        tokens[inside] = latents[inside]
    tokens[masked] = 0
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Composition(tokens, masked, tuple(prompts), regions, digest)


def _box(name: str, box: Any) -> Box:
    try:
        left, top, right, bottom = (float(edge) for edge in box)
    except (TypeError, ValueError):
        raise RequestTypeError(
            f"{name}: its box must be (left, top, right, bottom), got {box!r:.80}"
        ) from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise RequestError(
            f"{name}: its box must lie within 0 and 1, left before right and top before bottom, "
            f"got {(left, top, right, bottom)}"
        )
    return left, top, right, bottom


def _inside(name: str, box: Box, side: int) -> NDArray[np.bool_]:
    """Return the positions whose middle lies in a box, [side * side]."""
    left, top, right, bottom = box
    middle = (np.arange(side) + 0.5) / side
    rows, columns = (middle >= top) & (middle < bottom), (middle >= left) & (middle < right)
    inside: NDArray[np.bool_] = np.outer(rows, columns).ravel()
    if not inside.any():
        raise RequestError(
            f"{name}: its box holds the middle of no visual token",
            hint=f"there are {side} x {side}: make it larger",
        )
    return inside
