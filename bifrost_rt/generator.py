"""The public face: open an engine set, run prompts, get pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from bifrost_rt import backends, engines, handover, manifest, pipeline, request, residency
from bifrost_rt.backends.base import Backend
from bifrost_rt.backends.choice import Choice, choose
from bifrost_rt.engines import Loop
from bifrost_rt.errors import BudgetError, EngineSetError, RequestError, RequestTypeError
from bifrost_rt.previews import Previews
from bifrost_rt.result import Result
from bifrost_rt.text import Tokenizers

DEFAULT_SET = Path("engines/sets/default")

log = logging.getLogger("bifrost_rt")

StepCallback = Callable[["Generator", int, float | None, dict[str, Any]], Mapping[str, Any] | None]


class Generator:
    """An opened engine set.

    Args:
        path: the set's folder, as written by `python -m export.build`. None opens the default
            model's set, where `python -m export.build` writes it: `engines/sets/default` in the
            current folder or in this package's checkout.
        backend: a driver's name, or one that is already started. Default: the one that the set was
            compiled for; for ONNX graphs, the fastest exact one that is installed for the CPU.
        memory_budget: what engines and their tensors may take together, as bytes or as text
            ("8GiB"); the Python process itself comes on top. Engines leave and come back as it
            demands, and the pictures stay the same. Default: what the device has free when the
            set is opened, less a tenth. Where everything fits, everything stays open.

    Attributes:
        backend: the driver's name, and why it was taken.

    Raises:
        EngineSetError, IntegrityError: the set is missing, foreign or damaged; every file is
            checked against its hash.
        BackendError: the driver is not available here, with the reason.
        BudgetError: a stage exceeds the budget by itself.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        backend: str | Backend | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        given = None if memory_budget is None else residency.parse(memory_budget)
        self.path = default_set() if path is None else Path(path)
        self.manifest = manifest.read(self.path)
        engines.verify(self.path, self.manifest)
        if backend is None:
            self.backend = choose(self.manifest)
        else:
            name = backend if isinstance(backend, str) else backend.name
            self.backend = Choice(name, "it was asked for")
        log.info("backend %s: %s", self.backend.name, self.backend.reason)
        self._tokenizers = Tokenizers(self.path, self.manifest.text)
        asked = self.backend.name if backend is None else backend
        started = backends.load(asked) if isinstance(asked, str) else asked
        budget = residency.default_budget(started.free_memory()) if given is None else given
        self._engines = engines.Engines(self.path, self.manifest, started, budget)

    def run(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        controlnet_conditioning_scale: float | None = None,
        decoding_steps: int | None = None,
        cfg_weight: float | None = None,
        cache_interval: int | None = None,
        height: int | None = None,
        width: int | None = None,
        order: ArrayLike | None = None,
        latents: ArrayLike | None = None,
        tokens: ArrayLike | None = None,
        output_type: request.OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        preview_every: int | None = None,
    ) -> Result:
        """Draw one prompt or several. Names and meanings follow diffusers' FluxPipeline; a value of
        None takes the set's default.

        Args:
            prompt: a text, or a list of texts of any lengths. Images come prompt by prompt.
            seed: of the reveal order and the starting noise. The same seed gives the same bits, and
                image i does not depend on how many are drawn. None draws one; see `Result.seed`.
            num_images_per_prompt: images for each prompt.
            num_inference_steps: denoising steps.
            guidance_scale: embedded guidance; without effect (and logged so) where neither network
                of the model has a guidance embedding.
            controlnet_conditioning_scale: how strongly the CLIP latents steer the image.
            decoding_steps: steps in which the MLLM reveals its N visual tokens, from 1 to beyond N.
            cfg_weight: classifier-free guidance of the MLLM. 1 is off and costs nothing.
            cache_interval: compute every so many denoising steps and extrapolate the others. 1 is
                off; above, pictures are another: `python -m benchmarks.options` says by how much.
            height, width: must be the set's own, where given.
            order: [n, N], per image a permutation of its places, instead of the seed's.
            latents: [n, S, C] packed starting noise, instead of the seed's.
            tokens: [n, N, D] CLIP latents of an earlier result: the MLLM is not run, and seed,
                steps and control scale may differ.
            output_type: "pil" for `PIL.Image`s, "np" for uint8 [n, H, W, 3], "latent" to stop
                before the VAE.
            callback_on_step_end: called as (generator, step, timestep, tensors) after every step of
                both loops: decoding with `{"tokens": [n, N, D]}` and timestep None, then denoising
                with `{"latents": [n, S, C]}`. The arrays are copies and may be kept; a returned
                dict replaces them. An exception ends the run and leaves the generator usable.
            preview_every: after every so many denoising steps the callback's dict also has
                `"preview"`, uint8 [n, H, W, 3]: what the picture will be, estimated from the step,
                for the price of one VAE decode.

        Raises:
            RequestError, RequestTypeError: an argument that cannot be served.
            BudgetError: so many pictures do not fit into the memory budget, or previews need
                engines that it does not keep.
        """
        checked = request.check(
            self.manifest,
            prompt=prompt,
            seed=seed,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            decoding_steps=decoding_steps,
            cfg_weight=cfg_weight,
            cache_interval=cache_interval,
            height=height,
            width=width,
            order=order,
            latents=latents,
            output_type=output_type,
            tokens=tokens,
        )
        default = self.manifest.defaults.guidance_scale
        if guidance_scale not in (None, default) and not self.manifest.model.guidance_embeds:
            log.warning(
                "guidance_scale=%s has no effect: this model has no guidance embedding",
                guidance_scale,
            )
        out = self.draw(checked, callback_on_step_end, preview_every)
        images: Any = out.latents if out.images is None else out.images
        if checked.output_type == "pil":
            images = [Image.fromarray(image) for image in images]
        parameters = request.parameters(checked, prompt, num_images_per_prompt)
        passed = {"order": order, "latents": latents, "tokens": tokens}
        if injected := {
            name: handover.digest(getattr(checked, name))
            for name, given in passed.items()
            if given is not None
        }:
            parameters["injected"] = injected
        return Result(images, out.tokens, out.latents, out.timings, checked.seed, parameters)

    def draw(
        self,
        checked: request.Request,
        callback_on_step_end: StepCallback | None = None,
        preview_every: int | None = None,
    ) -> pipeline.Output:
        """Draw a request that `request.check` or `request.merge` made; the rest is as in `run`."""
        previews = on_step_end = None
        if callback_on_step_end:
            previews = None if preview_every is None else self._previews(checked, preview_every)
            on_step_end = self._adapter(callback_on_step_end, previews)
        elif preview_every is not None:
            raise RequestError("preview_every without callback_on_step_end: nobody would see them")
        out = pipeline.generate(
            self._engines, self._tokenizers, self.manifest, checked, on_step_end
        )
        if previews is not None:
            out.timings["preview"] = previews.seconds
        return out

    def _previews(self, checked: request.Request, every: int) -> Previews:
        if reason := self.no_previews():
            raise BudgetError(reason, hint="leave previews out, or give a larger memory budget")
        # too many pictures are refused before their noise is drawn
        self._engines.begin(pipeline.stages(checked), pipeline.sizes(self.manifest, checked))
        return Previews(self._engines, self.manifest, checked, every)

    def no_previews(self) -> str | None:
        """Why `preview_every` cannot be served, or None where it can."""
        if {spec.name for spec in self.manifest.engines} <= set(self._engines.resident):
            return None
        return "previews need every engine in memory at once, and the memory budget is smaller"

    def _adapter(self, callback: StepCallback, previews: Previews | None) -> pipeline.StepEnd:
        def on_step_end(name: str, step: int, timestep: float | None, loop: Loop) -> None:
            current = loop.copy(name)
            tensors: dict[str, Any] = {name: current}
            if (
                previews
                and name == "latents"
                and (picture := previews.after(step, current)) is not None
            ):
                tensors["preview"] = picture
            returned = callback(self, step, timestep, tensors)
            if returned is None:
                return
            if not isinstance(returned, Mapping):
                raise RequestTypeError(
                    "callback_on_step_end must return a dict or None, "
                    f"got {type(returned).__name__}"
                )
            if unknown := set(returned) - {name}:
                raise RequestError(
                    f"callback_on_step_end returned {sorted(map(str, unknown))}; "
                    f"this loop can replace {name!r} only"
                )
            if name in returned:
                new = np.asarray(returned[name])
                if new.shape != current.shape:
                    raise RequestError(
                        f"callback_on_step_end returned {name} of shape {list(new.shape)}, "
                        f"expected {list(current.shape)}"
                    )
                loop.replace(name, new.astype(current.dtype))
                if previews and name == "latents":
                    previews.replaced(new.astype(current.dtype))

        return on_step_end

    def close(self) -> None:
        """Free the engines' memory."""
        self._engines.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def default_set() -> Path:
    """The default model's set: in the current folder, or in this package's checkout.

    Raises:
        EngineSetError: it has not been built.
    """
    places = [Path.cwd(), Path(__file__).parents[1]]
    for place in places:
        if (place / DEFAULT_SET / manifest.FILENAME).is_file():
            return place / DEFAULT_SET
    raise EngineSetError(
        f"no default engine set: looked for {DEFAULT_SET} in {places[0]} and {places[1]}",
        hint="`python -m export.build` in a checkout builds it; or pass the folder of another set",
    )
