"""The steps of a build, in their order, after its plan is drawn up.

reserve         what memory and disk the build takes, or a refusal
(quantize)      calibrate, and change the modules: `export.quantize`
write_engines   trace, cast and write every engine that is not there already
read_back       what every layer of the files really is
compare         every engine beside torch, on the values of a real run
write_report    what was asked, built and found
draw_selftest   the image that the set is known by
write_manifest  the description of all that, with the hash of every file
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from bifrost_rt import backends, image_processor, request, selftest
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.base import Backend
from bifrost_rt.memory_plan import size_text
from export import budget, engine_files, memory, parity, stage_cache, torch_pipeline
from export.budget import Share
from export.build_plan import BuildPlan
from export.checkpoint import Checkpoint
from export.engine_set import describe_files
from export.graph_partitions import Bounded
from export.quantize import audit
from export.quantize.quantize import QuantizeResult
from export.shared_weights import SharedWeights
from export.stage_cache import StageCache

Say = Callable[[str], None]
# Engine -> what a step has found of it.
Findings = Mapping[str, Any]


def reserve(plan: BuildPlan, cache: StageCache, memory: int | None, say: Say) -> Share:
    """Divide the memory of the build, and check that the set has room on its disk.

    Args:
        memory: bytes that the build may take; None: what the machine has available.

    Raises:
        BuildError: the memory or the disk is too small.
    """
    share = budget.share(plan.demand, memory)
    budget.check_disk(plan.demand, Path(plan.recipe.output), cache.bytes_there)
    say(f"at most {size_text(share.total)} of memory, {size_text(plan.demand.disk)} on disk")
    return share


def write_engines(
    plan: BuildPlan,
    layers: QuantizeResult,
    checkpoint: Checkpoint,
    cache: StageCache,
    folder: Path,
    say: Say,
) -> BuildPlan:
    """Write every engine that the cache does not have, and return the plan with the engines in it.

    Raises:
        ExportError: torch cannot trace a module, or ONNX's checker refuses a graph.
    """
    configs = stage_cache.configs_digest(
        checkpoint.mllm, checkpoint.bifrost, *checkpoint.flux.paths
    )
    counted = memory.one_image(plan.mllm_max_length)
    largest = None if plan.vision is None else image_processor.limits(plan.vision)
    shared, engines = SharedWeights(plan.stages.values()), []
    for name, stage in plan.stages.items():
        fallback = layers.fallback[name]
        key = stage_cache.key(stage, configs, fallback, counted, shared.before(stage))
        done = cache.get(name, key)
        if done is None:
            say(f"building {name}")
            made = engine_files.write(stage, folder, fallback, counted, largest, shared)
            done = cache.put(name, key, *made)
        else:
            say(f"{name} is there already")
        shared.add(stage, key, done.facts.get("stored", {}))
        asked = plan.recipe.precision_of(name)
        engines.append(engine_files.describe(stage, folder, list(done.files), done.facts, asked))
    return plan.with_engines(tuple(engines), cache.files)


def read_back(built: BuildPlan, layers: QuantizeResult, folder: Path, say: Say) -> Findings:
    """Read what every layer of the engines is, and compare it with what was decided.

    Raises:
        PrecisionError: naming the layer, what was decided and what the file holds.
    """
    say("reading back what every layer is")
    return audit.audit(
        folder, list(built.engines), {name: layers.of(name) for name in built.stages}
    )


def compare(built: BuildPlan, folder: Path, share: Share, say: Say) -> Findings:
    """Run the engines beside their torch modules.

    Raises:
        ParityError: naming the engine that differs, by how much and by how much it may.
    """
    say("comparing every engine with torch")
    return parity.compare(folder, built, built.stages, _backend(built, share), share)


def write_report(
    built: BuildPlan,
    layers: QuantizeResult,
    cache: StageCache,
    precisions: Findings,
    errors: Findings,
    folder: Path,
) -> None:
    """Write `report.json`: the recipe, and all that was found of every engine and layer.

    Args:
        precisions: as `read_back` has found them.
        errors: as `compare` has found them.
    """
    recipe = built.recipe
    engines = cache.report()
    for name, found in precisions.items():
        engines[name]["precision"] = found
    for name, found in errors.items():
        engines[name]["parity"] = found
    document = {
        "recipe": dataclasses.asdict(recipe),
        "prompts": parity.prompts(built),
        "ignored_files": built.ignored_files,
        "origins": built.origins,
        "loras": [dataclasses.asdict(lora) for lora in built.loras],
        "engines": engines,
        "layers": layers.record(),
    }
    if layers.swept is not None and recipe.quality_budget is not None:
        document["sensitivity"] = layers.swept.record(recipe.quality_budget)
    (folder / stage_cache.REPORT).write_text(json.dumps(document, indent=1) + "\n")


def draw_selftest(built: BuildPlan, folder: Path, share: Share, say: Say) -> None:
    """Draw the image that other machines compare theirs with, uint8 [H, W, 3], and write it."""
    say("drawing the self-test image")
    checked = request.check(built, **selftest.REQUEST, output_type="np")
    backend = _backend(built, share)
    drawn = torch_pipeline.draw(folder, built, backend, checked, memory_budget=share.engines)
    assert drawn.images is not None
    Image.fromarray(drawn.images[0]).save(folder / selftest.IMAGE)


def write_manifest(
    built: BuildPlan, layers: QuantizeResult, cache: StageCache, folder: Path
) -> None:
    """Write the manifest of the finished set: the last file, once."""
    manifest = built.manifest(describe_files(folder, cache.files), layers.calibration)
    (folder / manifests.FILENAME).write_bytes(manifest.dumps())
    assert manifests.read(folder) == manifest


def _backend(built: BuildPlan, share: Share) -> Backend:
    """Open what runs the engines, in pieces where they do not fit."""
    return Bounded(backends.load(built.recipe.backend), share.engine)
