"""The self-test's image: what another processor may do to it, and what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import selftest
from bifrost_rt.errors import EngineSetError
from bifrost_rt.manifest import EngineSpec, Precision
from tests.unit.test_request import FACTS

IMAGE = np.full((8, 8, 3), 100, np.uint8)


def a_generator(folder: Path, fmt: str, drawn: np.ndarray) -> Any:
    """Of a set with layers in a format, which draws this."""
    Image.fromarray(IMAGE).save(folder / selftest.IMAGE)
    precision = Precision(fmt, fmt, "float32", {fmt: 1, "bf16": 2})
    engine = EngineSpec("denoise", "", (), (), (), (), precision)
    return SimpleNamespace(
        path=folder,
        manifest=dataclasses.replace(FACTS, engines=(engine,)),
        run=lambda **_: SimpleNamespace(images=[drawn]),
    )


def one_value(by: int) -> np.ndarray:
    drawn = IMAGE.copy()
    drawn[0, 0, 0] += by
    return drawn


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int4"])
def test_without_rounded_activations_every_value_counts(fmt: str, tmp_path: Path) -> None:
    assert selftest.check(a_generator(tmp_path, fmt, one_value(2))).largest == 2
    with pytest.raises(EngineSetError, match=r"differs from selftest.png by 3 of 255 .*allowed 2"):
        selftest.check(a_generator(tmp_path, fmt, one_value(3)))


@pytest.mark.parametrize("fmt", ["int8", "fp8", "nvfp4"])
def test_steps_of_rounding_count_in_the_whole_image(fmt: str, tmp_path: Path) -> None:
    """Another processor moves some values by steps; a wrong engine moves them all."""
    assert selftest.check(a_generator(tmp_path, fmt, one_value(25))).largest == 25
    with pytest.raises(EngineSetError, match=r"by 9 of 255 \(29.0 dB, 9 in the mean; allowed"):
        selftest.check(a_generator(tmp_path, fmt, IMAGE + np.uint8(9)))
