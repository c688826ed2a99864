"""What of an image stays while the rest is drawn anew: its pixels, and its latents while denoising.

After every denoising step, latents of the known region become those of the image at the noise level
that the step has reached; pixels of it are put back at the end.

Source: diffusers' FluxInpaintPipeline, which does the same between its steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class KnownRegion:
    """The parts of n images that stay.

    Attributes:
        pixels: uint8 [n, H, W, 3], the images.
        in_pixels: [n, H, W], the pixels that stay.
        latents: [n, S, C], of the images, without noise.
        in_latents: [n, S], the latents that stay.
    """

    pixels: NDArray[np.uint8]
    in_pixels: NDArray[np.bool_]
    latents: NDArray[np.float32]
    in_latents: NDArray[np.bool_]

    def blended(
        self, latents: NDArray[np.float32], noise: NDArray[np.float32], level: float
    ) -> NDArray[np.float32]:
        """Return latents [n, S, C], with the image's in the known region.

        Args:
            noise: [n, S, C], that the run began with.
            level: the noise level of `latents`, 0 to 1.
        """
        sigma = np.float32(level)
        known = (np.float32(1) - sigma) * self.latents + sigma * noise
        return np.where(self.in_latents[:, :, None], known, latents)

    def put_back(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return images [n, H, W, 3], with the pixels that stay."""
        return np.where(self.in_pixels[:, :, :, None], self.pixels, images)

    def repeated(self, images: int) -> KnownRegion:
        """Return that of one image for each of several."""
        return joined([self] * images)


def joined(regions: Sequence[KnownRegion]) -> KnownRegion:
    """Return one for the images of several."""
    return KnownRegion(
        np.concatenate([one.pixels for one in regions]),
        np.concatenate([one.in_pixels for one in regions]),
        np.concatenate([one.latents for one in regions]),
        np.concatenate([one.in_latents for one in regions]),
    )
