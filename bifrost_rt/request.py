"""A generation request, checked before anything runs."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bifrost_rt import schedules
from bifrost_rt.dims import IMAGES
from bifrost_rt.errors import RequestError, RequestTypeError
from bifrost_rt.manifest import Manifest

_LARGEST = float(np.finfo(np.float32).max)

# Nobody's memory holds more at the size of a real model: it would be refused by the memory budget,
# which not every device states, and after minutes of drawing noise.
MOST_IMAGES = 4096
# Beyond it no step changes anything, and its schedule alone takes seconds.
MOST_STEPS = 10_000

OutputType = Literal["pil", "np", "latent"]


@dataclass(frozen=True)
class Request:
    """What one run computes. n images; image i is of prompt `prompt_index[i]`.

    Order and noise that were not given are drawn from the seed when they are first asked for, so
    that a run that cannot be served is refused before.
    """

    prompts: tuple[str, ...]
    prompt_index: NDArray[np.int64]  # [n]
    seed: int
    num_inference_steps: int
    guidance_scale: float
    controlnet_conditioning_scale: float
    decoding_steps: int
    cfg_weight: float
    given_order: NDArray[np.int64] | None  # [n, N]
    given_latents: NDArray[np.float32] | None  # [n, S, C]
    num_visual_tokens: int  # N
    latent_shape: tuple[int, int]  # S, C
    output_type: OutputType
    tokens: NDArray[np.float32] | None  # [n, N, D] instead of the MLLM's
    cache_interval: int = 1

    @property
    def images(self) -> int:
        """How many images."""
        return len(self.prompt_index)

    @functools.cached_property
    def order(self) -> NDArray[np.int64]:
        """Per image the order of its places, [n, N]; the last are revealed first."""
        if self.given_order is not None:
            return self.given_order
        return schedules.random_orders(self.seed, self.images, self.num_visual_tokens)

    @functools.cached_property
    def latents(self) -> NDArray[np.float32]:
        """The starting noise, [n, S, C]."""
        if self.given_latents is not None:
            return self.given_latents
        return schedules.random_latents(self.seed, self.images, self.latent_shape)

    @property
    def settings(self) -> tuple[object, ...]:
        """What all images of one run share; requests that agree in it can be merged."""
        return (
            *(self.num_inference_steps, self.decoding_steps, self.output_type),
            self.cache_interval,
            *(self.guidance_scale, self.cfg_weight, self.controlnet_conditioning_scale),
            self.tokens is None,
        )


def merge(requests: Sequence[Request]) -> Request:
    """One request for the images of several with the same settings, in their order. Every image
    keeps its reveal order and noise, and so its picture."""
    first, *others = requests
    assert all(other.settings == first.settings for other in others)
    if not others:
        return first
    prompts = tuple(dict.fromkeys(text for one in requests for text in one.prompts))
    index = {text: i for i, text in enumerate(prompts)}
    places = [index[one.prompts[i]] for one in requests for i in one.prompt_index]
    tokens = [one.tokens for one in requests if one.tokens is not None]
    return dataclasses.replace(
        first,
        prompts=prompts,
        prompt_index=np.array(places, np.int64),
        given_order=np.concatenate([one.order for one in requests]),
        given_latents=np.concatenate([one.latents for one in requests]),
        tokens=np.concatenate(tokens) if tokens else None,
    )


def check(
    manifest: Manifest,
    *,
    prompt: str | Sequence[str],
    seed: int | None = None,
    num_images_per_prompt: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    controlnet_conditioning_scale: float | None = None,
    decoding_steps: int | None = None,
    cfg_weight: float | None = None,
    height: int | None = None,
    width: int | None = None,
    order: ArrayLike | None = None,
    latents: ArrayLike | None = None,
    output_type: str = "pil",
    tokens: ArrayLike | None = None,
    cache_interval: int | None = None,
) -> Request:
    """Fill in the set's defaults and refuse what cannot be served.

    Raises:
        RequestError, RequestTypeError: naming the argument, what it must be and what was given.
    """
    model, defaults = manifest.model, manifest.defaults
    asked = _prompts(prompt)
    prompts = tuple(dict.fromkeys(asked))
    index = {text: i for i, text in enumerate(prompts)}
    per_prompt = _count("num_images_per_prompt", num_images_per_prompt)
    n = _images(manifest, len(asked), per_prompt)
    prompt_index = np.repeat([index[text] for text in asked], per_prompt).astype(np.int64)
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
    seed = secrets.randbits(32) if seed is None else _count("seed", seed, least=0)
    shape = (model.num_image_tokens, model.latent_channels)
    return Request(
        prompts=prompts,
        prompt_index=prompt_index,
        seed=seed,
        num_inference_steps=_count(
            "num_inference_steps",
            num_inference_steps,
            defaults.num_inference_steps,
            most=MOST_STEPS,
        ),
        guidance_scale=_number("guidance_scale", guidance_scale, defaults.guidance_scale),
        controlnet_conditioning_scale=_number(
            "controlnet_conditioning_scale",
            controlnet_conditioning_scale,
            defaults.controlnet_conditioning_scale,
        ),
        decoding_steps=_count(
            "decoding_steps", decoding_steps, defaults.decoding_steps, most=MOST_STEPS
        ),
        cfg_weight=_number("cfg_weight", cfg_weight, defaults.cfg_weight),
        given_order=None if order is None else _order(order, (n, model.num_visual_tokens)),
        given_latents=None if latents is None else _latents(latents, (n, *shape), manifest),
        num_visual_tokens=model.num_visual_tokens,
        latent_shape=shape,
        output_type=output_type,  # type: ignore[arg-type]
        tokens=None
        if tokens is None
        else _floats("tokens", tokens, (n, model.num_visual_tokens, model.hidden_size)),
        cache_interval=_count("cache_interval", cache_interval, 1),
    )


def parameters(checked: Request, prompt: str | Sequence[str], per_prompt: int) -> dict[str, Any]:
    """The arguments of `Generator.run` that make these images again, defaults filled in."""
    return {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "seed": checked.seed,
        "num_images_per_prompt": per_prompt,
        "num_inference_steps": checked.num_inference_steps,
        "guidance_scale": checked.guidance_scale,
        "controlnet_conditioning_scale": checked.controlnet_conditioning_scale,
        "decoding_steps": checked.decoding_steps,
        "cfg_weight": checked.cfg_weight,
        "cache_interval": checked.cache_interval,
    }


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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"prompt[{i}] is not valid Unicode: {error.reason} at character {error.start}"
            ) from None
    return list(asked)


def _images(manifest: Manifest, prompts: int, per_prompt: int) -> int:
    """How many images are asked for, if a run of the set can have so many."""
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


def _asked(prompts: int, per_prompt: int, n: int) -> str:
    if per_prompt == 1:
        return f"prompt has {n} texts, for {n} images"
    if prompts == 1:
        return f"num_images_per_prompt={per_prompt}"
    return f"{prompts} prompts with num_images_per_prompt={per_prompt} are {n} images"


def _count(
    name: str, value: Any, default: int | None = None, least: int = 1, most: int | None = None
) -> int:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RequestTypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise RequestError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise RequestError(f"{name} must be at most {most}, got {value}")
    return int(value)


def _number(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise RequestTypeError(f"{name} must be a number, got {value!r}")
    if not -_LARGEST <= value <= _LARGEST:  # nor is NaN
        raise RequestError(f"{name} must be finite in float32, got {value}")
    return float(value)


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
    latents: ArrayLike, shape: tuple[int, int, int], manifest: Manifest
) -> NDArray[np.float32]:
    model = manifest.model
    return _floats(
        "latents",
        latents,
        shape,
        hint=f"the set {manifest.name!r} takes packed noise (images, image tokens, channels) for "
        f"{model.image_width}x{model.image_height}; another size needs another set",
    )


def _floats(
    name: str, given: ArrayLike, shape: tuple[int, ...], hint: str | None = None
) -> NDArray[np.float32]:
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
