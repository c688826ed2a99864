"""Looking: an image's patches through the vision tower.

Window order, positions and what fills windows up are data that is made here; the engine computes
the same for every grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import dims, image_processor, memory_plan
from bifrost_rt.engines import Engines
from bifrost_rt.errors import RequestError
from bifrost_rt.image_processor import Patches
from bifrost_rt.manifest import SetSpec, Vision
from bifrost_rt.numerics import refuse_infinite

NAME = "vision_encode"


def facts(manifest: SetSpec) -> Vision:
    """Say how the set reads images.

    Raises:
        RequestError: it does not.
    """
    if manifest.vision is None:
        raise RequestError(
            f"the set {manifest.name!r} reads no images: it was built from an MLLM without vision "
            "tower or preprocessor_config.json",
            hint="rebuild it from a complete Qwen2.5-VL folder",
        )
    return manifest.vision


def inputs(patches: Patches, vision: Vision) -> dict[str, NDArray[Any]]:
    """Return what the engine is given for an image of R x C tokens: its windows of `window`² tokens
    from left to right and top to bottom, each filled up with zeros."""
    rows, columns, merged, values = patches.values.shape
    side, merge = vision.window, vision.merge_size
    down, across = -(-rows // side), -(-columns // side)
    row, column = np.divmod(np.arange(rows * columns), columns)
    window = row // side * across + column // side
    lengths = np.bincount(window, minlength=down * across)
    by_window = np.argsort(window, kind="stable")  # tokens of a window stay in their order
    starts = np.cumsum(lengths) - lengths
    place = np.empty(rows * columns, np.int64)  # of each token within its window
    place[by_window] = np.arange(rows * columns) - np.repeat(starts, lengths)
    filled = np.zeros((down * across, side**2, merged, values), np.float32)
    filled[window, place] = patches.values.reshape(rows * columns, merged, values)
    positions = np.zeros((down * across, side**2, merged, 2), np.int64)
    within = np.stack(np.divmod(np.arange(merged), merge), axis=-1)  # of a patch in its token
    corner = np.stack([row, column], axis=-1) * merge
    positions[window, place] = corner[:, None] + within
    size = side**2 * merged
    return {
        "patches": filled.reshape(-1, size, values),
        "positions": positions.reshape(-1, size, 2),
        "window_length": lengths * merged,
        "token_order": window * side**2 + place,
    }


def sizes(patches: Patches, vision: Vision) -> memory_plan.Sizes:
    """Return what an image makes of the symbols of the engine's inputs and outputs."""
    found = dims.of_run(
        text_tokens=1,
        steps=1,
        vision_tokens=patches.tokens,
        windows=image_processor.windows(patches.rows, patches.columns, vision),
    )
    return lambda engine: found


def encode(
    engines: Engines, manifest: SetSpec, patches: Patches, timings: dict[str, float]
) -> NDArray[np.float32]:
    """Return the image's tokens, [M, D], row by row.

    Raises:
        RequestError: the set reads no images.
        BudgetError: the image does not fit into the memory budget.
        NumericsError: a token is not finite.
    """
    vision = facts(manifest)
    engines.begin((NAME,), sizes(patches, vision))
    given = engines.put(NAME, **inputs(patches, vision))
    found = engines.backend.download(engines.run(NAME, given, timings)["image_tokens"])
    engines.check_files()
    tokens: NDArray[np.float32] = found.copy()
    refuse_infinite(NAME, "image_tokens", tokens, "token")
    return tokens
