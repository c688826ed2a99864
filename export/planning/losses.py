"""What quantizing a group of layers has cost where it was measured: the figures that `--fit`
chooses by. `python -m benchmarks.losses` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifrost_rt import files, serialization
from bifrost_rt.errors import TextFileError
from export.errors import RecipeError

RECORD = Path(__file__).with_name("losses.json")


@dataclass(frozen=True)
class Loss:
    """Of one group of layers in one format, everything else in float32.

    Attributes:
        image: mean square error of the images' pixels, over the square of the largest value. The
            errors of several groups add up.
        output: relative error of the engine's own output.
        tokens: cosine of the CLIP latents.
    """

    image: float
    output: float | None
    tokens: float


@dataclass(frozen=True)
class Losses:
    """Attributes:
    source: what was measured, and how.
    groups: group of layers -> format -> its loss.
    """

    source: str
    groups: Mapping[str, Mapping[str, Loss]]


def read(path: Path = RECORD) -> Losses:
    """Return a record.

    Raises:
        RecipeError: it cannot be read, or holds something else.
    """
    try:
        document: Any = json.loads(files.read_text(path))
        found: Losses = serialization.load(Losses, document)
    except (OSError, TextFileError, ValueError, serialization.SerializationError) as error:
        raise RecipeError(
            f"{path}: expected measured losses, cannot read them: {error}",
            hint="write them with `python -m benchmarks.losses`",
        ) from None
    return found
