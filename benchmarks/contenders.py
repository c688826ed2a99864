"""What is timed: an engine set, or the official loop on the same checkpoint.

Each contender lives in a process of its own, so that loading, first image and peak memory are its
alone, and the parent can let them run in turn.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from bifrost_rt import manifest
from bifrost_rt.errors import BifrostError, EngineSetError

MLLM = ("text_prefill", "visual_decode")


@dataclass(frozen=True)
class Spec:
    """A contender as the command line names it: a set, its backend, or the reference loop on the
    checkpoint that the set was built from."""

    name: str
    engines: str
    backend: str | None = None
    reference: bool = False


class Contender(Protocol):
    """Runs requests; `image` gives seconds per part, `mllm` and `total` among them."""

    def image(self, request: dict[str, Any]) -> dict[str, float]:
        """Run one request."""


class EngineSet:
    """`bifrost_rt` on one set."""

    def __init__(self, spec: Spec) -> None:
        from bifrost_rt import Generator

        self._generator = Generator(spec.engines, backend=spec.backend)

    def image(self, request: dict[str, Any]) -> dict[str, float]:
        """One run."""
        timings = self._generator.run(**request).timings
        return {**timings, "mllm": sum(timings[name] for name in MLLM)}


class ReferenceLoop:
    """The official loop in torch, on the weights that the set was built from."""

    def __init__(self, spec: Spec) -> None:
        from benchmarks.reference import Reference

        recipe = json.loads((Path(spec.engines) / "report.json").read_text())["recipe"]
        self._facts = manifest.read(Path(spec.engines))
        self._reference = Reference(
            recipe["mllm"],
            recipe["bifrost"],
            recipe["flux"],
            mllm_max_length=self._facts.text.mllm.max_length,
            t5_max_length=self._facts.text.t5.max_length,
        )

    def image(self, request: dict[str, Any]) -> dict[str, float]:
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
        return {**result.timings, "total": time.perf_counter() - start}


class Remote:
    """A contender in a process of its own.

    Raises:
        EngineSetError: it could not be loaded; with the message of the process.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        start = time.perf_counter()
        self._process.start()
        theirs.close()
        self.load_seconds = float(self._receive())
        self.start_seconds = time.perf_counter() - start

    def image(self, request: dict[str, Any]) -> dict[str, float]:
        """Run one request there."""
        self._pipe.send(request)
        timings: dict[str, float] = self._receive()
        return timings

    def close(self) -> int:
        """End the process and return its peak memory in bytes."""
        self._pipe.send(None)
        peak = int(self._receive())
        self._process.join()
        return peak

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            raise EngineSetError(
                f"{self.spec.name}: the process ended with status {self._process.exitcode}",
                hint="out of memory is the usual cause",
            ) from None
        if kind == "error":
            raise EngineSetError(f"{self.spec.name}: {value}")
        return value


def set_digest(engines: str) -> str:
    """What identifies a set: the hash of its manifest, which holds the hash of everything else."""
    return hashlib.sha256((Path(engines) / manifest.FILENAME).read_bytes()).hexdigest()


def _serve(spec: Spec, pipe: Connection) -> None:
    try:
        start = time.perf_counter()
        contender: Contender = ReferenceLoop(spec) if spec.reference else EngineSet(spec)
        pipe.send(("ok", time.perf_counter() - start))
        while (request := pipe.recv()) is not None:
            pipe.send(("ok", contender.image(request)))
        pipe.send(("ok", _peak_bytes()))
    except BifrostError as error:
        pipe.send(("error", str(error)))


def _peak_bytes() -> int:
    path = Path("/proc/self/status")  # the peak of getrusage is the parent's across a fork
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
