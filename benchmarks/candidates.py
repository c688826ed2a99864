"""What is timed: an engine set, its graphs bare in their library, or the official loop."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.metering import Meter, MeteredBackend
from bifrost_rt import backends, manifest
from bifrost_rt.backends.choice import choose
from bifrost_rt.errors import EngineSetError
from bifrost_rt.files import read_text

MLLM = ("mllm_text", "visual_decode")
Kind = Literal["set", "bare", "reference", "reference-compiled"]
KINDS: tuple[Kind, ...] = ("bare", "reference", "reference-compiled")


@dataclass(frozen=True)
class Spec:
    """A candidate as the command line names it.

    Attributes:
        engines: the set; for the reference, the one from whose checkpoint it is.
        backend: the backend; of a bare run, the one whose library and arithmetic it takes.
    """

    name: str
    engines: str
    backend: str
    kind: Kind = "set"
    device: str = "cpu"  # torch's, of the reference

    @property
    def runs_the_set(self) -> bool:
        """Whether it computes the set's graphs."""
        return self.kind in ("set", "bare")


def parse(text: str, first: str) -> Spec:
    """`DIR`, `DIR@BACKEND`, `bare`, `bare@BACKEND`, `reference`, `reference-compiled`, or one of
    these two `@cuda`.

    Args:
        first: the candidate that the others are compared with; all but the first two are of its
            set.

    Raises:
        EngineSetError: there is no set, or the reference was asked for on a backend.
    """
    what, _, backend = text.partition("@")
    folder, _, its_backend = first.partition("@")
    kind: Kind = next((kind for kind in KINDS if kind == what), "set")
    if kind == "set":
        folder, its_backend = what, ""
    elif kind != "bare" and backend not in ("", "cuda"):
        raise EngineSetError(
            f"{text}: the official loop runs in torch, on no other backend",
            hint=f"{kind}, or {kind}@cuda for torch on an NVIDIA GPU",
        )
    device = "cpu"
    if kind in ("reference", "reference-compiled") and backend:
        device, backend = backend, ""
    runs_on = backend or its_backend or choose(manifest.read(Path(folder))).name
    return Spec(text.rstrip("/"), folder, runs_on, kind, device)


class Candidate(Protocol):
    """Draws requests."""

    def draw(self, request: dict[str, Any]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """Images [n, H, W, 3], and seconds per part, `mllm` and `total` among them."""


def load(spec: Spec, meter: Meter) -> Candidate:
    """Everything that is loaded before a first request.

    Args:
        meter: counts what the engines take.

    Raises:
        BifrostError: it cannot be loaded, with the reason.
    """
    if spec.kind == "set":
        return EngineSet(spec, meter)
    if spec.kind == "bare":
        from benchmarks.bare import Bare

        return Bare(spec.engines, spec.backend, meter)
    return ReferenceLoop(spec)


class EngineSet:
    """`bifrost_rt` on one set."""

    def __init__(self, spec: Spec, meter: Meter) -> None:
        from bifrost_rt import Generator

        backend: Any = MeteredBackend(backends.load(spec.backend), meter)
        self._generator = Generator(spec.engines, backend=backend, prompt_cache=0)

    def draw(self, request: dict[str, Any]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """One run. The total is all that a caller waits for, the check of the request included."""
        start = time.perf_counter()
        result = self._generator.run(**request, output_type="np")
        total = time.perf_counter() - start
        timings = {**result.timings, "total": total}
        return np.asarray(result.images), {**timings, "mllm": sum(timings[name] for name in MLLM)}


class ReferenceLoop:
    """The official loop in torch, on the weights that the set was built from."""

    def __init__(self, spec: Spec) -> None:
        from benchmarks.reference import Reference

        recipe = json.loads(read_text(Path(spec.engines) / "report.json"))["recipe"]
        self._facts = manifest.read(Path(spec.engines))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers constructs its own deprecated class
            self._reference = Reference(
                recipe["mllm"],
                recipe["bifrost"],
                recipe["flux"],
                mllm_max_length=self._facts.text.mllm.max_length,
                t5_max_length=self._facts.text.t5.max_length,
                device=spec.device,
            )
        if spec.kind == "reference-compiled":
            self._reference.compile()

    def draw(self, request: dict[str, Any]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """One run, with the order and noise that the runtime draws from the same seed."""
        from bifrost_rt import schedules

        facts, defaults = self._facts.model, self._facts.defaults
        prompts = [request["prompt"]] if isinstance(request["prompt"], str) else request["prompt"]
        n = len(prompts)
        start = time.perf_counter()
        result = self._reference.run(
            prompts,
            order=schedules.random_orders(request["seed"], n, facts.num_visual_tokens),
            latents=schedules.random_latents(
                request["seed"], n, (facts.num_image_tokens, facts.latent_channels)
            ),
            decoding_steps=request.get("decoding_steps", defaults.decoding_steps),
            num_inference_steps=request.get("num_inference_steps", defaults.num_inference_steps),
            cfg_weight=defaults.cfg_weight,
            guidance_scale=defaults.guidance_scale,
            controlnet_conditioning_scale=defaults.controlnet_conditioning_scale,
        )
        total = time.perf_counter() - start
        return result.image_u8.numpy(), {**result.timings, "total": total}


def set_digest(engines: str) -> str:
    """Return what identifies a set: the hash of its manifest, which holds the hash of everything
    else."""
    return hashlib.sha256((Path(engines) / manifest.FILENAME).read_bytes()).hexdigest()
