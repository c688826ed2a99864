"""A run in which every engine of a set takes part: it draws, and looks at what it has drawn."""

from __future__ import annotations

from PIL import Image

from bifrost_rt import image_processor, pipeline, vision
from bifrost_rt.engines import Engines
from bifrost_rt.manifest import SetSpec
from bifrost_rt.pipeline import Output
from bifrost_rt.request import Request
from bifrost_rt.text import Tokenizers


def draw_and_look(
    engines: Engines, tokenizers: Tokenizers, manifest: SetSpec, request: Request
) -> Output:
    """Draw a checked request, and encode each image where the set reads images.

    Raises:
        NumericsError: what an engine has left is not finite.
    """
    out = pipeline.generate(engines, tokenizers, manifest, request)
    if manifest.vision is not None and out.images is not None:
        for image in out.images:
            seen = image_processor.patches(Image.fromarray(image), manifest.vision)
            vision.encode(engines, manifest, seen, out.timings)
    return out
