"""What goes over the wire, in the shapes of OpenAI's image API where it has one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from bifrost_rt.serve.jobs import Stage, State

Steps = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class ImageRequest(BaseModel):
    """OpenAI's fields, and below them those of `Generator.run` under their own names. An unknown
    field is refused: what is not read is not obeyed."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    model: str | None = Field(None, description="the name that /v1/models gives")
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="pictures; default 1")
    size: str | None = Field(
        None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="the set's own, or auto"
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="default b64_json; a url is good as long as the job is remembered"
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="default png, which also says how it was made"
    )
    user: str | None = Field(None, description="without effect")
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(None, description="default: random")
    num_inference_steps: Steps | None = None
    decoding_steps: Steps | None = None
    guidance_scale: Number | None = None
    cfg_weight: Number | None = None
    cache_interval: Steps | None = Field(
        None, description="compute every so many denoising steps; 1 is off"
    )
    controlnet_conditioning_scale: Number | None = None


class JobRequest(ImageRequest):
    """A request that is not waited for."""

    previews: bool = Field(False, description="send pictures of the first image as it becomes")


class Picture(BaseModel):
    """One picture, as its bytes or as a place to get them."""

    b64_json: str | None = None
    url: str | None = None


class ImageResponse(BaseModel):
    """OpenAI's answer, and the seed that gives these pictures again."""

    created: int
    data: list[Picture]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    seed: int


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
