"""The options of a run. Each is declared once, as a field of `Parameters`.

`Generator.run`, the command line, the HTTP API, the metadata of PNGs, batching and the documents
read the declarations. To add an option, follow `docs/guides/add-an-option.md`.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import re
import secrets
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypedDict, TypeVar

import numpy as np

from bifrost_rt.errors import RequestError, RequestTypeError
from bifrost_rt.manifest import Defaults
from bifrost_rt.serialization import nearest

LARGEST = float(np.finfo(np.float32).max)
# Beyond it no step changes anything, and its schedule alone takes seconds.
MOST_STEPS = 10_000
MOST_EXTENDED = 2.0  # a fifth of the canvas is left to the image


@dataclass(frozen=True)
class Integer:
    """A whole number.

    Attributes:
        least, most: the bounds; `most=None` sets none.
        below_in_json: the exclusive upper bound that the HTTP API states; None states none.
    """

    least: int = 1
    most: int | None = None
    below_in_json: int | None = None

    python_type: ClassVar[type] = int
    metavar: ClassVar[str] = "N"

    def check(self, name: str, value: Any) -> int:
        """Return the value as an int.

        Raises:
            RequestError, RequestTypeError: naming the option, what it must be and what was given.
        """
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise RequestTypeError(f"{name} must be a whole number, got {value!r}")
        if value < self.least:
            raise RequestError(f"{name} must be at least {self.least}, got {value}")
        if self.most is not None and value > self.most:
            raise RequestError(f"{name} must be at most {self.most}, got {value}")
        return int(value)


@dataclass(frozen=True)
class Float:
    """A number that is finite in float32.

    Attributes:
        least, most: the bounds.
    """

    least: float = -LARGEST
    most: float = LARGEST

    python_type: ClassVar[type] = float
    metavar: ClassVar[str] = "X"

    def check(self, name: str, value: Any) -> float:
        """Return the value as a float.

        Raises:
            RequestError, RequestTypeError: naming the option, what it must be and what was given.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise RequestTypeError(f"{name} must be a number, got {value!r}")
        if not -LARGEST <= value <= LARGEST:  # nor is NaN
            raise RequestError(f"{name} must be finite in float32, got {value}")
        if not self.least <= value <= self.most:
            raise RequestError(f"{name} must be {self.least:g} to {self.most:g}, got {value}")
        return float(value)


@dataclass(frozen=True)
class Boolean:
    """Yes or no."""

    python_type: ClassVar[type] = bool
    metavar: ClassVar[None] = None

    def check(self, name: str, value: Any) -> bool:
        """Return the value as a bool.

        Raises:
            RequestTypeError: naming the option, what it must be and what was given.
        """
        if not isinstance(value, (bool, np.bool_)):
            raise RequestTypeError(f"{name} must be true or false, got {value!r}")
        return bool(value)


class Default(enum.Enum):
    """Where the value comes from when an option is not given, if not from a constant."""

    SET = "the field of the same name in `manifest.Defaults`"
    RANDOM = "32 random bits"
    IMAGE = "whether a part of an image is drawn anew"


