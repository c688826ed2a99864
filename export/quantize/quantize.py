"""The whole step: stages in, stages with quantized layers out, and the record of how."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bifrost_rt import cache, pipeline
from bifrost_rt.dims import IMAGES
from bifrost_rt.manifest import Calibration, SetSpec
from export import formats as declared
from export import precision, stage_cache
from export.exercise import draw_look_answer
from export.quantize import apply, calibrate, policy, sweep
from export.quantize.apply import Decision
from export.quantize.formats import FORMATS
from export.quantize.statistics import Statistics
from export.quantize.sweep import Sweep
from export.recipe import Recipe
from export.stages import Stage

STATISTICS = "calibration.safetensors"


@dataclass(frozen=True)
class QuantizeResult:
    """What became of every linear layer.

    Attributes:
        fallback: stage -> what its other weights are stored in.
        calibration: None where no layer needed one.
        swept: None where no quality budget was set.
    """

    fallback: dict[str, str]
    decisions: tuple[Decision, ...]
    calibration: Calibration | None
    swept: Sweep | None = None

    def of(self, stage: str) -> dict[str, str]:
        """path -> precision, of a stage's linear layers."""
        return {d.choice.path: d.given for d in self.decisions if d.choice.stage == stage}

    def sixteen_bit(self, stage: str) -> dict[str, str]:
        """path -> precision, of a stage's linear layers that are not quantized."""
        return {path: fmt for path, fmt in self.of(stage).items() if fmt not in FORMATS}

    def record(self) -> dict[str, dict[str, Any]]:
        """For the report: what every layer was asked to be, is, and why."""
        return {d.choice.name: d.record() for d in self.decisions}


def quantize(
    recipe: Recipe,
    folder: Path,
    manifest: SetSpec,
    stages: Mapping[str, Stage],
    say: Callable[[str], None],
    kept: int | None = None,
    older: Path | None = None,
    generate: pipeline.Generate = draw_look_answer,
) -> QuantizeResult:
    """Calibrate where it is needed, decide, and change the stages' modules in place.

    Args:
        folder: of the set that is built; its tokenizers are there, and the statistics go there.
        kept: bytes of weights that may stay in memory while the chain runs in torch; None: all.
        older: a set whose statistics are used where they are what would be seen. What a build that
            was cut off has left in `folder` is continued; what another precision of the model has
            seen comes from the cache folder.
        generate: what runs the engines.

    Raises:
        RecipeError: overrides that fit nothing.
        CalibrationError: prompts or statistics that cannot calibrate this checkpoint.
    """
    choices = policy.choose(
        list(stages.values()), recipe.precision, recipe.fallback, recipe.stages, recipe.layers
    )
    statistics, calibration = None, None
    if any(c.quantized and FORMATS[c.fmt].calibrated for c in choices):
        statistics, calibration = _statistics(
            recipe, folder, manifest, stages, say, kept, older, generate
        )
    decisions = apply.decide(stages, choices, statistics, recipe.fallback, recipe.scales)
    swept = None
    if recipe.quality_budget is not None:
        prompts = (
            calibrate.read_prompts(_prompts(recipe)) if statistics is None else statistics.prompts
        )
        bench = sweep.Bench(folder, manifest, stages, prompts, kept)
        swept = sweep.sweep(bench, decisions, recipe.quality_budget, say)
        decisions = sweep.keep(decisions, swept.kept, recipe.fallback)
    apply.replace(stages, decisions)
    outcome = QuantizeResult({}, tuple(decisions), calibration, swept)
    fallback = {
        name: policy.rest(
            declared.FORMATS[recipe.precision_of(name)],
            [declared.FORMATS[given] for given in outcome.of(name).values()],
            declared.FORMATS[recipe.fallback],
        ).name
        for name in stages
    }
    for name, stage in stages.items():
        precision.round_weights(stage.module, fallback[name], outcome.sixteen_bit(name))
    return dataclasses.replace(outcome, fallback=fallback)


def _prompts(recipe: Recipe) -> Path:
    return Path(recipe.calibration_prompts or calibrate.DEFAULT_PROMPTS)


def _statistics(
    recipe: Recipe,
    folder: Path,
    manifest: SetSpec,
    stages: Mapping[str, Stage],
    say: Callable[[str], None],
    kept: int | None,
    older: Path | None,
    generate: pipeline.Generate,
) -> tuple[Statistics, Calibration]:
    checkpoint = calibrate.fingerprint(
        [Path(path) for path in recipe.paths], [lora.described() for lora in recipe.loras]
    )
    if recipe.statistics is not None:
        found = Statistics.load(Path(recipe.statistics), checkpoint)
    else:
        prompts = calibrate.read_prompts(_prompts(recipe))
        key = _key(recipe, manifest, checkpoint, prompts)
        here = folder / STATISTICS
        stored = None if here.exists() else cache.read(STATISTICS, key)
        if stored is not None:
            here.write_bytes(stored)
        places = [here] if older is None else [here, older / STATISTICS]
        earlier = (Statistics.unfinished(place, key) for place in places)
        found = calibrate.calibrate(
            folder,
            manifest,
            stages,
            next(filter(None, earlier), Statistics(checkpoint, prompts, key=key)),
            say,
            steps=recipe.calibration_steps,
            kept=kept,
            keep=lambda seen: seen.save(here),
            generate=generate,
        )
        if stored is None and (reason := cache.write(STATISTICS, key, here.read_bytes())):
            say(f"the statistics are not kept for other precisions: {reason}")
    found.save(folder / STATISTICS)
    return found, Calibration(STATISTICS, checkpoint, len(found.prompts), recipe.scales)


def _key(recipe: Recipe, manifest: SetSpec, checkpoint: str, prompts: Sequence[str]) -> str:
    """Return what changes with everything that decides what calibration sees."""
    facts = {
        "checkpoint": checkpoint,
        "prompts": list(prompts),
        "steps": recipe.calibration_steps,
        "defaults": dataclasses.asdict(manifest.defaults),
        "text": dataclasses.asdict(manifest.text),
        "images": manifest.dimensions[IMAGES].max,
        "engines": [spec.name for spec in manifest.engines],
        **stage_cache.surroundings(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
