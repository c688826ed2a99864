"""What goes over the wire, in the shapes of OpenAI's image and chat APIs where they have one."""

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

from bifrost_rt import chat_params
from bifrost_rt.answering import FinishReason
from bifrost_rt.chat_params import ChatOption, ChatOptions
from bifrost_rt.params import LARGEST, OPTIONS, Boolean, Default, Integer, Option
from bifrost_rt.serve import conversation
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


class _Given(BaseModel):
    """A request. Null is for what is not given; an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {field: value for field, value in body.items() if value is not None}


class OpenAIRequest(_Given):
    """OpenAI's fields. Those that choose what there is one of here take their neutral values."""

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
        None, description="without effect: images are opaque here"
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="without effect: nothing is moderated here"
    )
    stream: Literal[False] | None = Field(
        None, description="without effect: /v1/jobs is for what tells of its progress"
    )
    partial_images: Annotated[Literal[0], Whole] | None = Field(
        None, description="without effect: /v1/jobs is for images that are seen becoming"
    )
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")
    think: bool | str | None = Field(
        None,
        description="not OpenAI's: true has the MLLM answer the prompt first, and draws its "
        "answer; a text is the instruction, with {prompt} in the place of the prompt",
    )

    def options(self) -> dict[str, Any]:
        """Return the options of `Generator.run` by name; None is for what is not given."""
        return {name: getattr(self, option.api_name) for name, option in OPTIONS.items()}


def option_field(option: Option) -> tuple[Any, Any]:
    """Return the field of an option of `Generator.run`: its type, and its description and
    default."""
    values, text = option.values, option.help
    kind: Any = Number
    if isinstance(values, Integer):
        kind = Annotated[int, Field(ge=values.least, lt=values.below_in_json), Whole]
    elif isinstance(values, Boolean):
        kind = bool
    elif values.most < LARGEST:
        kind = Annotated[float, Field(ge=values.least, le=values.most), AfterValidator(_finite)]
    if option.default is Default.RANDOM:
        text += "; default: random"
    elif option.default is Default.SET:
        text += "; default: the model's"
    elif not isinstance(option.default, Default):
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
        None, description="send previews of the first image as it becomes; default false"
    )


class EditRequest(ImageRequest):
    """A part of an image drawn anew: the places where `mask` is transparent, or white where it has
    no transparency. Without a mask those where the image itself is transparent. A mask of another
    size is stretched to the image's."""

    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="without effect: what is not masked keeps its visual tokens"
    )


class EditJobRequest(EditRequest, JobRequest):
    """An edit that is not waited for."""


class VariationRequest(ImageRequest):
    """An image drawn again from its visual tokens, by other seeds."""

    prompt: str | None = Field(  # type: ignore[assignment]
        None, description="not OpenAI's; default: what the model says of the image"
    )


class VariationJobRequest(VariationRequest, JobRequest):
    """A variation that is not waited for."""


