"""A generation request, checked before anything runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bifrost_rt import known_region, latents_file, schedules, unicode
from bifrost_rt.dims import IMAGES
from bifrost_rt.errors import RequestError, RequestTypeError
from bifrost_rt.known_region import KnownRegion
from bifrost_rt.manifest import SetSpec
from bifrost_rt.params import Options, Parameters

# Nobody's memory holds more at the size of a real model: it would be refused by the memory budget,
# which not every device states, and after minutes of drawing noise.
MOST_IMAGES = 4096

OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class Thought:
    """What the MLLM said of a prompt before it drew.

    Attributes:
        prompt: what was asked for.
        instruction: that the MLLM answered.
        text: its answer, which is drawn in the place of the prompt.
        whole: whether the MLLM ended it; otherwise the limit of tokens did.
    """

    prompt: str
    instruction: str
    text: str
    whole: bool = True


@dataclass(frozen=True)
class Request:
    """What one run computes: n images, prompt by prompt.

    Order and noise that were not given are drawn from the seed when they are first asked for, so
    that a run that cannot be served is refused before.
    """

    parameters: Parameters
    given_order: NDArray[np.int64] | None  # [n, N]
    given_latents: NDArray[np.float32] | None  # [n, S, C]
    num_visual_tokens: int  # N
    latent_shape: tuple[int, int]  # S, C
    output_type: OutputType
    tokens: NDArray[np.float32] | None  # [n, N, D] instead of the MLLM's
    masked: NDArray[np.bool_] | None = None  # [n, N], of `tokens` those that the MLLM predicts anew
    known: KnownRegion | None = None  # of the images that are drawn anew in part
    # Where parts of an image have prompts of their own: under which a position is predicted, 0 for
    # the image's, i for `region_prompts[i - 1]`.
    regions: NDArray[np.int64] | None = None  # [n, N]
    region_prompts: tuple[str, ...] = ()
    # Of what was passed in as images: "image" or "mask" -> sha256 of its pixels.
    pixels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    think: str | None = None  # the instruction, where the MLLM is yet to think of the prompts
    thoughts: tuple[Thought, ...] = ()  # where it did, one for each of the parameters' prompts

    @functools.cached_property
    def prompts(self) -> tuple[str, ...]:
        """The different prompts."""
        return tuple(dict.fromkeys(self.parameters.prompts))

    @functools.cached_property
    def prompt_index(self) -> NDArray[np.int64]:
        """Which of `prompts` each image is of, [n]."""
        index = {text: i for i, text in enumerate(self.prompts)}
        rows = np.array([index[text] for text in self.parameters.prompts], np.int64)
        return np.repeat(rows, self.parameters.num_images_per_prompt)

    @property
    def images(self) -> int:
        """How many images."""
        return len(self.parameters.prompts) * self.parameters.num_images_per_prompt

    @functools.cached_property
    def order(self) -> NDArray[np.int64]:
        """Per image the order of its places, [n, N]; the last are revealed first."""
        if self.given_order is not None:
            return self.given_order
        return schedules.random_orders(self.parameters.seed, self.images, self.num_visual_tokens)

    @functools.cached_property
    def latents(self) -> NDArray[np.float32]:
        """The starting noise, [n, S, C]."""
        if self.given_latents is not None:
            return self.given_latents
        return schedules.random_latents(self.parameters.seed, self.images, self.latent_shape)

    @property
    def settings(self) -> tuple[object, ...]:
        """What all images of one run share; requests that agree in it can be merged."""
        return (
            self.parameters.shared,
            self.output_type,
            self.tokens is None,
            self.masked is None,
            self.known is None,
            None if self.regions is None else id(self),  # is drawn by itself
            self.think,
        )

    @functools.cached_property
    def decoding(self) -> Request:
        """The request of the MLLM's part: a row for each image, or one for each prompt that an
        image has, first its own."""
        if self.regions is None:
            return self
        rows = 1 + len(self.region_prompts)
        of_images = (self.prompts[i] for i in self.prompt_index)
        prompts = tuple(one for own in of_images for one in (own, *self.region_prompts))
        assert self.tokens is not None
        assert self.masked is not None
        return dataclasses.replace(
            self,
            parameters=dataclasses.replace(
                self.parameters, prompt=prompts, num_images_per_prompt=1
            ),
            given_order=np.repeat(self.order, rows, axis=0),
            tokens=np.repeat(self.tokens, rows, axis=0),
            masked=np.repeat(self.masked, rows, axis=0),
            regions=None,
        )

    def thought(self, thoughts: Mapping[str, Thought]) -> Request:
        """Return the request that draws what the MLLM thought of each prompt.

        Args:
            thoughts: by prompt; empty: the request as it is.
        """
        if not thoughts:
            return self
        found = tuple(thoughts[prompt] for prompt in self.parameters.prompts)
        alone = isinstance(self.parameters.prompt, str)
        prompt = found[0].text if alone else tuple(one.text for one in found)
        parameters = dataclasses.replace(self.parameters, prompt=prompt)
        return dataclasses.replace(self, parameters=parameters, think=None, thoughts=found)

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments of `Generator.run` that make these images again. Of those that are
        arrays or images, `injected` has the sha256 of the values."""
        given = {
            "order": self.given_order,
            "latents": self.given_latents,
            "tokens": None if {"image", "compose"} & self.pixels.keys() else self.tokens,
        }
        hashes = {name: latents_file.digest(one) for name, one in given.items() if one is not None}
        injected = {**hashes, **self.pixels}
        parameters = self.parameters.as_dict()
        return {**parameters, "injected": injected} if injected else parameters

    @property
    def decodes(self) -> bool:
        """Whether the MLLM predicts tokens."""
        return self.tokens is None or (self.masked is not None and bool(self.masked.any()))


