"""The facts of Qwen2.5-VL's vision tower, apart from its torch modules."""

from __future__ import annotations

from dataclasses import dataclass

from export.configs import LAYERS, MOST_LAYERS, WIDTH, Config, Many, Optional, Real, Whole

MOST_PIXELS = 1 << 12  # of a patch's or a window's side
THETA = Optional(Real(1, 1e12))


@dataclass(frozen=True)
class VisionConfig:
    """What decides the tower's shapes and arithmetic.

    Attributes:
        patch_size: pixels of a patch's side.
        merge_size: patches of a token's side.
        window: tokens of a window's side; layers that are not in `full_attention` look no further.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    window: int
    full_attention: frozenset[int]
    out_hidden_size: int
    rope_theta: float

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: its pixels, once for every frame."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches of a whole window."""
        return (self.window * self.merge_size) ** 2

    @classmethod
    def read(cls, config: Config, out_hidden_size: int) -> VisionConfig:
        """Read the table `vision_config`, as published or as newer transformers write it.

        Args:
            out_hidden_size: what the text branch takes.

        Raises:
            CheckpointError: a key is missing or of a wrong value, or asks for arithmetic that this
                tower does not compute.
        """
        rope = config.table("rope_parameters") or Config(config.path, {})
        rope.only("rope_type", "axial", "default", None)
        config.only("hidden_act", "silu")
        channels = config.get("in_channels", WIDTH, config.get("in_chans", WIDTH, 3))
        if channels != 3:
            raise config.error("in_channels", "expected 3, red, green and blue")
        width, heads = config.get("hidden_size", WIDTH), config.get("num_heads", WIDTH)
        if width % heads or width // heads % 4:
            raise config.error(
                "num_heads", f"expected heads that take a multiple of 4 of the {width} values each"
            )
        side = Whole(1, MOST_PIXELS)
        patch, merge = config.get("patch_size", side, 14), config.get("spatial_merge_size", side, 2)
        if config.get("spatial_patch_size", side, patch) != patch:
            raise config.error("spatial_patch_size", f"expected patch_size, {patch}")
        pixels = config.get("window_size", side, 112)
        if pixels < merge * patch:
            raise config.error("window_size", f"expected at least {merge * patch} pixels, a token")
        depth = config.get("depth", Whole(1, MOST_LAYERS))
        full = config.get("fullatt_block_indexes", Many(LAYERS, 0), ())
        if any(layer >= depth for layer in full):
            raise config.error("fullatt_block_indexes", f"expected numbers below depth, {depth}")
        if config.get("out_hidden_size", WIDTH, out_hidden_size) != out_hidden_size:
            raise config.error(
                "out_hidden_size", f"expected the text branch's hidden_size, {out_hidden_size}"
            )
        return cls(
            depth=depth,
            hidden_size=width,
            intermediate_size=config.get("intermediate_size", WIDTH),
            num_heads=heads,
            channels=channels,
            patch_size=patch,
            temporal_patch_size=config.get("temporal_patch_size", Whole(1, 16), 2),
            merge_size=merge,
            window=pixels // merge // patch,
            full_attention=frozenset(full),
            out_hidden_size=out_hidden_size,
            rope_theta=rope.get("rope_theta", THETA, None) or 10_000.0,
        )
