"""The latent ControlNet: teaches the frozen diffusion model to follow patch latents.

Trained at the control scale that sampling uses, on true latents with a little noise, so that it
does not read texture into them that predicted latents cannot have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.model.controlnet import LatentControlNet
from scenes.sampling import without_layout
from training.captioner import latent_pool
from training.config import Config
from training.flux import FluxModel, noise_levels, trained_flux, transformer_config
from training.loop import load_weights
from training.pool import pack, scene, vae_pool, wording

NOISE = 0.3  # upper end of the noise on patch latents of unit variance


def build_controlnet(config: Config, flux: FluxModel) -> LatentControlNet:
    """Its blocks start as copies of the transformer's first ones."""
    control = LatentControlNet(
        config.hidden,
        num_layers=config.control_double,
        num_single_layers=config.control_single,
        **transformer_config(config),
    )
    control.load_state_dict(
        {k: v for k, v in flux.transformer.state_dict().items() if k in control.state_dict()},
        strict=False,
    )
    control.set_attention_backend("_native_math")
    return control


def control_samples(
    control: LatentControlNet,
    flux: FluxModel,
    tokens: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    prompt: Tensor,
    pooled: Tensor,
    scale: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the ControlNet adds after the transformer's double and single blocks."""
    text_ids, image_ids = flux.ids(x_t.shape[1])
    return control(
        hidden_states=x_t,
        controlnet_cond=control.up_sampling_block(tokens),
        conditioning_scale=scale,
        encoder_hidden_states=prompt,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=image_ids,
        txt_ids=text_ids,
        return_dict=False,
    )


class ControlStage:
    """Flow matching through the frozen transformer; only the ControlNet learns."""

    name = "controlnet"

    def __init__(self, config: Config, out: Path) -> None:
        self.config = config
        self.flux = trained_flux(config, out)
        self.module = build_controlnet(config, self.flux)
        self.latents = vae_pool(config, out)["latents"]
        self.tokens = latent_pool(config, out)
        self.specs = [scene(config, i)[0] for i in range(config.pool)]

    def compile(self) -> None:
        """Fuses the repeated blocks' elementwise work."""
        self.flux.transformer.compile_repeated_blocks(fullgraph=True)
        self.module._repeated_blocks = self.flux.transformer._repeated_blocks
        self.module.compile_repeated_blocks(fullgraph=True)

    def loss(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Mean squared error of the velocity."""
        chosen = rng.integers(self.config.pool, size=batch)
        texts = [wording(without_layout(self.specs[i], rng), rng) for i in chosen]
        places = torch.as_tensor(chosen)
        x_0, tokens = pack(self.latents[places]), self.tokens[places]
        tokens = tokens + NOISE * torch.rand(batch, 1, 1) * torch.randn_like(tokens)
        noise, sigma = torch.randn_like(x_0), noise_levels(batch)
        x_t = torch.lerp(x_0, noise, sigma[:, None, None])
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            with torch.no_grad():
                prompt, pooled = self.flux.encode(texts)
            samples = control_samples(
                self.module, self.flux, tokens, x_t, sigma, prompt, pooled,
                self.config.control_scale,
            )  # fmt: skip
            velocity = self.flux(x_t, sigma, prompt, pooled, samples)
        return (velocity.float() - (noise - x_0)).square().mean()


def trained_controlnet(config: Config, out: Path, flux: FluxModel) -> LatentControlNet:
    """In eval mode."""
    control = build_controlnet(config, flux)
    load_weights(control, out, "controlnet")
    return control.eval().requires_grad_(False)
