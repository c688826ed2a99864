"""What one image asks of each engine: weights, memory and arithmetic.

From a checkpoint's outline (config files and tensor headers, `Checkpoint(read=False)`), by running
the project's own modules on the meta device, where tensors have shapes and no values; or from a
built set, by reading its graphs without their weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import nn

from bifrost_rt import dims, memory_plan
from bifrost_rt.dims import STEPS
from bifrost_rt.manifest import EngineSpec, Manifest, stored_bytes
from export import assemble, flops, memory
from export.checkpoint import Checkpoint
from export.compile import mixed_precision
from export.planning import answers
from export.planning.answers import Answers
from export.planning.kernel_times import Calls
from export.planning.storage import Elements, Storage
from export.planning.trace import Trace, run_without_values, storage_key
from export.precision import ROUNDED, SMALL
from export.quantize import policy
from export.stages import Stage
from export.tokenizer_files import clip_length

KV = ("text_keys.", "text_values.")


@dataclass(frozen=True)
class Work:
    """One engine of one image. Bytes of memory as if it computed in float32.

    Attributes:
        weights: bytes of weights at a storage, None for the storage that a set was built with.
        calls: how often it runs for an image.
        flops: of one call; a multiply-add counts two.
        cache: bytes of the K/V cache among its tensors.
        tensors: bytes of its inputs and outputs.
        scratch: bytes between its inputs and outputs.
        linear: whether linear layers, which 8 bit and fewer apply to, do most of its arithmetic.
        answers: of the engine that answers in words.
        elements: what `weights` counts; None where the graphs themselves say it.
    """

    engine: str
    weights: Callable[[Storage | None], int]
    calls: int
    flops: int
    cache: int
    tensors: int
    scratch: int
    linear: bool
    answers: Answers | None = None
    elements: Elements | None = None


def of_checkpoint(
    checkpoint: Checkpoint, mllm_max_length: int, t5_length: int, steps: int, images: int = 1
) -> list[Work]:
    """Return the engines that draw, as `export.build` would make them of a checkpoint.

    Args:
        checkpoint: opened with `read=False`.
        steps: denoising steps; decoding takes the release's one step per visual token.
        images: that are drawn at once, each of a prompt of its own.

    Raises:
        CheckpointError: the outline is not that of a supported checkpoint.
    """
    model = assemble.facts(checkpoint)
    clip_tokens = clip_length(checkpoint)
    sizes = dims.of_run(images=images, prompts=images, text_tokens=mllm_max_length, steps=steps)
    decoding = {**sizes, STEPS: model.num_visual_tokens}
    return [
        of_stage(stage, decoding if dims.decodes(stage.outline()) else sizes)
        for stage in assemble.stages(checkpoint, model, mllm_max_length, clip_tokens, t5_length)
        if not dims.reads_image(stage.outline())
    ]


def of_set(
    folder: Path,
    manifest: Manifest,
    steps: int,
    decoding_steps: int | None = None,
    at: memory_plan.Sizes | None = None,
) -> list[Work]:
    """Return the engines of a built set that draw, from its graphs; weights are not read.

    Args:
        steps: denoising steps.
        decoding_steps: of the MLLM. Default: the set's.
        at: engine -> a number for every symbol of its inputs and outputs. Default: one image of
            the longest prompt, without guidance.
    """
    decoding_steps = decoding_steps or manifest.defaults.decoding_steps
    at = at or memory_plan.sizes(manifest, decoding_steps=decoding_steps, num_inference_steps=steps)
    found = []
    for spec in manifest.engines:
        if dims.reads_image(spec):
            continue
        graph = ir.load(folder / spec.graph)
        stored = sum(
            value.const_value.nbytes
            for value in graph.graph.initializers.values()
            if value.const_value is not None
        )
        arithmetic = flops.count(graph, at(spec.name))
        convolutions = flops.count(graph, at(spec.name), flops.CONVOLUTIONS)
        found.append(
            Work(
                engine=spec.name,
                weights=_fixed(stored),
                calls=dims.calls(spec, at(spec.name)),
                flops=arithmetic,
                cache=_cache(spec, at(spec.name)),
                tensors=memory_plan.tensor_bytes(spec, at(spec.name)),
                scratch=memory.scratch_bytes(graph, at(spec.name)),
                linear=2 * convolutions < arithmetic,
                answers=answers.of(spec, at(spec.name), _table(graph)),
            )
        )
    return found


def of_calls(manifest: Manifest, calls: Sequence[Calls], at: memory_plan.Sizes) -> list[Work]:
    """Return the engines of a compiled set, from the plans inside them and the builder's own
    figures.

    Args:
        at: what the calls were read for.
    """
    found = []
    for one in calls:
        spec = manifest.engine(one.engine)
        assert spec.compiled is not None
        found.append(
            Work(
                engine=one.engine,
                weights=_fixed(stored_bytes(manifest, spec)),
                calls=one.calls,
                flops=one.operations,
                cache=_cache(spec, at(one.engine)),
                tensors=memory_plan.tensor_bytes(spec, at(one.engine)),
                scratch=spec.compiled.activation_bytes,
                linear=True,
            )
        )
    return found


def _table(graph: ir.Model) -> int:
    """Return bytes of the tables that rows are looked up in."""
    looked_up = (node.inputs[0] for node in graph.graph if node.op_type == "Gather")
    tables = {value for value in map(mixed_precision.constant, looked_up) if value is not None}
    return max((v.const_value.nbytes for v in tables if v.const_value is not None), default=0)


def _fixed(stored: int) -> Callable[[Storage | None], int]:
    return lambda storage: stored


def of_stage(stage: Stage, sizes: Mapping[str, int]) -> Work:
    """One engine that `export.build` would make. The stage's module goes to the meta device.

    Args:
        sizes: a number for every symbol of its inputs and outputs.

    Raises:
        CheckpointError: its networks cannot be run at these sizes.
    """
    spec = stage.outline()
    trace = run_without_values(stage, sizes)
    elements = count_elements(stage, trace)
    return Work(
        engine=stage.name,
        weights=elements.bytes_at,
        calls=dims.calls(spec, sizes),
        flops=trace.flops,
        cache=_cache(spec, sizes),
        tensors=memory_plan.tensor_bytes(spec, sizes),
        scratch=trace.scratch,
        linear=sum(layer.weights for layer in elements.layers) > elements.other,
        answers=answers.of(spec, sizes),
        elements=elements,
    )


def _cache(spec: EngineSpec, sizes: Mapping[str, int]) -> int:
    return sum(
        4 * math.prod(dims.shape_at(t.shape, sizes))
        for t in (*spec.inputs, *spec.outputs)
        if t.name.startswith(KV)
    )


def count_elements(stage: Stage, trace: Trace) -> Elements:
    """Return the numbers that an engine stores, by how a precision treats them: the weights that
    meet an input, and what the exporter computes beforehand from those that do not."""
    layers, kept = [], 0
    other = trace.folded // 4
    seen: set[int] = set()
    for path, layer in stage.module.named_modules():
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            if tensor is None or (key := storage_key(tensor)) in seen or key not in trace.weights:
                continue
            seen.add(key)
            whole = name != "weight" or not isinstance(layer, ROUNDED)
            if type(layer) is nn.Linear and not whole:
                layers.append(policy.layer(stage, path, layer))
            elif whole or tensor.nbytes < SMALL:
                kept += tensor.nbytes
            else:
                other += tensor.numel()
    return Elements(stage.name, tuple(layers), other, kept)
