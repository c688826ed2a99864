"""LoRA files that a build adds to the weights: `FILE[:scale]`, and what the manifest says of
them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bifrost_rt import manifest as manifests
from bifrost_rt.manifest import Lora
from export.errors import CheckpointError, RecipeError

ENDING = ".safetensors"


@dataclass(frozen=True)
class LoraFile:
    """One file that was asked for.

    Attributes:
        scale: what its product is multiplied by, beside what the file says itself.
    """

    path: Path
    scale: float = 1.0

    def described(self) -> Lora:
        """Return what the manifest says of it.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            return Lora(self.path.name, manifests.sha256(self.path), self.scale)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: a LoRA that cannot be read: {error.strerror}",
                hint="--lora takes FILE or FILE:scale",
            ) from None


def parse(text: str) -> LoraFile:
    """Read `FILE[:scale]`. A colon in the file's path is none before a scale.

    Raises:
        RecipeError: the scale is no number, or the file is no safetensors file.
    """
    path, colon, last = text.rpartition(":")
    if not colon or "/" in last or last.endswith(ENDING):
        path, last = text, "1"
    try:
        scale = float(last)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale) or scale == 0:
        raise RecipeError(
            f"lora {text!r}: the scale is {last!r}, expected a finite number other than 0",
            hint=f"give FILE{ENDING}:0.8, or FILE{ENDING} alone for 1",
        )
    if not path.endswith(ENDING):
        raise RecipeError(
            f"lora {text!r}: expected a {ENDING} file",
            hint="of .pt, .bin and .ckpt, convert it first: pickles are not opened here",
        )
    return LoraFile(Path(path), scale)


def parse_all(texts: Sequence[str]) -> tuple[LoraFile, ...]:
    """Read several.

    Raises:
        RecipeError: one of them is wrong, or two are one file.
    """
    found = tuple(parse(text) for text in texts)
    places = [os.path.realpath(lora.path) for lora in found]
    for lora, place in zip(found, places, strict=True):
        if places.count(place) > 1:
            raise RecipeError(
                f"lora: {lora.path} is given {places.count(place)} times",
                hint="give it once, with the sum of the scales",
            )
    return found
