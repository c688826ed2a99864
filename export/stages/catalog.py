"""The definitions of all engines, in the order in which a run uses them; last those that no
drawing uses."""

from __future__ import annotations

from export.stages import (
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

DEFINITIONS = {
    module.DEFINITION.name: module.DEFINITION
    for module in (
        *(mllm_text, visual_decode),
        *(clip_text, t5_text, conditioning),
        *(control_embed, denoise, vae_decode),
        *(vision_encode, vae_encode),
    )
}
