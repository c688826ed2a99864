"""Which model every part of a checkpoint must be, as its config states it.

Another model of the same sizes has the same tensors and draws nonsense: qwen2_vl in the place of
qwen2_5_vl gives a blank image, and no shape differs. A key that is absent, as older tools leave
it, says nothing; a value that differs is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from export.configs import Config, show
from export.errors import CheckpointError

_FAST = ("PreTrainedTokenizerFast", "TokenizersBackend")  # what is read is tokenizer.json itself


@dataclass(frozen=True)
class Part:
    """One config file.

    Attributes:
        place: where its folder stands in a checkpoint.
        model: what the engines compute, in words.
        stated: key -> the values that name this model; a list holds these alone.
    """

    place: str
    model: str
    stated: Mapping[str, tuple[str, ...]]


MLLM = Part(
    "mllm",
    "Qwen2.5-VL",
    {
        "model_type": ("qwen2_5_vl",),
        "architectures": ("Qwen2_5_VLForConditionalGeneration",),
        "text_config.model_type": ("qwen2_5_vl_text", "qwen2_5_vl"),
        "text_config.architectures": ("Qwen2_5_VLForConditionalGeneration",),
        "vision_config.model_type": ("qwen2_5_vl", "qwen2_5_vl_vision"),
    },
)
BIFROST = Part(
    "bifrost",
    "the MLLM that Bifrost-1 trained",
    {"model_type": ("multi_modality",), "architectures": ("MultiModalityCausalLM",)},
)
CONTROLNET = Part(
    "bifrost/flux_controlnet",
    "a ControlNet of FLUX.1",
    {"_class_name": ("FluxControlNetModel",)},
)
TRANSFORMER = Part(
    "flux/transformer", "the transformer of FLUX.1", {"_class_name": ("FluxTransformer2DModel",)}
)
VAE = Part("flux/vae", "the VAE of FLUX.1", {"_class_name": ("AutoencoderKL",)})
CLIP = Part(
    "flux/text_encoder",
    "CLIP's text encoder",
    {
        "model_type": ("clip_text_model", "clip"),
        "architectures": ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
        "text_config.model_type": ("clip_text_model",),
    },
)
T5 = Part(
    "flux/text_encoder_2",
    "T5's encoder",
    {
        "model_type": ("t5",),
        "architectures": ("T5EncoderModel", "T5ForConditionalGeneration", "T5WithLMHeadModel"),
    },
)
SCHEDULER = Part(
    "flux/scheduler",
    "FLUX.1's noise schedule",
    {"_class_name": ("FlowMatchEulerDiscreteScheduler",)},
)
MLLM_TOKENIZER = Part(
    "mllm",
    "Qwen2.5's tokenizer",
    {"tokenizer_class": ("Qwen2Tokenizer", "Qwen2TokenizerFast", *_FAST)},
)
CLIP_TOKENIZER = Part(
    "flux/tokenizer",
    "CLIP's tokenizer",
    {"tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast", *_FAST)},
)
T5_TOKENIZER = Part(
    "flux/tokenizer_2",
    "T5's tokenizer",
    {"tokenizer_class": ("T5Tokenizer", "T5TokenizerFast", *_FAST)},
)
# Of the pipelines of FLUX.1 those that hold the base model; Kontext, Fill and Redux hold others.
PIPELINE = Part(
    "flux",
    "FLUX.1",
    {
        "_class_name": tuple(
            f"Flux{kind}Pipeline"
            for kind in (
                *("", "Img2Img", "Inpaint"),
                *("ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
            )
        ),
        "transformer": TRANSFORMER.stated["_class_name"],
        "vae": VAE.stated["_class_name"],
        "text_encoder": CLIP.stated["architectures"],
        "text_encoder_2": T5.stated["architectures"],
        "tokenizer": CLIP_TOKENIZER.stated["tokenizer_class"],
        "tokenizer_2": T5_TOKENIZER.stated["tokenizer_class"],
        "scheduler": SCHEDULER.stated["_class_name"],
    },
)
PARTS = (
    *(MLLM, BIFROST, CONTROLNET, TRANSFORMER, VAE, CLIP, T5, SCHEDULER),
    *(MLLM_TOKENIZER, CLIP_TOKENIZER, T5_TOKENIZER),
)


def check(config: Config, part: Part) -> Config:
    """Compare what a config states with what `part` must be; return the config.

    Raises:
        CheckpointError: naming file, key, what was expected and what was found.
    """
    for key, values in part.stated.items():
        table, _, leaf = key.rpartition(".")
        owner = config.table(table) if table else config
        if owner is None or owner.values.get(leaf) is None:
            continue
        for found in _names(owner.values[leaf], pair=part is PIPELINE):
            if found not in values:
                raise CheckpointError(
                    f"{config.path}: {key} is {show(found)}, expected {' or '.join(values)}: "
                    f"the engines compute {part.model}",
                    hint=_hint(found, leaf, part),
                )
    return config


def _names(value: object, pair: bool) -> Iterator[object]:
    """Yield the names in a value: one, a list of them, or model_index.json's [library, class]."""
    if not isinstance(value, list):
        yield value
    elif pair:
        yield from (name for name in value[1:] if name is not None)
    else:
        yield from value


def _hint(found: object, key: str, part: Part) -> str:
    for other in PARTS:
        if other is not part and found in other.stated.get(key, ()):
            return (
                f"this is what belongs into {other.place}: are {part.place} and {other.place} "
                "swapped?"
            )
    return f"give the folder of {part.model} for {part.place}"
