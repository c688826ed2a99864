"""The same graphs without this project's runtime: what a user of the library alone would write.

The opponent that shows our overhead. Graphs, inputs, schedule and the library's options are those
of the set on its backend; everything else is the library's plain API: numpy arrays go in by name,
new ones come out, and the loop is a loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.metering import Meter
from bifrost_rt import manifest, schedules, text_inputs
from bifrost_rt.backends.choice import openvino_refuses
from bifrost_rt.errors import BackendError, EngineSetError
from bifrost_rt.manifest import EngineSpec
from bifrost_rt.tokenizers import Tokenizers

Arrays = dict[str, NDArray[Any]]
Call = Callable[[Mapping[str, NDArray[Any]]], Arrays]

# As the backends of these names set it, for the same arithmetic (bifrost_rt/backends/openvino.py).
OPENVINO_ARITHMETIC = {"openvino": "f32", "openvino-bf16": "bf16"}


def openvino_options(backend: str) -> dict[str, str]:
    """Properties of a compiled model."""
    return {
        "INFERENCE_PRECISION_HINT": OPENVINO_ARITHMETIC[backend],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "PERFORMANCE_HINT": "LATENCY",
    }


class Bare:
    """A set's graphs in OpenVINO or onnxruntime, on the CPU.

    Args:
        backend: whose library and arithmetic: "onnxruntime", "openvino" or "openvino-bf16".
        meter: counts opening and running the graphs.

    Raises:
        BackendError: another backend, its library is not installed, or the backend refuses the set.
        EngineSetError: the set holds compiled engines, not graphs.
    """

    def __init__(self, engines: str, backend: str, meter: Meter) -> None:
        folder = Path(engines)
        self._facts = facts = manifest.read(folder)
        if any(spec.compiled for spec in facts.engines):
            raise EngineSetError(
                f"{folder}: a bare run needs ONNX graphs, this set was compiled for "
                f"{facts.backend}",
                hint="compare with the ONNX set that it was compiled from",
            )
        if backend not in ("onnxruntime", *OPENVINO_ARITHMETIC):
            raise BackendError(
                f"there is no bare run on {backend!r}",
                hint="bare@onnxruntime, bare@openvino or bare@openvino-bf16",
            )
        try:
            opener = _onnxruntime() if backend == "onnxruntime" else _openvino(backend)
        except ModuleNotFoundError as error:
            raise BackendError(f"the Python package `{error.name}` is not installed") from None
        self._meter = meter
        self._tokenizers = Tokenizers(folder, facts.text)
        self._calls = {
            spec.name: meter.watch(opener)(folder / spec.graph, spec) for spec in facts.engines
        }

    def draw(self, request: Mapping[str, Any]) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """Images [n, H, W, 3], and seconds per engine, of the MLLM and in total."""
        start = time.perf_counter()
        timings: dict[str, float] = {}
        calls = {name: self._meter.watch(call) for name, call in self._calls.items()}

        def run(name: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
            began = time.perf_counter()
            outputs: Arrays = calls[name](inputs)
            timings[name] = timings.get(name, 0.0) + time.perf_counter() - began
            return outputs

        tokens = self._decode(run, request)
        latents = self._denoise(run, request, tokens)
        images = run("vae_decode", {"latents": latents})["images"]
        timings["total"] = time.perf_counter() - start
        return images, {**timings, "mllm": timings["mllm_text"] + timings["visual_decode"]}

    def _decode(self, run: Callable[..., Arrays], request: Mapping[str, Any]) -> NDArray[Any]:
        defaults, prompts = self._facts.defaults, _prompts(request)
        steps = request.get("decoding_steps") or defaults.decoding_steps
        guided = defaults.cfg_weight != 1.0
        texts = list(dict.fromkeys(["", *prompts] if guided else prompts))
        ids = [self._tokenizers.mllm_prompt(text) for text in texts]
        index = np.array([[texts.index(prompt) for prompt in prompts]])
        if guided:
            index = np.concatenate([np.full_like(index, texts.index("")), index])
        spec = self._facts.engine(text_inputs.NAME)
        read = run(spec.name, text_inputs.prompts(spec, ids, max(map(len, ids))))
        model = self._facts.model
        order = schedules.random_orders(request["seed"], len(prompts), model.num_visual_tokens)
        masks = schedules.reveal_masks(order, steps)
        masks = masks[[bool(mask.any()) for mask in masks]]
        places, sources = schedules.reveal_rows(masks)
        inputs = {
            **{name: array for name, array in read.items() if name.startswith("text_")},
            "tokens": np.tile(read["masked_token"][:1], (len(prompts), model.num_visual_tokens, 1)),
            "step": np.zeros(1, np.int64),
            "text_length": np.array([len(row) for row in ids], np.int64),
            "text_index": index,
            "reveal_places": places,
            "token_sources": sources,
            "cfg_weight": np.array([defaults.cfg_weight], np.float32),
        }
        for _ in masks:
            inputs |= self._carried("visual_decode", run("visual_decode", inputs))
        return inputs["tokens"]

    def _denoise(
        self, run: Callable[..., Arrays], request: Mapping[str, Any], tokens: NDArray[Any]
    ) -> NDArray[Any]:
        facts, prompts = self._facts, _prompts(request)
        steps = request.get("num_inference_steps") or facts.defaults.num_inference_steps
        distinct = list(dict.fromkeys(prompts))
        sigmas = schedules.sigmas(steps, facts.model.num_image_tokens, facts.scheduler)
        conditioning = {
            **run("clip_text", {"input_ids": self._tokenizers.clip(distinct)}),
            **run("t5_text", {"input_ids": self._tokenizers.t5(distinct)}),
            "prompt_index": np.array([distinct.index(prompt) for prompt in prompts]),
            "timesteps": schedules.timesteps(sigmas, facts.scheduler),
        }
        if facts.model.guidance_embeds:
            scale = facts.defaults.guidance_scale
            conditioning["guidance_scale"] = np.array([scale], np.float32)
        control_scale = facts.defaults.controlnet_conditioning_scale
        latents = schedules.random_latents(
            request["seed"],
            len(prompts),
            (facts.model.num_image_tokens, facts.model.latent_channels),
        )
        inputs = {
            **run("conditioning", conditioning),
            **run("control_embed", {"tokens": tokens}),
            "latents": latents,
            "velocity": np.zeros_like(latents),
            "step": np.zeros(1, np.int64),
            "step_weights": schedules.denoising_plan(sigmas, interval=1).weights,
            "controlnet_conditioning_scale": np.array([control_scale], np.float32),
        }
        for _ in range(steps):
            inputs |= self._carried("denoise", run("denoise", inputs))
        return inputs["latents"]

    def _carried(self, name: str, outputs: Arrays) -> Arrays:
        """Return what a step hands to the next."""
        state = self._facts.engine(name).state
        return {s.input: outputs[s.output] for s in state}


def _prompts(request: Mapping[str, Any]) -> list[str]:
    given = request["prompt"]
    return [given] if isinstance(given, str) else list(given)


def _onnxruntime() -> Callable[[Path, EngineSpec], Call]:
    import onnxruntime as ort

    from bifrost_rt.backends.onnxruntime import session_options

    def opened(path: Path, spec: EngineSpec) -> Call:
        options, disabled = session_options(spec)
        session = ort.InferenceSession(
            str(path),
            sess_options=options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=disabled,
        )
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))

    return opened


def _openvino(backend: str) -> Callable[[Path, EngineSpec], Call]:
    import openvino as ov

    from bifrost_rt.backends import openvino_operators

    core = ov.Core()
    openvino_operators.add_to(core)

    def opened(path: Path, spec: EngineSpec) -> Call:
        if refused := openvino_refuses(spec.precision.layers):
            reason, hint = refused
            raise BackendError(f"{path}: {reason}", hint=hint)
        model = core.compile_model(path, "CPU", openvino_options(backend))
        infer = model.create_infer_request()
        names = [output.name for output in spec.outputs]

        def call(inputs: Mapping[str, NDArray[Any]]) -> Arrays:
            # inputs are read where they lie; outputs are copies, which may be the next inputs
            results = infer.infer(dict(inputs), share_inputs=True)
            return {name: results[name] for name in names}

        return call

    return opened
