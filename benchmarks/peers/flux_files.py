"""FLUX and its ControlNet with random weights, in the files that every candidate reads: our graphs,
and the networks as diffusers keeps them. All are made from the same bfloat16 numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import truncated_models
from benchmarks.peers import model_files
from benchmarks.peers.stock_files import CHECKPOINT, GUIDANCE, INPUTS, TIME
from bifrost_rt import dims
from bifrost_rt.manifest import EngineSpec
from export.formats import FORMATS
from export.synthetic.shapes import PRESETS, Shapes

if TYPE_CHECKING:
    from export.stages import Stage

CONDITIONING, CONTROL, STEP = "conditioning", "control_embed", "denoise"
STEPS = 28  # of an image: what is computed once for all of them is shared among them
TEXT_TOKENS = 512


def shapes(like: str, blocks: int | None) -> Shapes:
    """Return the two networks of a preset, cut to `blocks` of each kind, at 512 pixels. The rest
    is tiny."""
    whole = PRESETS[like] if blocks is None else PRESETS[like].cut(blocks)
    return dataclasses.replace(
        PRESETS["tiny"],
        visual_tokens=256,
        transformer=whole.transformer,
        controlnet=whole.controlnet,
        vae=dataclasses.replace(PRESETS["tiny"].vae, latent_channels=whole.vae.latent_channels),
        clip=dataclasses.replace(
            PRESETS["tiny"].clip, width=whole.clip.width, head_dim=whole.clip.width // 2
        ),
        t5=dataclasses.replace(PRESETS["tiny"].t5, width=whole.t5.width),
    )


def made(of: Shapes, forms: tuple[str, ...]) -> Path:
    """Return the folder with everything, after making what is not there yet."""
    return model_files.made("flux", of, forms, lambda folder: _write(of, forms, folder))


def _write(of: Shapes, forms: Sequence[str], folder: Path) -> dict[str, EngineSpec]:
    from export.synthesize import synthesize

    synthesize(of, folder / CHECKPOINT)
    stages = _stages(folder / CHECKPOINT)
    given: dict[str, Any] = _inputs(of, stages)
    np.savez(folder / INPUTS, **given)
    engines: dict[str, EngineSpec] = {}
    write = truncated_models.write
    engines[CONDITIONING] = write(stages[CONDITIONING], "bf16", folder, holes=False)
    for fmt in forms:
        stage = _stages(folder / CHECKPOINT)[STEP]
        seen = model_files.calibrated(stage, given) if FORMATS[fmt].quantized else None
        engines[fmt] = write(stage, fmt, folder, holes=False, statistics=seen)
    return engines


def _stages(checkpoint: Path) -> dict[str, Stage]:
    wanted = (CONDITIONING, CONTROL, STEP)
    return model_files.stages(checkpoint, *wanted, text_tokens=TEXT_TOKENS, read=True)


def _inputs(of: Shapes, stages: dict[str, Stage]) -> dict[str, NDArray[Any]]:
    """Make random inputs, and what follows from them before the first step: our engines read
    `control_condition` and the outputs of `conditioning`, the stock networks the rest."""
    import torch

    from export.torch_pipeline import evaluate

    numbers = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return numbers.normal(size=shape).astype(np.float32)

    tokens = normal(1, of.visual_tokens, of.decoder.hidden_size)
    prompt: dict[str, NDArray[Any]] = {
        "prompt_embeds": normal(1, TEXT_TOKENS, of.t5.width),
        "pooled_prompt_embeds": normal(1, of.clip.width),
        "prompt_index": np.zeros(1, np.int64),
        "timesteps": np.full(STEPS, 1000 * TIME, np.float32),
        "guidance_scale": np.full(1, GUIDANCE, np.float32),
    }
    latents = normal(1, 4 * of.visual_tokens, 4 * of.vae.latent_channels)
    with torch.inference_mode():
        up = stages[CONTROL].module.up_sampling_block(torch.from_numpy(tokens)).numpy()
    control = evaluate(stages[CONTROL], {"tokens": tokens})["control_condition"].numpy()
    found = {
        **prompt,
        "latents": latents,
        "velocity": np.zeros_like(latents),
        "step": np.zeros(1, np.int64),
        "step_weights": np.tile(np.array([[-0.1, 0]], np.float32), (STEPS, 1)),
        "controlnet_conditioning_scale": np.ones(1, np.float32),
        "control_condition": control,
        "controlnet_cond": up,
    }
    outputs = evaluate(stages[CONDITIONING], prompt)
    return found | {name: value.numpy() for name, value in outputs.items()}


def sizes() -> dict[str, int]:
    """Return every size of a step of one image."""
    return dims.of_run(text_tokens=TEXT_TOKENS, steps=STEPS)
