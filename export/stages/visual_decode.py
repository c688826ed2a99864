"""`visual_decode`: one step of masked decoding, with guidance and the writing of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import BRANCHES, IMAGES, REVEALED, STEPS, TEXT_TOKENS, TEXTS
from bifrost_rt.manifest import State, TensorSpec
from export.stages import Definition, Stage
from export.stages.mllm_text import cache_specs

if TYPE_CHECKING:
    from export.model.decoder_config import DecoderConfig
    from export.model.decoding import VisualDecode

DEFINITION = Definition(
    "visual_decode",
    tolerance=1e-4,
    not_quantized={"branch.vision_head": "the final projection writes the tokens themselves"},
)


def stage(module: VisualDecode, c: DecoderConfig) -> Stage:
    """tokens [B, N, D] -> tokens [B, N, D]"""
    num_tokens = module.branch.learnable_pos_emb.shape[1]
    tokens = (IMAGES, num_tokens, c.hidden_size)
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(
            TensorSpec("tokens", "float32", tokens),
            TensorSpec("step", "int64", (1,)),
            TensorSpec("text_length", "int64", (TEXTS,)),
            TensorSpec("text_index", "int64", (BRANCHES, IMAGES)),
            TensorSpec("reveal_places", "int64", (STEPS, IMAGES, REVEALED)),
            TensorSpec("token_sources", "int64", (STEPS, IMAGES, num_tokens)),
            TensorSpec("cfg_weight", "float32", (1,)),
            *cache_specs(c, "text", TEXT_TOKENS),
        ),
        outputs=(
            TensorSpec("next_tokens", "float32", tokens),
            TensorSpec("next_step", "int64", (1,)),
        ),
        state=(State("next_tokens", "tokens"), State("next_step", "step")),
    )