@dataclass(frozen=True, kw_only=True)
class Option:
    """Everything about an option, except what the code that uses it does with the value.

    Attributes:
        values: what it takes.
        default: a constant, or where the value comes from.
        help: one line for the command line and the HTTP API; they add a constant default.
        doc: what `help(Generator.run)` says; empty: the same as `help`.
        flags: more names on the command line, beside the option's own.
        api_name: the HTTP field where OpenAI has another name for it; empty: the option's own.
        per_request: requests that differ in it may be drawn in one run. In all other options the
            requests of one run must agree.
        mllm_only: it shapes the CLIP latents and nothing else, so it does nothing where these are
            passed in.
        name: the field's; `options` fills it in.
    """

    values: Integer | Float | Boolean
    default: Default | int | float
    help: str
    doc: str = ""
    flags: tuple[str, ...] = ()
    api_name: str = ""
    per_request: bool = False
    mllm_only: bool = False
    name: str = ""

    def fill(self, given: Any, defaults: Defaults) -> Any:
        """Return the checked value, or the default for None.

        Raises:
            RequestError, RequestTypeError: naming the option, what it must be and what was given.
        """
        if given is not None:
            return self.values.check(self.name, given)
        if self.default is Default.SET:
            return getattr(defaults, self.name)
        if self.default is Default.RANDOM:
            return secrets.randbits(32)
        if self.default is Default.IMAGE:  # `Generator` says so where there is one
            return False
        return self.default


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What makes the images of a run again: its arguments that are plain values, checked, with the
    defaults filled in. Arrays, callbacks and the form of the result are not among them.

    Attributes:
        prompt: as it was given, but a list as a tuple.
    """

    prompt: str | tuple[str, ...]
    seed: Annotated[
        int,
        Option(
            values=Integer(least=0, below_in_json=2**63),
            default=Default.RANDOM,
            help="of reveal order and noise",
            doc="of the reveal order and the starting noise. The same seed gives the same bits, "
            "and image i does not depend on how many are drawn. None draws one; see "
            "`Result.seed`.",
            per_request=True,
        ),
    ]
    num_images_per_prompt: Annotated[
        int,
        Option(
            values=Integer(),
            default=1,
            help="images",
            doc="images for each prompt.",
            flags=("-n",),
            api_name="n",
            per_request=True,
        ),
    ]
    num_inference_steps: Annotated[
        int,
        Option(
            values=Integer(most=MOST_STEPS),
            default=Default.SET,
            help="denoising steps",
            flags=("--steps",),
        ),
    ]
    decoding_steps: Annotated[
        int,
        Option(
            values=Integer(most=MOST_STEPS),
            default=Default.SET,
            help="masked decoding steps",
            doc="steps in which the MLLM reveals its N visual tokens, from 1 to beyond N.",
            mllm_only=True,
        ),
    ]
    guidance_scale: Annotated[
        float,
        Option(
            values=Float(),
            default=Default.SET,
            help="embedded guidance",
            doc="embedded guidance; without effect (and said so) where neither network of the "
            "model has a guidance embedding.",
        ),
    ]
    cfg_weight: Annotated[
        float,
        Option(
            values=Float(),
            default=Default.SET,
            help="guidance of the MLLM",
            doc="classifier-free guidance of the MLLM. 1 is off and costs nothing.",
            mllm_only=True,
        ),
    ]
    cache_interval: Annotated[
        int,
        Option(
            values=Integer(),
            default=1,
            help="compute every N-th denoising step",
            doc="compute every so many denoising steps and extrapolate the others. 1 is off; "
            "above, images are another: `python -m benchmarks.options` says by how much.",
        ),
    ]
    controlnet_conditioning_scale: Annotated[
        float,
        Option(
            values=Float(),
            default=Default.SET,
            help="weight of the latents",
            doc="how strongly the CLIP latents steer the image.",
        ),
    ]
    extend: Annotated[
        float,
        Option(
            values=Float(0.0, MOST_EXTENDED),
            default=0.0,
            help="draw a canvas around `image`, so wide on every side: 0.5 is half of it",
            doc="draw a canvas around `image` under the prompt, on every side this share of the "
            "image's own: 0.5 doubles what is seen. The image becomes so much smaller.",
            per_request=True,
        ),
    ]
    keep_pixels: Annotated[
        bool,
        Option(
            values=Boolean(),
            default=Default.IMAGE,
            help="keep an image's pixels outside its mask (on where there is one)",
            doc="keep the pixels of `image` that `mask` does not touch, or that `extend` puts a "
            "canvas around: they are put back at the end, and their latents take part in every "
            "denoising step, so that what is drawn fits to them. On where a part of an image is "
            "drawn anew; off, the whole image is drawn from its tokens.",
            per_request=True,
        ),
    ]

    @classmethod
    def fill(
        cls, prompt: str | tuple[str, ...], given: Mapping[str, Any], defaults: Defaults
    ) -> Self:
        """Check the options that were given, and fill in the others.

        Args:
            prompt: checked.
            given: options by name; None stands for the default.

        Raises:
            RequestError, RequestTypeError: naming the option, what it must be and what was given.
        """
        declared = options(cls)
        for name in given:
            if name not in declared:
                raise RequestTypeError(
                    f"unexpected keyword argument {name!r}{nearest(name, declared)}"
                )
        filled = {name: option.fill(given.get(name), defaults) for name, option in declared.items()}
        return cls(prompt=prompt, **filled)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt, or all of them."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    @functools.cached_property
    def shared(self) -> dict[str, Any]:
        """The options in which the requests of one run must agree."""
        declared = options(type(self))
        return {name: getattr(self, name) for name, o in declared.items() if not o.per_request}

    def as_dict(self) -> dict[str, Any]:
        """Return them as arguments of `Generator.run`, of types that JSON has."""
        prompt = self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        return {**dataclasses.asdict(self), "prompt": prompt}


class Options(TypedDict, total=False):
    """The options as `Generator.run` takes them, for type checkers and editors: those of
    `Parameters` (a test compares them), where None stands for the default."""

    seed: int | None
    num_images_per_prompt: int | None
    num_inference_steps: int | None
    decoding_steps: int | None
    guidance_scale: float | None
    cfg_weight: float | None
    cache_interval: int | None
    controlnet_conditioning_scale: float | None
    extend: float | None
    keep_pixels: bool | None


def options(parameters: type[Parameters]) -> Mapping[str, Option]:
    """Return the options that a class of parameters declares, by name, in their order."""
    hints = typing.get_type_hints(parameters, include_extras=True)
    return {
        name: dataclasses.replace(option, name=name, api_name=option.api_name or name)
        for name, hint in hints.items()
        for option in getattr(hint, "__metadata__", ())
        if isinstance(option, Option)
    }


OPTIONS = options(Parameters)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def names_options(function: _Function) -> _Function:
    """Have `help` and `inspect.signature` name each option of a method that takes
    `**options: Unpack[Options]`. The line `{options}` of its docstring becomes what they do."""
    signature = inspect.signature(function)
    hints = typing.get_type_hints(Parameters)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    *named, _ = signature.parameters.values()  # the last is `**options`
    first = [parameter for parameter in named if parameter.kind is not keyword_only]
    first += [
        inspect.Parameter(name, keyword_only, default=None, annotation=hints[name] | None)
        for name in OPTIONS
    ]
    others = [parameter for parameter in named if parameter.kind is keyword_only]
    vars(function)["__signature__"] = signature.replace(parameters=[*first, *others])
    if function.__doc__:  # python -OO leaves none
        function.__doc__ = re.sub(r"^( *)\{options\}$", _described, function.__doc__, flags=re.M)
    return function


def _described(line: re.Match[str]) -> str:
    indent = line[1]
    return "\n".join(
        textwrap.fill(
            f"{name}: {option.doc or f'{option.help}.'}",
            width=100,
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_on_hyphens=False,
        )
        for name, option in OPTIONS.items()
    )
