"""`clip_text`: the raw prompt -> CLIP-L's pooled output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import PROMPTS
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.encoders import ClipText

DEFINITION = Definition("clip_text", tolerance=1e-4)


def stage(module: ClipText, max_length: int) -> Stage:
    """ids [P, 77] -> pooled [P, E]"""
    pooled = (PROMPTS, module.encoder.config.hidden_size)
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(TensorSpec("input_ids", "int64", (PROMPTS, max_length)),),
        outputs=(TensorSpec("pooled_prompt_embeds", "float32", pooled),),
    )
