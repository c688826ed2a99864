"""The plan of a build: all that is decided before an engine is traced.

A run reads a plan as it reads a manifest (`SetSpec`), so the torch modules draw from it before
there are engines, and the engines draw from it before there is a manifest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import bifrost_rt
from bifrost_rt import dims, image_processor
from bifrost_rt import manifest as manifests
from bifrost_rt.manifest import (
    Calibration,
    Chat,
    Defaults,
    EngineSpec,
    File,
    Lora,
    Manifest,
    ModelFacts,
    Range,
    Scheduler,
    Text,
    Vision,
)
from export import assemble, budget, chat, flux_files, parity, preprocessor, tokenizer_files
from export.checkpoint import Checkpoint
from export.planning.storage import Storage
from export.recipe import Recipe
from export.stages import Stage

VERSIONED = (
    *("torch", "transformers", "diffusers", "onnx", "onnxscript"),
    *("onnxruntime", "onnxruntime-gpu"),
)


@dataclass(frozen=True)
class BuildPlan:
    """One engine set before it is built, and while its engines are.

    Attributes:
        name: of the set's folder.
        stages: engine -> its module and tensors, in the order in which a run uses them.
        mllm_max_length: tokens of the longest chat prompt.
        ignored_files: of the checkpoint, which nothing reads.
        origins: network -> its file and what was lost in it (`Checkpoint.origins`).
        loras: whose products are added to the weights.
        demand: bytes that the build takes.
        engines: outlines; after `with_engines`, the engines.
        files: none; after `with_engines`, the engines' files.
    """

    recipe: Recipe
    name: str
    stages: Mapping[str, Stage]
    model: ModelFacts
    scheduler: Scheduler
    defaults: Defaults
    text: Text
    vision: Vision | None
    chat: Chat | None
    dimensions: Mapping[str, Range]
    mllm_max_length: int
    ignored_files: tuple[str, ...]
    origins: Mapping[str, Mapping[str, Any]]
    loras: tuple[Lora, ...]
    demand: budget.Demand
    engines: tuple[EngineSpec, ...]
    files: Mapping[str, File] = dataclasses.field(default_factory=dict)

    def engine(self, name: str) -> EngineSpec:
        """Find an engine by its name.

        Raises:
            EngineSetError: the plan has no such engine.
        """
        return manifests.engine_of(self, name)

    def with_engines(self, engines: tuple[EngineSpec, ...], files: Mapping[str, File]) -> BuildPlan:
        """Put what was built in the place of the outlines."""
        return dataclasses.replace(self, engines=engines, files=files)

    def manifest(self, files: Mapping[str, File], calibration: Calibration | None) -> Manifest:
        """Describe the finished set.

        Args:
            files: every file of the set but the manifest.
            calibration: where the scales come from; None where no layer has any.
        """
        return Manifest(
            format=manifests.FORMAT,
            name=self.name,
            backend=self.recipe.backend,
            builder=_versions(),
            model=self.model,
            scheduler=self.scheduler,
            defaults=self.defaults,
            text=self.text,
            vision=self.vision,
            chat=self.chat,
            dimensions=dict(self.dimensions),
            engines=self.engines,
            files=dict(files),
            calibration=calibration,
            loras=self.loras,
        )


def read_checkpoint(recipe: Recipe) -> tuple[Checkpoint, ModelFacts]:
    """Read the checkpoint's configs and headers, and check that its networks fit together.

    Raises:
        CheckpointError: a part is missing or foreign, or two sizes do not fit.
    """
    checkpoint = Checkpoint(
        *(Path(recipe.mllm), Path(recipe.bifrost), flux_files.of_recipe(recipe)),
        loras=recipe.loras,
        read=False,
    )
    return checkpoint, assemble.facts(checkpoint)


def draw_up(recipe: Recipe, checkpoint: Checkpoint, model: ModelFacts, folder: Path) -> BuildPlan:
    """Decide what is built; only the tokenizers are written.

    Args:
        folder: where the set is built.

    Raises:
        CheckpointError: a tokenizer, a preprocessor or a weight is missing or does not fit.
        RecipeError: a limit that leaves no image to look at.
    """
    length = recipe.mllm_max_length or checkpoint.max_seq_length
    vision = preprocessor.read(checkpoint, recipe.max_image_pixels)
    largest = None if vision is None else image_processor.limits(vision)
    tokenizers = tokenizer_files.write(checkpoint, folder, length, recipe.t5_max_length)
    stages = {
        stage.name: stage
        for stage in assemble.stages(
            *(checkpoint, model, length),
            *(tokenizers.clip.max_length, recipe.t5_max_length, vision),
        )
    }
    tokenizer = Tokenizer.from_file(str(folder / tokenizers.mllm.tokenizer))
    return BuildPlan(
        recipe=recipe,
        name=Path(recipe.output).name,
        stages=stages,
        model=model,
        scheduler=checkpoint.scheduler,
        defaults=Defaults(
            decoding_steps=model.num_visual_tokens,
            cfg_weight=1.0,
            num_inference_steps=28,
            guidance_scale=3.5,
            controlnet_conditioning_scale=0.7,
        ),
        text=tokenizers,
        vision=vision,
        chat=chat.read(checkpoint.mllm, tokenizer, recipe.think),
        dimensions=dims.ranges(
            max_images=recipe.max_images,
            mllm_max_length=length,
            num_visual_tokens=model.num_visual_tokens,
            max_windows=1 if largest is None else largest.windows,
            max_vision_tokens=1 if largest is None else largest.tokens,
            chunk=max(dims.CHUNK, length),
            context=assemble.context_length(checkpoint, length),
        ),
        mllm_max_length=length,
        ignored_files=tuple(checkpoint.ignored_files),
        origins=checkpoint.origins,
        loras=tuple(lora.said for lora in checkpoint.loras),
        demand=budget.demand(
            stages.values(),
            parity.sizes(length, model, recipe.max_images, vision),
            Storage.of_recipe(recipe),
        ),
        engines=tuple(stage.outline() for stage in stages.values()),
    )


def _versions() -> dict[str, str]:
    found = {"bifrost-rt": bifrost_rt.__version__, "python": platform.python_version()}
    for name in VERSIONED:
        # onnxruntime goes by several names, of which one is installed
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
