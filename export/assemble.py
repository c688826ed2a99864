"""A checkpoint -> the stages of its engines, one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from bifrost_rt import dims, image_processor, schedules
from bifrost_rt.manifest import ModelFacts, Vision
from export.checkpoint import Checkpoint
from export.errors import CheckpointError
from export.model.answering import MllmText
from export.model.conditioning import Conditioning, ControlEmbed
from export.model.decoding import VisualDecode
from export.model.denoising import Denoise
from export.model.encoders import ClipText, T5Text
from export.model.modulation import precompute_modulation
from export.model.vae import VaeDecode, VaeEncode
from export.stages import (
    Stage,
    clip_text,
    conditioning,
    control_embed,
    denoise,
    mllm_text,
    t5_text,
    vae_decode,
    vae_encode,
    vision_encode,
    visual_decode,
)


def facts(checkpoint: Checkpoint) -> ModelFacts:
    """Sizes of the model, after checking that its networks fit together.

    Raises:
        CheckpointError: naming the two sizes that do not fit.
    """
    transformer, controlnet = checkpoint.transformer.config, checkpoint.controlnet.config
    vae = checkpoint.vae.config
    pairs = (
        (
            "transformer.in_channels",
            transformer.in_channels,
            "4 * vae.latent_channels",
            4 * vae.latent_channels,
        ),
        (
            "transformer.out_channels",
            checkpoint.transformer.out_channels,
            "transformer.in_channels",
            transformer.in_channels,
        ),
        (
            "controlnet.in_channels",
            controlnet.in_channels,
            "transformer.in_channels",
            transformer.in_channels,
        ),
        (
            "controlnet's inner width",
            checkpoint.controlnet.inner_dim,
            "the transformer's",
            checkpoint.transformer.inner_dim,
        ),
        (
            "transformer.joint_attention_dim",
            transformer.joint_attention_dim,
            "text_encoder_2.d_model",
            checkpoint.t5.config.d_model,
        ),
        (
            "controlnet.joint_attention_dim",
            controlnet.joint_attention_dim,
            "transformer.joint_attention_dim",
            transformer.joint_attention_dim,
        ),
        (
            "transformer.pooled_projection_dim",
            transformer.pooled_projection_dim,
            "text_encoder.hidden_size",
            checkpoint.clip.config.hidden_size,
        ),
        (
            "controlnet.pooled_projection_dim",
            controlnet.pooled_projection_dim,
            "transformer.pooled_projection_dim",
            transformer.pooled_projection_dim,
        ),
        ("transformer.patch_size", transformer.patch_size, "the engines'", 1),
        ("controlnet.patch_size", controlnet.patch_size, "the engines'", 1),
        ("vae.out_channels", vae.out_channels, "an image's", 3),
    )
    for name, value, other, wanted in pairs:
        if value != wanted:
            raise CheckpointError(
                f"the networks do not fit together: {name} is {value}, {other} is {wanted}"
            )
    grid = math.isqrt(checkpoint.num_visual_tokens)
    _check_schedule(checkpoint, 4 * grid * grid)
    pixels = 4 * grid * 2 ** (len(vae.block_out_channels) - 1)
    return ModelFacts(
        hidden_size=checkpoint.decoder.hidden_size,
        num_visual_tokens=grid * grid,
        num_image_tokens=4 * grid * grid,
        latent_channels=transformer.in_channels,
        image_height=pixels,
        image_width=pixels,
        guidance_embeds=bool(transformer.guidance_embeds or controlnet.guidance_embeds),
    )


def _check_schedule(checkpoint: Checkpoint, image_tokens: int) -> None:
    try:
        levels = schedules.sigmas(8, image_tokens, checkpoint.scheduler)
        fall = bool(np.all(np.diff(levels) < 0))
    except OverflowError:
        fall = False
    if not fall:
        raise CheckpointError(
            f"{checkpoint.flux.pipeline / 'scheduler' / 'scheduler_config.json'}: base_shift and "
            f"max_shift give no noise levels for {image_tokens} image tokens",
            hint="FLUX.1-dev has 0.5 and 1.15",
        )


def context_length(checkpoint: Checkpoint, mllm_max_length: int) -> int:
    """Tokens of the longest conversation: of the K/V cache, whose memory a conversation takes as it
    grows, and of a table of rotary positions."""
    return max(mllm_max_length, min(dims.CONTEXT, checkpoint.positions))


def stages(
    checkpoint: Checkpoint,
    model: ModelFacts,
    mllm_max_length: int,
    clip_length: int,
    t5_length: int,
    vision: Vision | None = None,
) -> Iterator[Stage]:
    """Every engine's stage, in the order in which a run uses them; weights are read as stages are
    asked for.

    Args:
        vision: how images are read; None: they are not.
    """
    visual = checkpoint.visual_branch()
    text = checkpoint.text_branch(context_length(checkpoint, mllm_max_length))
    head = checkpoint.text_head(text)
    checkpoint.refuse_left_overs()
    yield mllm_text.stage(MllmText(text, head, visual), checkpoint.decoder)
    yield visual_decode.stage(VisualDecode(visual), checkpoint.decoder)
    yield clip_text.stage(ClipText(checkpoint.clip), clip_length)
    yield t5_text.stage(T5Text(checkpoint.t5), t5_length)
    controlnet, transformer = checkpoint.controlnet, checkpoint.transformer
    of_controlnet, of_transformer = (
        precompute_modulation(controlnet),
        precompute_modulation(transformer),
    )
    yield conditioning.stage(
        Conditioning(controlnet, of_controlnet, transformer, of_transformer), t5_length
    )
    yield control_embed.stage(ControlEmbed(controlnet), model.num_visual_tokens, model.hidden_size)
    side = math.isqrt(model.num_image_tokens)
    yield denoise.stage(
        Denoise(controlnet, of_controlnet.width, transformer, t5_length, side),
        transformer.inner_dim,
        t5_length,
        of_controlnet.width + of_transformer.width,
    )
    yield vae_decode.stage(VaeDecode(checkpoint.vae, side))
    if vision is not None:
        longest = image_processor.limits(vision).side * vision.merge_size
        yield vision_encode.stage(checkpoint.vision_tower(longest))
    if checkpoint.vae_encoder is not None:
        yield vae_encode.stage(VaeEncode(checkpoint.vae_encoder, side))
