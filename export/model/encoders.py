"""The text encoders of FLUX as engines: stock, with one tensor out.

FLUX passes T5 no attention mask: the padding is attended and must stay.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel


class ClipText(nn.Module):
    """The stock encoder; FLUX uses its pooled output alone."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids).pooler_output


class T5Text(nn.Module):
    """The stock encoder."""

    def __init__(self, encoder: T5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids=input_ids).last_hidden_state
