"""The product, read top to bottom: from token ids to pixels.

The runtime does no arithmetic of its own here. It hands buffers from engine to engine; what does
not change inside a loop is computed before it, and a step marked `.t` is one call on memory that
was bound beforehand.

Source: arXiv 2508.05954, and the inference script published with it, which this computes exactly
once instead of nine times (`docs/benchmarks.md`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import mllm_text, residency, schedules
from bifrost_rt.backends.base import Buffer
from bifrost_rt.engines import Engines, Loop
from bifrost_rt.manifest import Manifest
from bifrost_rt.notes import Note
from bifrost_rt.numerics import Checks
from bifrost_rt.request import Request
from bifrost_rt.text import Tokenizers

SHORTEST = 32  # tokens that a text is padded to for compiled engines

StepEnd = Callable[[str, int, float | None, Loop], None]


@dataclass(frozen=True)
class Output:
    """What a run leaves behind. n images, N visual tokens, S image tokens."""

    tokens: NDArray[np.float32]  # [n, N, D]
    latents: NDArray[np.float32]  # [n, S, C]
    images: NDArray[np.uint8] | None  # [n, H, W, 3]; None when only latents were asked for
    timings: dict[str, float]  # seconds per engine, and `total`
    notes: tuple[Note, ...] = ()  # what was asked for and not done


# What runs a set's engines for a checked request. `generate` is the product's.
Generate = Callable[[Engines, Tokenizers, Manifest, Request], Output]


def generate(
    engines: Engines,
    tokenizers: Tokenizers,
    manifest: Manifest,
    request: Request,
    on_step_end: StepEnd | None = None,
) -> Output:
    """Run a checked request.

    Args:
        on_step_end: called as (carried tensor's name, step, timestep or None, loop) after every
            step of both loops.

    Raises:
        NumericsError: what a stage has left is not finite. Looked at between stages, never inside a
            loop.
    """
    start = time.perf_counter()
    options = request.parameters
    timings: dict[str, float] = {}
    down = engines.backend.download
    checks = Checks(manifest, request, down, replaced=on_step_end is not None)

    # 0  Which engines are in memory when.
    engines.begin(stages(request), sizes(manifest, request))

    # 1-3  Prompt -> CLIP latents, unless they were made before.
    if request.tokens is None:
        tokens = _decode(engines, tokenizers, manifest, request, timings, checks, on_step_end)
    else:
        tokens = engines.put("conditioning", tokens=request.tokens)["tokens"]
    final_tokens = down(tokens).copy()

    # 4  The raw prompt -> text embeddings of the diffusion networks.
    prompts = request.prompts
    clip_ids = engines.put("clip_text", input_ids=tokenizers.clip(prompts))
    pooled = engines.run("clip_text", clip_ids, timings)
    t5_ids = engines.put("t5_text", input_ids=tokenizers.t5(prompts))
    embeds = engines.run("t5_text", t5_ids, timings)
    for stage, outputs in (("clip_text", pooled), ("t5_text", embeds)):
        for name, buffer in outputs.items():
            checks.finite(stage, name, down(buffer), "prompt")

    # 5  Everything about the image that no denoising step changes.
    sigmas, plan = denoising(manifest, request)
    timesteps = schedules.timesteps(sigmas, manifest.scheduler)
    facts: dict[str, NDArray[Any]] = {
        "prompt_index": request.prompt_index,
        "timesteps": timesteps[list(plan.computed)],
    }
    if manifest.model.guidance_embeds:
        facts["guidance_scale"] = np.array([options.guidance_scale], np.float32)
    inputs = {**pooled, **embeds, "tokens": tokens, **engines.put("conditioning", **facts)}
    conditions = engines.run("conditioning", inputs, timings)
    del inputs, embeds

    # 6  Denoising.
    scale = np.array([options.controlnet_conditioning_scale], np.float32)
    denoise = engines.loop(
        "denoise",
        {
            **conditions,
            **engines.put(
                "denoise",
                latents=request.latents.copy(),
                velocity=np.zeros_like(request.latents),
                step=np.zeros(1, np.int64),
                step_weights=plan.weights,
                controlnet_conditioning_scale=scale,
            ),
        },
        timings,
    )
    for t in range(options.num_inference_steps):
        if plan.computed[t]:
            denoise.step()  # 6.t
        if on_step_end:
            on_step_end("latents", t, float(timesteps[t]), denoise)
    latents = denoise.finish("latents")
    final_latents = down(latents).copy()
    checks.finite("denoise", "latents", final_latents, "image", earlier=conditions)
    del conditions

    # 7  Latents -> pixels.
    images = None
    if request.output_type != "latent":
        decoded = engines.run("vae_decode", {"latents": latents}, timings)
        images = down(decoded["images"]).copy()
    engines.check_files()
    timings["total"] = time.perf_counter() - start
    return Output(final_tokens, final_latents, images, timings)


def denoising(
    manifest: Manifest, request: Request
) -> tuple[NDArray[np.float32], schedules.DenoisingPlan]:
    """The noise levels of the denoising steps, [steps + 1], and which steps are computed."""
    options = request.parameters
    sigmas = schedules.sigmas(
        options.num_inference_steps, manifest.model.num_image_tokens, manifest.scheduler
    )
    return sigmas, schedules.denoising_plan(sigmas, options.cache_interval)


def stages(request: Request) -> tuple[str, ...]:
    """The engines that a request uses, in this order, each once."""
    mllm = (mllm_text.NAME, "visual_decode") if request.tokens is None else ()
    vae = ("vae_decode",) if request.output_type != "latent" else ()
    return (*mllm, "clip_text", "t5_text", "conditioning", "denoise", *vae)


def sizes(manifest: Manifest, request: Request) -> residency.Sizes:
    """What a request makes of the symbols at the engines' doors."""
    options = request.parameters
    return residency.sizes(
        manifest,
        images=request.images,
        prompts=len(request.prompts),
        guided=options.cfg_weight != 1.0,
        decoding_steps=options.decoding_steps,
        num_inference_steps=options.num_inference_steps,
    )


def _decode(
    engines: Engines,
    tokenizers: Tokenizers,
    manifest: Manifest,
    request: Request,
    timings: dict[str, float],
    checks: Checks,
    on_step_end: StepEnd | None,
) -> Buffer:
    """The MLLM's part: the final visual tokens [B, N, D]."""
    options = request.parameters

    # 1  Prompt -> ids. At cfg 1 the unconditional half cancels and is not computed.
    guided = options.cfg_weight != 1.0
    texts = list(dict.fromkeys(["", *request.prompts] if guided else request.prompts))
    ids = [tokenizers.mllm_prompt(text) for text in texts]
    lengths = np.array([len(row) for row in ids], np.int64)
    rows = np.array([texts.index(request.prompts[i]) for i in request.prompt_index], np.int64)
    text_index = np.stack([np.full_like(rows, texts.index("")), rows] if guided else [rows])

    # 2  Text -> keys and values of every layer, and the mask token.
    width = text_width(manifest, int(lengths.max()))
    read = engines.run(
        mllm_text.NAME,
        engines.put(mllm_text.NAME, **mllm_text.prompts(engines.spec(mllm_text.NAME), ids, width)),
        timings,
    )
    cache = {name: buffer for name, buffer in read.items() if name.startswith("text_")}
    mask_token = engines.backend.download(read["masked_token"])[:1]
    masked = (len(rows), manifest.model.num_visual_tokens, manifest.model.hidden_size)

    # 3  Masked decoding. Steps that reveal nothing change nothing and are not run.
    masks = schedules.reveal_masks(request.order, options.decoding_steps)
    active = [bool(mask.any()) for mask in masks]
    places, sources = schedules.reveal_rows(masks[active])
    decode = engines.loop(
        "visual_decode",
        {
            **cache,
            **engines.put(
                "visual_decode",
                tokens=np.array(np.broadcast_to(mask_token, masked)),
                step=np.zeros(1, np.int64),
                text_length=lengths,
                text_index=text_index,
                reveal_places=places,
                token_sources=sources,
                cfg_weight=np.array([options.cfg_weight], np.float32),
            ),
        },
        timings,
    )
    for t in range(options.decoding_steps):
        if active[t]:
            decode.step()  # 3.t
        if on_step_end:
            on_step_end("tokens", t, None, decode)
    tokens = decode.finish("tokens")
    found = engines.backend.download(tokens)
    checks.finite("visual_decode", "tokens", found, "image", earlier=cache)
    return tokens


def text_width(manifest: Manifest, longest: int) -> int:
    """How many tokens the texts of a run are padded to, of which the longest has `longest`.

    Graphs take any length. A compiled engine compiles kernels for every new one, so there it is one
    of a few: powers of two from `SHORTEST`, up to what the set takes.
    """
    compiled = any(spec.compiled is not None for spec in manifest.engines)
    if not compiled:
        return longest
    bucket = max(SHORTEST, 1 << (longest - 1).bit_length())
    most = manifest.dimensions["text_tokens"].max
    return bucket if most is None else max(longest, min(bucket, most))
