"""`clip_text`: the raw prompt -> CLIP-L's pooled output."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPTextModel

from bifrost_rt.dims import PROMPTS
from bifrost_rt.manifest import TensorSpec
from export.stages import Stage


class ClipText(nn.Module):
    """The stock encoder; FLUX uses its pooled output alone."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids).pooler_output


def stage(encoder: CLIPTextModel, max_length: int) -> Stage:
    """ids [P, 77] -> pooled [P, E]"""
    return Stage(
        name="clip_text",
        module=ClipText(encoder),
        inputs=(TensorSpec("input_ids", "int64", (PROMPTS, max_length)),),
        outputs=(
            TensorSpec("pooled_prompt_embeds", "float32", (PROMPTS, encoder.config.hidden_size)),
        ),
        tolerance=1e-4,
    )