def merge(requests: Sequence[Request]) -> Request:
    """One request for the images of several with the same settings, in their order. Every image
    keeps its reveal order and noise, and so its image."""
    first, *others = requests
    assert all(other.settings == first.settings for other in others)
    if not others:
        return first
    prompts = tuple(one.prompts[i] for one in requests for i in one.prompt_index)
    tokens = [one.tokens for one in requests if one.tokens is not None]
    masked = [one.masked for one in requests if one.masked is not None]
    known = [one.known for one in requests if one.known is not None]
    return dataclasses.replace(
        first,
        parameters=dataclasses.replace(first.parameters, prompt=prompts, num_images_per_prompt=1),
        given_order=np.concatenate([one.order for one in requests]),
        given_latents=np.concatenate([one.latents for one in requests]),
        tokens=np.concatenate(tokens) if tokens else None,
        masked=np.concatenate(masked) if masked else None,
        known=known_region.joined(known) if known else None,
    )


def check(
    manifest: SetSpec,
    *,
    prompt: str | Sequence[str],
    height: int | None = None,
    width: int | None = None,
    order: ArrayLike | None = None,
    latents: ArrayLike | None = None,
    output_type: str = "pil",
    tokens: ArrayLike | None = None,
    masked: NDArray[np.bool_] | None = None,
    regions: NDArray[np.int64] | None = None,
    region_prompts: tuple[str, ...] = (),
    think: str | None = None,
    **options: Unpack[Options],
) -> Request:
    """Fill in the set's defaults and refuse what cannot be served.

    Args:
        masked: [N], the places of `tokens` that are predicted anew. None: no place is.
        regions, region_prompts: [N], under which prompt each is predicted; see `Request`.
        think: the instruction that the MLLM answers before it draws; see `thinking.instruction`.

    Raises:
        RequestError, RequestTypeError: naming the argument, what it must be and what was given.
    """
    model = manifest.model
    asked = _prompts(prompt)
    parameters = Parameters.fill(
        prompt if isinstance(prompt, str) else tuple(asked), options, manifest.defaults
    )
    if parameters.extend and masked is None:
        raise RequestError("extend draws a canvas around an image; pass one as image")
    n = _images(manifest, len(asked), parameters.num_images_per_prompt)
    _check_rows(manifest, n, len(region_prompts))
    for name, given, built in (
        ("height", height, model.image_height),
        ("width", width, model.image_width),
    ):
        if given is not None and given != built:
            raise RequestError(
                f"{name}={given}: the set {manifest.name!r} was built for "
                f"{model.image_width}x{model.image_height} (width x height)",
                hint="the size follows from the model's visual tokens; leave height and width out",
            )
    if output_type not in ("pil", "np", "latent"):
        raise RequestError(f"output_type must be 'pil', 'np' or 'latent', got {output_type!r}")
    shape = (model.num_image_tokens, model.latent_channels)
    return Request(
        parameters=parameters,
        given_order=None if order is None else _order(order, (n, model.num_visual_tokens)),
        given_latents=None if latents is None else _latents(latents, (n, *shape), manifest),
        num_visual_tokens=model.num_visual_tokens,
        latent_shape=shape,
        output_type=output_type,  # type: ignore[arg-type]
        tokens=None
        if tokens is None
        else floats("tokens", tokens, (n, model.num_visual_tokens, model.hidden_size)),
        masked=None if masked is None else np.tile(masked, (n, 1)),
        regions=None if not region_prompts or regions is None else np.tile(regions, (n, 1)),
        region_prompts=region_prompts,
        think=think,
    )


