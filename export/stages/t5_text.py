"""`t5_text`: the raw prompt -> T5's embeddings of all its tokens, padding included.

FLUX passes no attention mask: the padding is attended and must stay.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import T5EncoderModel

from bifrost_rt.dims import PROMPTS
from bifrost_rt.manifest import TensorSpec
from export.stages import Stage


class T5Text(nn.Module):
    """The stock encoder."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids).last_hidden_state


def stage(encoder: T5EncoderModel, max_length: int) -> Stage:
    """ids [P, T] -> embeddings [P, T, E]"""
    width = encoder.config.d_model
    return Stage(
        name="t5_text",
        module=T5Text(encoder),
        inputs=(TensorSpec("input_ids", "int64", (PROMPTS, max_length)),),
        outputs=(TensorSpec("prompt_embeds", "float32", (PROMPTS, max_length, width)),),
        tolerance=1e-4,
    )
