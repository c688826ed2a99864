"""A run in which every engine of a set takes part: it draws, reads what it has drawn, and says
something about it."""

from __future__ import annotations

from PIL import Image

from bifrost_rt import chat, image_latents, image_processor, pipeline, vision
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.engines import Engines
from bifrost_rt.generator import QUESTION
from bifrost_rt.manifest import SetSpec
from bifrost_rt.messages import Turn
from bifrost_rt.pipeline import Output
from bifrost_rt.request import Request
from bifrost_rt.tokenizers import Tokenizers

# Of the answer: one behind the prompt, and one in a step of its own.
TOKENS = 2


def draw_look_answer(
    engines: Engines, tokenizers: Tokenizers, manifest: SetSpec, request: Request
) -> Output:
    """Draw a checked request, encode each image where the set reads images or their pixels, and
    answer a question about the first where it holds conversations.

    Raises:
        NumericsError: what an engine has left is not finite.
    """
    out = pipeline.generate(engines, tokenizers, manifest, request)
    if out.images is None:
        return out
    if image_latents.can_keep(manifest):
        image_latents.encode(engines, manifest, out.images, out.timings)
    if manifest.vision is None:
        return out
    images = [Image.fromarray(image) for image in out.images]
    for image in images if manifest.chat is None else images[1:]:
        seen = image_processor.patches(image, manifest.vision)
        vision.encode(engines, manifest, seen, out.timings)
    if manifest.chat is not None:  # who answers looks at the first
        asked = ChatParameters.fill({"max_new_tokens": TOKENS, "seed": 0})
        turn = Turn("user", (images[0], QUESTION))
        speaker = chat.Speaker(engines, tokenizers, manifest)
        speaker.answer([turn], asked, lambda piece: None)
    return out
