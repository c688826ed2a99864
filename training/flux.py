"""The diffusion transformer with its text encoders, by flow matching on VAE latents.

Its own text carries no layout: counts and relations in its captions are drawn anew, so it learns
that they say nothing (scenes/sampling.py) and the latents have to say it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from scenes.sampling import without_layout
from training.config import Config
from training.loop import load_weights
from training.pool import pack, scene, vae_pool, wording
from training.tokenizers import CLIP_LENGTH, clip_ids, clip_tokenizer, t5_ids, t5_tokenizer

SHIFT = 1.6  # of the noise levels, as sampling shifts them at 64 image tokens


def _rope_axes(width: int) -> tuple[int, int, int]:
    side = (width * 2 // 5) // 2 * 2
    return width - 2 * side, side, side


def transformer_config(config: Config) -> dict[str, object]:
    """Return what the transformer and its ControlNet share."""
    return {
        "in_channels": 4 * config.latent_channels,
        "attention_head_dim": config.flux_head_width,
        "num_attention_heads": config.flux_heads,
        "joint_attention_dim": config.t5_width,
        "pooled_projection_dim": config.clip_width,
        "guidance_embeds": False,
        "axes_dims_rope": _rope_axes(config.flux_head_width),
    }


class FluxModel(nn.Module):
    """Transformer, CLIP and T5, and the velocity they predict for packed latents."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.t5_length = config.t5_length
        self.transformer = FluxTransformer2DModel(
            num_layers=config.flux_double,
            num_single_layers=config.flux_single,
            **transformer_config(config),
        )
        # Attention as matmul and softmax: on a CPU its backward is far cheaper than flash's.
        self.transformer.set_attention_backend("_native_math")
        clip = clip_tokenizer()
        start, end = (clip.token_to_id(f"<|{t}oftext|>") for t in ("start", "end"))
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=clip.get_vocab_size(),
                hidden_size=config.clip_width,
                intermediate_size=2 * config.clip_width,
                projection_dim=config.clip_width,
                num_hidden_layers=config.clip_layers,
                num_attention_heads=4,
                max_position_embeddings=CLIP_LENGTH,
                bos_token_id=start,
                # As in CLIP-L's own config: pooling then takes the highest id, the end token.
                eos_token_id=2,
                pad_token_id=end,
            )
        )
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=t5_tokenizer().get_vocab_size(),
                d_model=config.t5_width,
                d_kv=config.t5_width // 4,
                d_ff=2 * config.t5_width,
                num_layers=config.t5_layers,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompt embeddings [B, T, t5_width], pads included, and pooled [B, clip_width]."""
        prompt = self.t5(torch.tensor(t5_ids(texts, self.t5_length))).last_hidden_state
        return prompt, self.clip(torch.tensor(clip_ids(texts))).pooler_output

    def ids(self, places: int) -> tuple[Tensor, Tensor]:
        """Position ids of the text (zeros) and of a square of image tokens."""
        side = int(places**0.5)
        image = torch.zeros(side, side, 3)
        image[..., 1] += torch.arange(side)[:, None]
        image[..., 2] += torch.arange(side)[None, :]
        return torch.zeros(self.t5_length, 3), image.reshape(places, 3)

    def forward(
        self,
        x_t: Tensor,
        sigma: Tensor,
        prompt: Tensor,
        pooled: Tensor,
        control: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> Tensor:
        """Velocity for packed `x_t` [B, S, C] at noise level `sigma` [B]."""
        text_ids, image_ids = self.ids(x_t.shape[1])
        double, single = control or (None, None)
        return self.transformer(
            hidden_states=x_t,
            timestep=sigma,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
            controlnet_block_samples=double,
            controlnet_single_block_samples=single,
            return_dict=False,
        )[0]


def noise_levels(rows: int) -> Tensor:
    """Logit-normal levels [rows], shifted as sampling shifts them."""
    sigma = torch.sigmoid(torch.randn(rows))
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


class FluxStage:
    """Flow matching of the transformer and both text encoders together."""

    name = "flux"

    def __init__(self, config: Config, out: Path) -> None:
        self.module = FluxModel(config)
        self.config = config
        self.latents = vae_pool(config, out)["latents"]
        self.specs = [scene(config, i)[0] for i in range(config.pool)]

    def compile(self) -> None:
        """Fuses the repeated blocks' elementwise work."""
        self.module.transformer.compile_repeated_blocks(fullgraph=True)

    def loss(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Mean squared error of the velocity."""
        chosen = rng.integers(self.config.pool, size=batch)
        texts = [wording(without_layout(self.specs[i], rng), rng) for i in chosen]
        x_0 = pack(self.latents[torch.as_tensor(chosen)])
        noise, sigma = torch.randn_like(x_0), noise_levels(batch)
        x_t = torch.lerp(x_0, noise, sigma[:, None, None])
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            velocity = self.module(x_t, sigma, *self.module.encode(texts))
        return (velocity.float() - (noise - x_0)).square().mean()


def trained_flux(config: Config, out: Path) -> FluxModel:
    """In eval mode."""
    flux = FluxModel(config)
    load_weights(flux, out, "flux")
    return flux.eval().requires_grad_(False)
