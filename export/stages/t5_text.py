"""`t5_text`: the raw prompt -> T5's embeddings of all its tokens, padding included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import PROMPTS
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.encoders import T5Text

DEFINITION = Definition(
    "t5_text",
    tolerance=1e-4,
    not_quantized={
        "*.wo": "its inputs reach tens of thousands in T5-XXL; transformers keeps it in float32 "
        "for the same reason",
    },
    when_short=("*.wo",),
)


def stage(module: T5Text, max_length: int) -> Stage:
    """ids [P, T] -> embeddings [P, T, E]"""
    width = module.encoder.config.d_model
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(TensorSpec("input_ids", "int64", (PROMPTS, max_length)),),
        outputs=(TensorSpec("prompt_embeds", "float32", (PROMPTS, max_length, width)),),
    )
