"""What a run does not do although its arguments ask for it: prompts that are cut, arguments without
effect. `Generator` logs it, and `Result`, the command line and the server repeat the same words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import image_latents, schedules
from bifrost_rt.manifest import EngineSpec, SetSpec
from bifrost_rt.request import Request

_READERS = {
    "mllm": "the MLLM reads {limit} of {tokens} tokens (chat template included); what follows does "
    "not shape the CLIP latents",
    "clip": "CLIP reads {limit} of {tokens} tokens; this is usual with FLUX, where T5 reads long "
    "prompts",
    "t5": "T5 reads {limit} of {tokens} tokens; what follows does not reach FLUX",
}


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line about a run.

    Attributes:
        text: what it says.
        prompt, image: the place of the prompt or image that it is about; None: of no single one.
    """

    text: str
    prompt: int | None = None
    image: int | None = None

    def __str__(self) -> str:
        if self.prompt is not None:
            return f"prompt {self.prompt}: {self.text}"
        return self.text if self.image is None else f"image {self.image}: {self.text}"


@dataclass(frozen=True, kw_only=True)
class Truncation(Note):
    """A prompt that is longer than a text model reads.

    Attributes:
        encoder: "mllm", "clip" or "t5".
        tokens: what the whole prompt has, with template and special tokens.
        limit: how many of them are read.
    """

    encoder: str
    tokens: int
    limit: int


def truncation(prompt: int, encoder: str, tokens: int, limit: int) -> Truncation:
    """Return the note on a prompt of `tokens` tokens of which `limit` are read."""
    text = f"truncated: {_READERS[encoder].format(limit=limit, tokens=tokens)}"
    return Truncation(text=text, prompt=prompt, encoder=encoder, tokens=tokens, limit=limit)


def without_effect(manifest: SetSpec, request: Request) -> Iterator[Note]:
    """Arguments that differ from their defaults and change nothing in this run."""
    options = request.parameters
    guidance = options.guidance_scale
    if guidance != manifest.defaults.guidance_scale and not manifest.model.guidance_embeds:
        yield Note(
            text=f"guidance_scale={guidance} has no effect: this model has no guidance embedding"
        )
    composed = "compose" in request.pixels
    if request.masked is not None and not request.masked.any() and not composed:
        yield Note(text="mask has no effect: it touches no visual token, and nothing is drawn anew")
    edited = "image" in request.pixels and request.masked is not None and request.known is None
    if edited and not image_latents.can_keep(manifest):
        yield Note(
            text="pixels outside the mask are drawn again, too: the set has no engine "
            f"`{image_latents.NAME}` to keep them with; rebuild it"
        )
    interval, steps = options.cache_interval, options.num_inference_steps
    if interval > 1 and all(schedules.computed_steps(steps, interval)):
        yield Note(
            text=f"cache_interval={interval} has no effect: with num_inference_steps={steps} none "
            "is skipped"
        )


def cut_thoughts(request: Request) -> Iterator[Note]:
    """Yield a note on every thought that the limit of tokens ended."""
    for thought in request.thoughts:
        if not thought.whole:
            place = request.prompts.index(thought.text)
            text = "thought ended at as many tokens as the MLLM reads of a prompt"
            yield Note(text=text, prompt=place)


def of_part(
    found: Iterable[Note], whole: Request, part: Request, images: slice
) -> tuple[Note, ...]:
    """Return the notes on one of the requests that `request.merge` put together, with its own
    places.

    Args:
        images: where the part's images stand in the whole.
    """
    kept = []
    for note in found:
        if note.prompt is not None:
            text = whole.prompts[note.prompt]
            if text in part.prompts:
                kept.append(dataclasses.replace(note, prompt=part.prompts.index(text)))
        elif note.image is not None:
            if images.start <= note.image < images.stop:
                kept.append(dataclasses.replace(note, image=note.image - images.start))
        else:
            kept.append(note)
    return tuple(kept)


def one_value(images: NDArray[np.uint8], engine: EngineSpec) -> Iterator[Note]:
    """Images [n, H, W, 3] whose values are all the same: the pixels of NaN look like that, and
    uint8 does not tell them from an image.

    Args:
        engine: that made them.
    """
    for i, image in enumerate(images):
        if image.min() == image.max():
            text = (
                f"every pixel is {image.flat[0]}; if this is no plain image, then "
                f"`{engine.name}`, which computes in {engine.precision.compute}, has overflowed"
            )
            yield Note(text=text, image=i)