class StreamOptions(_Given):
    """What a stream has beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _TextFormat(_Given):
    type: Literal["text"]


class OpenAIChatRequest(_Given):
    """OpenAI's fields of a conversation. Those that choose what there is one of here take their
    neutral values."""

    messages: Annotated[list[Any], WithJsonSchema(conversation.SCHEMA)]
    model: str | None = Field(None, description="the name that /v1/models gives")
    stream: bool | None = Field(None, description="send the text as it comes; default false")
    stream_options: StreamOptions | None = None
    n: Annotated[Literal[1], Whole] | None = Field(
        None, description="without effect: there is one answer"
    )
    stop: Annotated[list[str], Field(max_length=0)] | None = Field(
        None, description="without effect: the model ends its answers"
    )
    frequency_penalty: Annotated[Literal[0], Whole] | None = Field(
        None, description="without effect: repetition_penalty is what there is"
    )
    presence_penalty: Annotated[Literal[0], Whole] | None = Field(
        None, description="without effect: repetition_penalty is what there is"
    )
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = Field(
        None, description="without effect"
    )
    logprobs: Literal[False] | None = Field(None, description="without effect: none are given")
    top_logprobs: Annotated[Literal[0], Whole] | None = Field(
        None, description="without effect: none are given"
    )
    response_format: _TextFormat | None = Field(
        None, description="without effect: answers are text"
    )
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(
        None, description="without effect: answers are text"
    )
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(
        None, description="without effect: the model calls none"
    )
    tool_choice: Literal["none", "auto"] | None = Field(
        None, description="without effect: the model calls no tools"
    )
    parallel_tool_calls: bool | None = Field(None, description="without effect")
    reasoning_effort: Literal["none"] | None = Field(
        None, description="without effect: the model answers at once"
    )
    verbosity: Literal["medium"] | None = Field(
        None, description="without effect: the conversation decides"
    )
    service_tier: Literal["auto", "default"] | None = Field(None, description="without effect")
    store: Literal[False] | None = Field(None, description="without effect: nothing is stored")
    metadata: dict[str, str] | None = Field(None, description="without effect")
    prompt_cache_key: str | None = Field(
        None, description="without effect: what conversations begin with in common is found"
    )
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")

    def options(self) -> ChatOptions:
        """Return the options of `Generator.chat`; None is for what is not given."""
        given: Any = {
            name: next((v for f in chat_fields(name) if (v := getattr(self, f)) is not None), None)
            for name in chat_params.OPTIONS
        }
        found: ChatOptions = given
        return found


def chat_fields(name: str) -> tuple[str, ...]:
    """Return the fields of an option of `Generator.chat`; the first that is given counts."""
    return chat_params.OPTIONS[name].api_names or (name,)


def chat_option_field(option: ChatOption) -> tuple[Any, Any]:
    """Return the field of an option of `Generator.chat`: its type, and its description and
    default."""
    values = option.values
    kind: Any = Number
    if isinstance(values, Integer):
        kind = Annotated[int, Field(ge=values.least, le=values.most), Whole]
    text = option.help + (
        "; default: random" if option.default is None else f"; default {option.default}"
    )
    return kind | None, Field(None, description=text)


if TYPE_CHECKING:
    ChatRequest = OpenAIChatRequest
else:
    ChatRequest = create_model(
        "ChatRequest",
        __base__=OpenAIChatRequest,
        __doc__="OpenAI's fields, and below them the options of `Generator.chat`. Null is for what "
        "is not given. Fields of OpenAI's that choose what there is one of here take their neutral "
        "values. An unknown field is refused: what is not read is not obeyed.",
        __module__=__name__,
        **{
            field: chat_option_field(option)
            for name, option in chat_params.OPTIONS.items()
            for field in chat_fields(name)
        },
    )


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens: those that were not read again, and those of images."""

    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """What an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Message(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer. `finish_reason`: `stop` where the model ended it, `length` at the limit or
    at the end of what it can read."""

    index: Literal[0] = 0
    message: Message
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """OpenAI's answer, the seed that gives it again, and in `warnings` what was asked for and has
    no effect."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    seed: int
    warnings: list[str] = []


class Delta(BaseModel):
    """What comes next: the role at first, then pieces of the text."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A part of the one answer; the last says why it ended."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: FinishReason | None = None


class Chunk(BaseModel):
    """An event of a stream. The first has `warnings` too, and the last `seed`; where
    `include_usage` asks for it, one without choices follows and has `usage`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    seed: int | None = None
    warnings: list[str] | None = None


class ImageFile(BaseModel):
    """One image, as its bytes or as a place to get them."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = Field(None, description="with think, what was drawn")


class ImageResponse(BaseModel):
    """OpenAI's answer, the seed that gives these images again, and in `warnings` what was asked
    for and not done, such as the end of a prompt that is longer than the model reads."""

    created: int
    data: list[ImageFile]
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
    """How far a job is. `position`: jobs before it in the queue; `steps`: 0 while it thinks;
    `thought`: with think, what the MLLM says, as far as it is, which is drawn then; `images`: where
    its images are; `seconds`: what each engine took for its whole batch."""

    id: str
    object: Literal["job"] = "job"
    created: int
    state: State
    position: int | None
    stage: Stage | None
    step: int
    steps: int
    thought: str | None
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
    """What the page asks first: sizes, defaults and limits. `grid`: visual tokens of a side."""

    model: str
    size: str
    grid: int
    decoding_steps: int
    num_inference_steps: int
    guidance_scale: float | None
    cfg_weight: float
    controlnet_conditioning_scale: float
    max_images: int
    max_prompt: int
    max_steps: int
    no_previews: str | None
    no_chat: str | None
    no_vision: str | None
