"""What goes over the wire, in the shapes of OpenAI's image API where it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bifrost_rt.params import LARGEST, OPTIONS, Default, Integer, Option
from bifrost_rt.serve.jobs import Stage, State

_EXACT = 2**53  # up to here a float64 holds every whole number


def _whole(value: Any) -> Any:
    """1.0 as 1: to JSON they are one number, and some languages have no other."""
    exact = isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT
    return int(value) if exact else value


def _finite(value: float) -> float:
    if not -LARGEST <= value <= LARGEST:  # nor is NaN
        raise PydanticCustomError("not_finite", "must be finite in float32")
    return value


Whole = BeforeValidator(_whole)
Number = Annotated[float, AfterValidator(_finite)]
# checked in `app.py`, which knows the set's own size
Size = Annotated[
    str, WithJsonSchema({"type": "string", "pattern": "^(auto|[0-9]{1,5}x[0-9]{1,5})$"})
]


class OpenAIRequest(BaseModel):
    """OpenAI's fields. Those that choose what there is one of here take their neutral values."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = Field(None, description="the name that /v1/models gives")
    size: Size | None = Field(None, description="the set's own, or auto")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="default b64_json; a url is good as long as the job is remembered"
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="default png, which also says how it was made"
    )
    output_compression: Annotated[Literal[100], Whole] | None = Field(
        None, description="without effect: each format has one compression here"
    )
    quality: Literal["auto", "standard"] | None = Field(
        None, description="without effect: num_inference_steps and decoding_steps decide"
    )
    style: Literal["vivid", "natural"] | None = Field(
        None, description="without effect: the prompt decides"
    )
    background: Literal["auto", "opaque"] | None = Field(
        None, description="without effect: pictures are opaque here"
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="without effect: nothing is moderated here"
    )
    stream: Literal[False] | None = Field(
        None, description="without effect: /v1/jobs is for what tells of its progress"
    )
    partial_images: Annotated[Literal[0], Whole] | None = Field(
        None, description="without effect: /v1/jobs is for pictures that are seen becoming"
    )
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """The options of `Generator.run` by name; None is for what is not given."""
        return {name: getattr(self, option.api_name) for name, option in OPTIONS.items()}


def option_field(option: Option) -> tuple[Any, Any]:
    """The field of an option of `Generator.run`: its type, and its description and default."""
    values, text = option.values, option.help
    kind: Any = Number
    if isinstance(values, Integer):
        kind = Annotated[int, Field(ge=values.least, lt=values.below_in_json), Whole]
    if option.default is Default.RANDOM:
        text += "; default: random"
    elif option.default is Default.SET:
        text += "; default: the model's"
    else:
        text += f"; default {option.default}"
    return kind | None, Field(None, description=text)


# Type checkers cannot read a class that is made; code reads its options by `options()`.
if TYPE_CHECKING:
    ImageRequest = OpenAIRequest
else:
    ImageRequest = create_model(
        "ImageRequest",
        __base__=OpenAIRequest,
        __doc__="OpenAI's fields, and below them the options of `Generator.run` under their own "
        "names. Null is for what is not given. Fields of OpenAI's that choose what there is one "
        "of here take their neutral values. An unknown field is refused: what is not read is not "
        "obeyed.",
        __module__=__name__,
        **{option.api_name: option_field(option) for option in OPTIONS.values()},
    )


class JobRequest(ImageRequest):
    """A request that is not waited for."""

    previews: bool | None = Field(
        None, description="send pictures of the first image as it becomes; default false"
    )


class Picture(BaseModel):
    """One picture, as its bytes or as a place to get them."""

    b64_json: str | None = None
    url: str | None = None


class ImageResponse(BaseModel):
    """OpenAI's answer, the seed that gives these pictures again, and in `warnings` what was asked
    for and not done, such as the end of a prompt that is longer than the model reads."""

    created: int
    data: list[Picture]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    seed: int
    warnings: list[str] = []


class Fault(BaseModel):
    """What is wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class FaultResponse(BaseModel):
    """An answer that is an error."""

    error: Fault


class JobResponse(BaseModel):
    """How far a job is. `position`: jobs before it in the queue; `images`: where its pictures are;
    `seconds`: what each engine took for its whole batch."""

    id: str
    object: Literal["job"] = "job"
    created: int
    state: State
    position: int | None
    stage: Stage | None
    step: int
    steps: int
    images: list[str]
    parameters: dict[str, str | int | float]
    seconds: dict[str, float]
    warnings: list[str]
    error: Fault | None


class Model(BaseModel):
    """The engine set that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "bifrost-rt"


class ModelList(BaseModel):
    """The one model."""

    object: Literal["list"] = "list"
    data: list[Model]


class About(BaseModel):
    """What the page asks first: sizes, defaults and limits."""

    model: str
    size: str
    decoding_steps: int
    num_inference_steps: int
    guidance_scale: float | None
    cfg_weight: float
    controlnet_conditioning_scale: float
    max_images: int
    max_prompt: int
    max_steps: int
    no_previews: str | None