def _prompts(prompt: Any) -> list[str]:
    asked = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(asked, (bytes, dict)) or not isinstance(asked, Sequence):
        raise RequestTypeError(
            f"prompt must be a text or a list of texts, got {type(prompt).__name__}"
        )
    if not asked:
        raise RequestError("prompt is an empty list", hint="pass at least one text")
    for i, text in enumerate(asked):
        if not isinstance(text, str):
            raise RequestTypeError(
                f"prompt[{i}] must be a text, got {type(text).__name__} {text!r}"
            )
        unicode.check(f"prompt[{i}]", text)
    return list(asked)


def _images(manifest: SetSpec, prompts: int, per_prompt: int) -> int:
    """Say how many images are asked for, if a run of the set can have so many."""
    n = prompts * per_prompt
    bounds = manifest.dimensions.get(IMAGES)
    if bounds is not None and bounds.max is not None and n > bounds.max:
        raise RequestError(
            f"{_asked(prompts, per_prompt, n)}: the set {manifest.name!r} was built for at most "
            f"{bounds.max} in one run",
            hint=f"draw fewer at a time, or rebuild the set with --max-images {n}"
            if n <= MOST_IMAGES
            else "draw fewer at a time",
        )
    if n > MOST_IMAGES:
        raise RequestError(
            f"{_asked(prompts, per_prompt, n)}: one run draws at most {MOST_IMAGES}",
            hint="draw fewer at a time, with a seed of its own each time",
        )
    return n


def _check_rows(manifest: SetSpec, images: int, region_prompts: int) -> None:
    """Refuse more prompts of regions than the MLLM decodes in one run."""
    rows, bounds = images * (1 + region_prompts), manifest.dimensions.get(IMAGES)
    if region_prompts and bounds is not None and bounds.max is not None and rows > bounds.max:
        raise RequestError(
            f"compose: {images} images and {region_prompts} prompts of parts are decoded as {rows} "
            f"rows; the set {manifest.name!r} was built for at most {bounds.max} in one run",
            hint=f"draw fewer at a time, or rebuild the set with --max-images {rows}",
        )


def _asked(prompts: int, per_prompt: int, n: int) -> str:
    if per_prompt == 1:
        return f"prompt has {n} texts, for {n} images"
    if prompts == 1:
        return f"num_images_per_prompt={per_prompt}"
    return f"{prompts} prompts with num_images_per_prompt={per_prompt} are {n} images"


def _order(order: ArrayLike, shape: tuple[int, int]) -> NDArray[np.int64]:
    array = _array("order", order)
    if not np.issubdtype(array.dtype, np.integer):
        raise RequestTypeError(f"order must hold whole numbers, got {array.dtype}")
    if array.shape != shape:
        raise RequestError(f"order must have the shape {list(shape)}, got {list(array.shape)}")
    if not np.array_equal(np.sort(array, axis=1), np.broadcast_to(np.arange(shape[1]), shape)):
        raise RequestError(f"every row of order must be a permutation of 0..{shape[1] - 1}")
    return array.astype(np.int64)


def _latents(
    latents: ArrayLike, shape: tuple[int, int, int], manifest: SetSpec
) -> NDArray[np.float32]:
    model = manifest.model
    return floats(
        "latents",
        latents,
        shape,
        hint=f"the set {manifest.name!r} takes packed noise (images, image tokens, channels) for "
        f"{model.image_width}x{model.image_height}; another size needs another set",
    )


def floats(
    name: str, given: ArrayLike, shape: tuple[int, ...], hint: str | None = None
) -> NDArray[np.float32]:
    """Return an array of this shape in float32.

    Raises:
        RequestError, RequestTypeError: it is of another shape or type, or not finite.
    """
    array = _array(name, given)
    if not np.issubdtype(array.dtype, np.floating):
        raise RequestTypeError(f"{name} must be floating point, got {array.dtype}")
    if array.shape != shape:
        raise RequestError(
            f"{name} must have the shape {list(shape)}, got {list(array.shape)}", hint=hint
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise RequestError(f"{name} hold a value that is not finite in float32")
    return array


def _array(name: str, given: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(given)
    except (TypeError, ValueError) as error:  # rows of different lengths, a tensor of a GPU
        raise RequestTypeError(f"{name} cannot be read as an array: {error}") from None
