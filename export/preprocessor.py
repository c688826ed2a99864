"""How the MLLM reads images: its preprocessor's config -> facts of the manifest."""

from __future__ import annotations

import os

from bifrost_rt.manifest import Vision
from export.checkpoint import Checkpoint
from export.configs import Config, Many, Optional, Real, Whole
from export.errors import RecipeError

FILES = ("preprocessor_config.json", "processor_config.json")  # the second of newer transformers
KINDS = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2_5_VLImageProcessor", None)
BICUBIC = 3  # Pillow's number
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LEAST, MOST = 56 * 56, 28 * 28 * 1280  # pixels, where the config says nothing
# Tokens of the largest image where the recipe says nothing: what Qwen2.5-VL's authors advise. The
# published config allows 16384, more than most conversations have room for.
TOKENS = 1280
PIXELS = Whole(1, 1 << 28)


def why_none(checkpoint: Checkpoint) -> str | None:
    """Say why a set of this checkpoint reads no images; None where it does."""
    if checkpoint.vision is None:
        return f"{checkpoint.mllm} has no vision tower"
    if _config(checkpoint) is None:
        return f"{checkpoint.mllm} has no {FILES[0]}"
    return None


def read(checkpoint: Checkpoint, max_pixels: int | None = None) -> Vision | None:
    """Say how images become patches; None where the checkpoint has no tower, or does not say.

    Args:
        max_pixels: of the largest image that is not made smaller; default: the checkpoint's, at
            most `TOKENS` tokens.

    Raises:
        CheckpointError: another preprocessor, or values that do not fit the tower.
        RecipeError: fewer pixels than the smallest image has.
    """
    tower, config = checkpoint.vision, _config(checkpoint)
    if tower is None or config is None:
        return None
    config.only("image_processor_type", *KINDS)
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        config.only(step, True, None)
    config.only("resample", BICUBIC, None)
    for key, built in (
        ("patch_size", tower.patch_size),
        ("temporal_patch_size", tower.temporal_patch_size),
        ("merge_size", tower.merge_size),
    ):
        if config.get(key, Whole(1, 1 << 12), built) != built:
            raise config.error(key, f"expected the vision tower's, {built}")
    least, most = _limits(config)
    side = tower.patch_size * tower.merge_size
    limit = min(most, TOKENS * side**2) if max_pixels is None else max_pixels
    least = max(least, side**2)
    if limit < least:
        raise RecipeError(
            f"max_image_pixels is {limit}, but the smallest image that the model reads has {least}",
            hint="give more, or leave it out",
        )
    colours = Optional(Many(Real(-1e6, 1e6), 3, 3))
    std = config.get("image_std", colours, None) or CLIP_STD
    if min(std) <= 0:
        raise config.error("image_std", "expected three numbers above 0")
    return Vision(
        patch_size=tower.patch_size,
        temporal_patch_size=tower.temporal_patch_size,
        merge_size=tower.merge_size,
        window=tower.window,
        min_pixels=least,
        max_pixels=limit,
        rescale_factor=config.get("rescale_factor", Optional(Real(0, 1e6)), None) or 1 / 255,
        image_mean=config.get("image_mean", colours, None) or CLIP_MEAN,
        image_std=std,
    )


def _config(checkpoint: Checkpoint) -> Config | None:
    for name in FILES:
        path = checkpoint.mllm / name
        if os.path.lexists(path):
            config = Config.read(path)
            return config.table("image_processor") or config
    return None


def _limits(config: Config) -> tuple[int, int]:
    """Pixels of the smallest and the largest image; older files name them otherwise."""
    size = config.table("size") or Config(config.path, {})
    found = []
    for key, table_key, default in (
        ("min_pixels", "shortest_edge", LEAST),
        ("max_pixels", "longest_edge", MOST),
    ):
        value = config.get(key, Optional(PIXELS), None)
        for name in (table_key, key):
            value = value or size.get(name, Optional(PIXELS), None)
        found.append(value or default)
    least, most = found
    if least > most:
        raise config.error("min_pixels", f"expected at most max_pixels, {most}")
    return least, most
