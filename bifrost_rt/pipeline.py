"""The product, read top to bottom: from token ids to pixels.

The runtime does no arithmetic of its own here, but for what an edit keeps of its image. It hands
buffers from engine to engine; what does not change inside a loop is computed before it, and a step
marked `.t` is one call on memory that was bound beforehand.

Source: arXiv 2508.05954, and the inference script published with it, which this computes exactly
once instead of nine times (`docs/benchmarks.md`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import memory_plan, prompt_cache, prompt_inputs, schedules, text_inputs
from bifrost_rt.backends.base import Buffer
from bifrost_rt.engines import Carried, Engines, Loop
from bifrost_rt.errors import BudgetError
from bifrost_rt.known_region import KnownRegion
from bifrost_rt.manifest import SetSpec
from bifrost_rt.notes import Note
from bifrost_rt.numerics import Checks
from bifrost_rt.request import Request, Thought
from bifrost_rt.tokenizers import Tokenizers

# How many requests it is worth drawing together where engines leave for others: more save little
# more, and the first waits for the last.
TOGETHER = 8

StepEnd = Callable[[str, int, float | None, Carried], None]
# Yields the name of every engine before it is used; returns what was computed.
Steps = Generator[str, None, dict[str, Buffer]]


@dataclass(frozen=True)
class Output:
    """What a run leaves behind. n images, N visual tokens, S image tokens."""

    tokens: NDArray[np.float32]  # [n, N, D]
    latents: NDArray[np.float32]  # [n, S, C]
    images: NDArray[np.uint8] | None  # [n, H, W, 3]; None when only latents were asked for
    timings: dict[str, float]  # seconds per engine, and `total`
    notes: tuple[Note, ...] = ()  # what was asked for and not done
    thoughts: Mapping[str, Thought] = field(default_factory=dict)  # of each prompt, where it thinks


# What runs a set's engines for a checked request. `generate` is the product's.
Generate = Callable[[Engines, Tokenizers, SetSpec, Request], Output]


def generate(
    engines: Engines,
    tokenizers: Tokenizers,
    manifest: SetSpec,
    request: Request,
    on_step_end: StepEnd | None = None,
) -> Output:
    """Run a checked request.

    Args:
        on_step_end: called as (carried tensor's name, step, timestep or None, loop) after every
            step of both loops.

    Raises:
        NumericsError: what an engine has left is not finite. Looked at between engines, never
            inside a loop.
    """
    run = Run(engines, tokenizers, manifest, request, on_step_end)
    engines.begin(used_engines(request), sizes(manifest, request), without=run.kept)
    return _finished(run)


def generate_several(
    engines: Engines,
    tokenizers: Tokenizers,
    manifest: SetSpec,
    requests: Sequence[Request],
    on_step_ends: Sequence[StepEnd | None],
) -> list[Output]:
    """Run checked requests, whose images are those that each would get alone.

    Where engines must leave, the runs go through them side by side: every engine is opened once for
    all of them, as far as memory holds what each run has computed. Where everything stays, one run
    follows the other.

    Raises:
        BudgetError, NumericsError: as `generate` does, for the first request that raises.
    """
    if len(requests) > 1:
        runs = [
            Run(engines, tokenizers, manifest, request, on_step_end)
            for request, on_step_end in zip(requests, on_step_ends, strict=True)
        ]
        used = {name for request in requests for name in used_engines(request)}
        order = [spec.name for spec in manifest.engines if spec.name in used]
        largest = memory_plan.largest([sizes(manifest, request) for request in requests])
        try:
            reloads = engines.begin(
                order,
                largest,
                waiting=len(runs),
                without=lambda: set.intersection(*[run.kept() for run in runs]),
            )
        except BudgetError:
            half = len(requests) // 2
            parts = (slice(0, half), slice(half, None))
            return [
                output
                for part in parts
                for output in generate_several(
                    engines, tokenizers, manifest, requests[part], on_step_ends[part]
                )
            ]
        if reloads:
            return _side_by_side(order, runs)
    return [
        generate(engines, tokenizers, manifest, request, on_step_end)
        for request, on_step_end in zip(requests, on_step_ends, strict=True)
    ]


class Run:
    """A request on its way through the engines."""

    def __init__(
        self,
        engines: Engines,
        tokenizers: Tokenizers,
        manifest: SetSpec,
        request: Request,
        on_step_end: StepEnd | None = None,
    ) -> None:
        self.timings: dict[str, float] = {}
        self._start = time.perf_counter()
        self._engines, self._tokenizers = engines, tokenizers
        self._manifest, self._request = manifest, request
        self._on_step_end = on_step_end
        self._known: dict[str, prompt_cache.Outputs] = {}
        download = engines.backend.download
        self._checks = Checks(manifest, request, download, replaced=on_step_end is not None)

    def kept(self) -> set[str]:
        """Return the engines that it need not run, because their outputs are kept. From now on it
        holds on to these."""
        known = {name: outputs for name in self._text if (outputs := self._kept(name)) is not None}
        self._known = known
        return set(known) | ({"clip_text", "t5_text"} if "conditioning" in known else set())

    def steps(self) -> Generator[str, None, Output]:
        """Go through the engines; yields the name of each before it is used."""
        request, options = self._request, self._request.parameters
        engines, down = self._engines, self._engines.backend.download

        # 1-3  Prompt -> CLIP latents, unless they were made before.
        if request.tokens is None or request.decodes:
            tokens = yield from self._decode()
        else:
            tokens = engines.put("control_embed", tokens=request.tokens)
        final_tokens = down(tokens["tokens"]).copy()

        # 4-5  The raw prompt -> all of it that the denoising steps read.
        conditions = yield from self._condition()

        # 6  CLIP latents -> the ControlNet's condition.
        yield "control_embed"
        conditions |= engines.run("control_embed", tokens, self.timings)
        del tokens

        # 7  Denoising.
        yield "denoise"
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
                    step_weights=self._denoising.weights,
                    controlnet_conditioning_scale=scale,
                ),
            },
            self.timings,
        )
        for t in range(options.num_inference_steps):
            if self._denoising.computed[t]:
                denoise.step()  # 7.t
                if request.known is not None:
                    self._keep_known(request.known, denoise, self._denoising.reached[t])
            if self._on_step_end:
                self._on_step_end("latents", t, float(self._timesteps[t]), denoise)
        latents = denoise.finish("latents")
        final_latents = down(latents).copy()
        self._checks.finite("denoise", "latents", final_latents, "image", earlier=conditions)
        del conditions

        # 8  Latents -> pixels.
        images = None
        if request.output_type != "latent":
            yield "vae_decode"
            decoded = engines.run("vae_decode", {"latents": latents}, self.timings)
            images = down(decoded["images"]).copy()
            if request.known is not None:
                images = request.known.put_back(images)
        engines.check_files()
        self.timings["total"] = time.perf_counter() - self._start
        return Output(final_tokens, final_latents, images, self.timings)

    def _decode(self) -> Steps:
        """Yield the MLLM's part: the final visual tokens [B, N, D]."""
        request, options, engines = self._request.decoding, self._request.parameters, self._engines

        # 1-2  Text -> keys and values of every layer, and the mask token.
        texts, spec = self._mllm_texts, engines.spec("mllm_text")
        cache = yield from self._text_outputs(
            spec.name, lambda: text_inputs.prompts(spec, texts.ids, texts.width)
        )
        mask_token = engines.backend.download(cache.pop("masked_token"))[:1]
        model = self._manifest.model
        shape = (request.images, model.num_visual_tokens, model.hidden_size)
        begin = np.array(np.broadcast_to(mask_token, shape))
        if request.tokens is not None and request.masked is not None:
            begin = np.where(request.masked[:, :, None], begin, request.tokens)

        # 3  Masked decoding. Steps that reveal nothing change nothing and are not run.
        yield "visual_decode"
        masks = schedules.reveal_masks(request.order, options.decoding_steps, request.masked)
        active = [bool(mask.any()) for mask in masks]
        places, sources = schedules.reveal_rows(masks[active])
        if (regions := self._request.regions) is not None:
            sources = schedules.joined_regions(sources, masks[active], regions)
        decode = engines.loop(
            "visual_decode",
            {
                **cache,
                **engines.put(
                    "visual_decode",
                    tokens=begin,
                    step=np.zeros(1, np.int64),
                    text_length=texts.lengths,
                    text_index=texts.index,
                    reveal_places=places,
                    token_sources=sources,
                    cfg_weight=np.array([options.cfg_weight], np.float32),
                ),
            },
            self.timings,
        )
        rows = request.images // self._request.images  # of an image, which are equal
        carried = decode if rows == 1 else _FirstRows(decode, rows)
        for t in range(options.decoding_steps):
            if active[t]:
                decode.step()  # 3.t
            if self._on_step_end:
                self._on_step_end("tokens", t, None, carried)
        tokens = decode.finish("tokens")
        found = engines.backend.download(tokens)
        self._checks.finite("visual_decode", "tokens", found, "image", earlier=cache)
        if rows > 1:
            return engines.put("control_embed", tokens=np.ascontiguousarray(found[::rows]))
        return {"tokens": tokens}

    def _keep_known(self, known: KnownRegion, loop: Loop, level: float) -> None:
        """Put the known region into the latents, which have reached this noise level."""
        latents: NDArray[np.float32] = loop.copy("latents")
        loop.replace("latents", known.blended(latents, self._request.latents, level))

    def _condition(self) -> Steps:
        """Yield what the denoising steps read of the prompt: contexts and modulations."""
        if (kept := self._kept("conditioning")) is not None:
            return self._engines.put_kept("conditioning", kept)

        # 4  Text embeddings of the diffusion networks.
        embeds: dict[str, Buffer] = {}
        for name in ("clip_text", "t5_text"):
            ids = functools.partial(self._text.__getitem__, name)
            outputs = yield from self._text_outputs(name, ids)
            for tensor, buffer in outputs.items():
                found = self._engines.backend.download(buffer)
                self._checks.finite(name, tensor, found, "prompt")
            embeds |= outputs

        # 5  Everything that no denoising step changes.
        return (yield from self._text_outputs("conditioning", lambda: self._conditioning, embeds))

    def _text_outputs(
        self,
        name: str,
        inputs: Callable[[], Mapping[str, NDArray[Any]]],
        computed: Mapping[str, Buffer] | None = None,
    ) -> Steps:
        """Yield what an engine gives for this text, computed once as long as it is kept.

        Args:
            inputs: made when the engine runs: those of the MLLM hold an empty cache.
            computed: inputs that other engines gave.
        """
        engines = self._engines
        if self._kept(name) is None:
            yield name
        if (kept := self._kept(name)) is not None:  # maybe of a run beside this one
            return engines.put_kept(name, kept)
        given = {**(computed or {}), **engines.put(name, **inputs())}
        outputs = engines.run(name, given, self.timings)
        if name == "mllm_text":
            outputs = text_inputs.of_drawing(outputs)
        found = {tensor: engines.backend.download(buffer) for tensor, buffer in outputs.items()}
        engines.prompts.keep(self._key(name), found)
        return outputs

    def _kept(self, name: str) -> prompt_cache.Outputs | None:
        return self._known.get(name) or self._engines.prompts.get(self._key(name))

    def _key(self, name: str) -> bytes:
        return prompt_cache.key(name, self._text[name])

    @cached_property
    def _text(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Engine that reads a text -> all that its outputs follow from."""
        prompts = self._request.prompts
        texts = {
            "clip_text": {"input_ids": self._tokenizers.clip(prompts)},
            "t5_text": {"input_ids": self._tokenizers.t5(prompts)},
        }
        given = {f"{name}.{tensor}": ids for name in texts for tensor, ids in texts[name].items()}
        texts["conditioning"] = {**given, **self._conditioning}
        if self._request.decodes:
            texts["mllm_text"] = self._mllm_texts.arrays
        return texts

    @cached_property
    def _mllm_texts(self) -> prompt_inputs.MllmTexts:
        return prompt_inputs.mllm_texts(self._tokenizers, self._manifest, self._request.decoding)

    @cached_property
    def _conditioning(self) -> dict[str, NDArray[Any]]:
        """What `conditioning` is given beside the text embeddings."""
        facts: dict[str, NDArray[Any]] = {
            "prompt_index": self._request.prompt_index,
            "timesteps": self._timesteps[list(self._denoising.computed)],
        }
        if self._manifest.model.guidance_embeds:
            scale = self._request.parameters.guidance_scale
            facts["guidance_scale"] = np.array([scale], np.float32)
        return facts

    @cached_property
    def _timesteps(self) -> NDArray[np.float32]:
        sigmas, _ = denoising(self._manifest, self._request)
        return schedules.timesteps(sigmas, self._manifest.scheduler)

    @cached_property
    def _denoising(self) -> schedules.DenoisingPlan:
        return denoising(self._manifest, self._request)[1]


class _FirstRows:
    """A loop of which every image has several rows that are equal, as one of a row each."""

    def __init__(self, loop: Loop, rows: int) -> None:
        self._loop, self._rows = loop, rows

    def copy(self, name: str) -> NDArray[Any]:
        """Return a host copy of each image's first row."""
        return self._loop.copy(name)[:: self._rows].copy()

    def replace(self, name: str, array: NDArray[Any]) -> None:
        """Overwrite all rows of each image."""
        self._loop.replace(name, np.repeat(array, self._rows, axis=0))


def _finished(run: Run) -> Output:
    """Return the output of a run that goes on alone."""
    steps = run.steps()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            output: Output = end.value
            return output


def _side_by_side(order: Sequence[str], runs: Sequence[Run]) -> list[Output]:
    """Return the outputs of runs that use every engine one after another before any uses the
    next."""
    outputs: dict[int, Output] = {}
    going = [run.steps() for run in runs]
    ahead: dict[int, str] = {}  # the engine that each run is about to use

    def go_on(i: int) -> None:
        try:
            ahead[i] = next(going[i])
        except StopIteration as end:
            ahead.pop(i, None)
            outputs[i] = end.value

    for i in range(len(runs)):
        go_on(i)
    for name in order:
        for i in range(len(runs)):
            if ahead.get(i) == name:
                go_on(i)
    return [outputs[i] for i in range(len(runs))]


def denoising(
    manifest: SetSpec, request: Request
) -> tuple[NDArray[np.float32], schedules.DenoisingPlan]:
    """Return the noise levels of the denoising steps, [steps + 1], and which steps are computed."""
    options = request.parameters
    sigmas = schedules.sigmas(
        options.num_inference_steps, manifest.model.num_image_tokens, manifest.scheduler
    )
    return sigmas, schedules.denoising_plan(sigmas, options.cache_interval)


def used_engines(request: Request) -> tuple[str, ...]:
    """Return the engines that a request uses, in this order, each once."""
    mllm = ("mllm_text", "visual_decode") if request.decodes else ()
    text = ("clip_text", "t5_text", "conditioning")
    vae = ("vae_decode",) if request.output_type != "latent" else ()
    return (*mllm, *text, "control_embed", "denoise", *vae)


def sizes(manifest: SetSpec, request: Request) -> memory_plan.Sizes:
    """Return what a request makes of the symbols of the engines' inputs and outputs."""
    options = request.parameters

    def of(one: Request) -> memory_plan.Sizes:
        return memory_plan.sizes(
            manifest,
            images=one.images,
            prompts=len(one.prompts),
            guided=options.cfg_weight != 1.0,
            decoding_steps=options.decoding_steps,
            num_inference_steps=options.num_inference_steps,
        )

    decoding, drawing = of(request.decoding), of(request)
    mllm = used_engines(request)[:2] if request.decodes else ()
    return lambda engine: (decoding if engine in mllm else drawing)(engine)
