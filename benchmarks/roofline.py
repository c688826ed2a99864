"""How close an engine comes to what its machine can do at most: least time over measured time.

The least time is the planner's (`export/planning`): the larger of arithmetic over the peak rate and
bytes over the bandwidth, for the very sizes of the request. Where a ceiling is not known, or the
graphs are not there to be counted, there is no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ceilings
from benchmarks.candidates import Spec
from benchmarks.ceilings import Ceilings
from bifrost_rt import backends, dims, manifest, memory_plan
from bifrost_rt.dims import CACHE_TOKENS, NEW_TOKENS, TEXT_TOKENS
from bifrost_rt.errors import EngineSetError
from bifrost_rt.formats import of_layers
from bifrost_rt.manifest import EngineSpec, Manifest, stored_bytes
from bifrost_rt.tokenizers import Tokenizers
from export import formats
from export.formats import FORMATS, FULL


def ceilings_of(
    specs: Sequence[Spec], machine: Mapping[str, Any], earlier: Mapping[str, Ceilings] | None = None
) -> dict[str, Ceilings]:
    """Return what bounds the candidates: "cpu", measured now, and "gpu", where engines run on them
    and their ceilings are known.

    Args:
        machine: as `machine.describe()` gives it.
        earlier: of the same run; the higher figures of both are kept.
    """
    found = {}
    places = {_place(spec) for spec in specs}
    if "cpu" in places:
        found["cpu"] = ceilings.of_cpu(earlier["cpu"] if earlier else None)
    if "gpu" in places and (known := ceilings.of_gpu(machine)) is not None:
        found["gpu"] = known
    return found


def _place(spec: Spec) -> str | None:
    if not spec.runs_the_set:
        return None
    return "gpu" if backends.BACKENDS[spec.backend].gpu else "cpu"


def of_contender(
    spec: Spec,
    request: Mapping[str, Any],
    seconds: Mapping[str, Mapping[str, float]],
    known: Mapping[str, Ceilings],
) -> dict[str, Any]:
    """Least time and percent per engine, and in total where every engine has one; or `unknown` and
    why, where the machine's ceilings are known and the engines' arithmetic is not.

    Args:
        request: one image, with its steps.
        seconds: of each engine, its "p50".
    """
    bounds = known.get(_place(spec) or "")
    if bounds is None:
        return {}
    folder = Path(spec.engines)
    facts = manifest.read(folder)
    if (graphs := graphs_of(folder, facts)) is None:
        return {"unknown": "the ONNX set that it was compiled from is not in the folder beside it"}
    try:
        from export.planning import estimate, work  # brings torch
    except ModuleNotFoundError as error:
        return {"unknown": f"the Python package `{error.name}`, which counts, is not installed"}
    base = memory_plan.sizes(
        facts,
        guided=facts.defaults.cfg_weight != 1.0,
        decoding_steps=request["decoding_steps"],
        num_inference_steps=request["num_inference_steps"],
    )
    ids = Tokenizers(folder, facts.text).mllm_prompt(request["prompt"])
    read = (TEXT_TOKENS, NEW_TOKENS, CACHE_TOKENS)
    bandwidth = bounds.device.value("bandwidth")
    found: dict[str, Any] = {}
    for one in work.of_set(
        graphs,
        manifest.read(graphs),
        request["num_inference_steps"],
        request["decoding_steps"],
        lambda engine: {**base(engine), **dict.fromkeys(read, len(ids))},
    ):
        engine = facts.engine(one.engine)
        rate = rate_of(engine, spec.backend, bounds)
        if rate is None or bandwidth is None:
            continue
        files = stored_bytes(facts, engine)
        moved = one.tensors + (files if engine.compiled else one.weights(None))
        # what a cache may still hold from the call before need not come again
        moved = 0 if bounds.cache_bytes is None else max(0, moved - bounds.cache_bytes)
        least, limit = estimate.least_seconds(one, moved, rate, bandwidth)
        found[one.engine] = {
            "least_seconds": least,
            "percent": 100 * least / seconds[one.engine]["p50"],
            "limit": limit,
        }
    if found.keys() == set(dims.drawing(facts.engines)):
        total = sum(part["least_seconds"] for part in found.values())
        found["total"] = {"least_seconds": total, "percent": 100 * total / seconds["total"]["p50"]}
    return found


def rate_of(engine: EngineSpec, backend: str, bounds: Ceilings) -> float | None:
    """10^12 operations a second of the fastest arithmetic that an engine uses, so that its least
    time is one; None where one of them is not known."""
    if not backends.BACKENDS[backend].exact:
        return None  # bfloat16 on a CPU, which numpy cannot measure
    precision = engine.precision
    if engine.compiled is None:
        # a backend of graphs: bytes as they are, whatever else is stored in float32
        bytewise = [FORMATS[f.name] for f in of_layers(precision.layers) if f.multiplies_bytes]
        names = {declared.rate for declared in bytewise or [FULL]}
    else:
        layers = [FORMATS[f.name] for f in of_layers(precision.layers) if f.quantized]
        names = {formats.rate_of(precision.compute) or precision.compute}
        names |= {declared.rate for declared in layers}
    rates = [bounds.device.value(name) for name in names]
    return None if None in rates else max(rate for rate in rates if rate is not None)


def graphs_of(folder: Path, facts: Manifest) -> Path | None:
    """Say where the ONNX graphs of a set are: in it, or, where it was compiled, in a set beside it
    whose graphs have the hashes that it names."""
    sources = {spec.name: spec.compiled.source_sha256 for spec in facts.engines if spec.compiled}
    if not sources:
        return folder
    for other in sorted(folder.resolve().parent.iterdir()):
        try:
            beside = manifest.read(other)
        except EngineSetError:
            continue
        hashes = {
            spec.name: beside.files[spec.graph].sha256
            for spec in beside.engines
            if spec.compiled is None
        }
        if hashes == sources:
            return other
    return None
