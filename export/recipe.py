"""What to build: a TOML recipe, flags on top of it, checked before anything is read."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bifrost_rt import files, serialization
from bifrost_rt.errors import TextFileError
from export import lora_files, shipped
from export.errors import RecipeError
from export.formats import FORMATS, FULL, HALF, SIXTEEN_BIT, eight_bit
from export.lora_files import LoraFile

COMPILED = ("tensorrt-rtx", "tensorrt")
BACKENDS = ("onnxruntime", *COMPILED)
METHODS = ("mse", "percentile", "max")
SIZES = ("mllm_max_length", "t5_max_length", "max_images", "max_steps", "calibration_steps")
MOST_PIXELS = 1 << 28  # of an image
LARGEST = 1 << 16  # of any size: tables grow with them
CHECKPOINT = ("mllm", "bifrost", "flux")
# What an MLLM that follows instructions is asked where it thinks before it draws.
REWRITE = (
    "Rewrite this request for an image as one detailed prompt. Say how everything in it looks and "
    "where it is, and name the background, the light and the style. Keep all that is asked for, "
    "with its numbers, colours and words. Answer with the prompt alone.\n\n{prompt}"
)
FILES = ("vae", "clip", "t5", "flux_configs")
PATHS = (*CHECKPOINT, *FILES, "output", "calibration_prompts", "statistics")


@dataclass(frozen=True)
class Recipe:
    """One engine set. Paths in a recipe file are relative to that file, or to `engines` where the
    file ships with this package (`shipped.base`).

    Attributes:
        mllm, bifrost, flux: the checkpoint folders.
        vae, clip, t5: single files that are read in the place of flux's own parts.
        flux_configs: beside a single file as flux, the folder with tokenizer/ and tokenizer_2/, and
            with the configs of what the tensors do not tell.
        lora: files of LoRA that are added to the weights of FLUX and its text encoders, each
            `FILE[:scale]`.
        output: the set's folder.
        mllm_max_length: tokens of the chat prompt; None takes the checkpoint's max_seq_length.
        t5_max_length: tokens of T5; FLUX pads to exactly this many.
        max_images: images per run; None sets no limit, which compiled engines cannot do.
        target: of compiled engines, the GPUs; none means this machine's own.
        max_steps: of compiled engines, steps of a loop; None takes the set's defaults.
        on_cpu: engines that are not compiled and run on the CPU, beside compiled ones.
        max_image_pixels: of an image that is looked at; larger ones are made smaller. None takes
            the checkpoint's limit, at most 1280 tokens.
        think: what the MLLM is asked where it thinks before it draws; `{prompt}` stands for the
            prompt.
        fit: a device of the planner's table, `here` or a size like "12GiB": precisions are chosen
            so that everything stays in its memory. The recipe then says none itself.
        fallback: what a quantized set stores its other weights in.
        stages: stage -> precision, where it is not the set's.
        layers: pattern of `stage:path` -> precision, such as "t5_text:*.block.0.*"; of several
            that fit, the last counts.
        calibration_prompts: a file, one prompt per line; None takes the list that ships.
        calibration_steps: of both loops, where the set's defaults take too long; None: all.
        statistics: a calibration.safetensors of the same checkpoint, instead of calibrating.
        scales: how an activation's range is chosen: "mse", "percentile" or "max".
        quality_budget: PSNR in dB that the images must keep to those in float32, on average;
            layers that cost most stay in 16 bit until they do.
    """

    mllm: str
    bifrost: str
    flux: str
    output: str
    precision: str = FULL.name
    backend: str = "onnxruntime"
    mllm_max_length: int | None = None
    t5_max_length: int = 512
    max_images: int | None = None
    target: tuple[str, ...] = ()
    max_steps: int | None = None
    on_cpu: tuple[str, ...] = ()
    max_image_pixels: int | None = None
    think: str = REWRITE
    fit: str | None = None
    fallback: str = HALF.name
    stages: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    calibration_prompts: str | None = None
    calibration_steps: int | None = None
    statistics: str | None = None
    scales: str = "mse"
    quality_budget: float | None = None
    vae: str | None = None
    clip: str | None = None
    t5: str | None = None
    flux_configs: str | None = None
    lora: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether any layer is."""
        asked = {self.precision, *self.stages.values(), *self.layers.values()}
        return any(FORMATS[name].quantized for name in asked)

    @property
    def folders(self) -> dict[str, str]:
        """The parts of the checkpoint, and where they are."""
        return {part: getattr(self, part) for part in CHECKPOINT}

    @property
    def paths(self) -> tuple[str, ...]:
        """Everything that weights are read from."""
        files = (self.vae, self.clip, self.t5)
        return (*self.folders.values(), *(file for file in files if file is not None))

    @property
    def loras(self) -> tuple[LoraFile, ...]:
        """The files of LoRA, with their scales."""
        return lora_files.parse_all(self.lora)

    def precision_of(self, stage: str) -> str:
        """Return what a stage was asked to be."""
        return self.stages.get(stage, self.precision)

    def __post_init__(self) -> None:
        lora_files.parse_all(self.lora)
        for name, value, known in self._named_choices():
            if value not in known:
                raise RecipeError(
                    f"{name} {value!r} is unknown{serialization.nearest(value, known)}",
                    hint=f"this version builds {', '.join(known)}",
                )
        if not self.quantized and self.fit is None:
            for name in ("statistics", "quality_budget"):
                if getattr(self, name) is not None:
                    raise RecipeError(
                        f"{name} is for quantized sets, and nothing in this one is",
                        hint="add --precision "
                        f"{' or '.join(f.name for f in eight_bit())}, or leave it out",
                    )
        if self.fit is not None:
            self._check_fit()
        if self.quality_budget is not None and not 0 < self.quality_budget <= 100:
            raise RecipeError(
                f"quality_budget is a PSNR in dB between 0 and 100, got {self.quality_budget:g}"
            )
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, got {value}")
            if value is not None and value > LARGEST:
                raise RecipeError(f"{name} must be at most {LARGEST}, got {value}")
        if "{prompt}" not in self.think:
            raise RecipeError(
                f"think {self.think!r} has no place for the prompt", hint="write {prompt} there"
            )
        if self.max_image_pixels is not None and not 1 <= self.max_image_pixels <= MOST_PIXELS:
            raise RecipeError(
                f"max_image_pixels must be 1 to {MOST_PIXELS}, got {self.max_image_pixels}"
            )
        if self.backend in COMPILED and self.max_images is None:
            raise RecipeError(
                f"backend {self.backend!r} needs max_images: engines plan memory for their largest "
                "run",
                hint="give it, such as --max-images 1",
            )
        if self.backend not in COMPILED and (self.target or self.max_steps or self.on_cpu):
            raise RecipeError(
                f"target, max_steps and on_cpu are for compiled engines, not for {self.backend!r}",
                hint="add --backend tensorrt-rtx, or leave them out",
            )

    def _check_fit(self) -> None:
        own = {
            "precision": self.precision != FULL.name,
            "quality_budget": self.quality_budget is not None,
            "stages": bool(self.stages),
            "layers": bool(self.layers),
        }
        if said := [name for name, chooses in own.items() if chooses]:
            raise RecipeError(
                f"fit {self.fit!r} chooses the precision of every engine and layer, and "
                f"{' and '.join(said)} would choose too",
                hint=f"leave out {'fit' if len(said) > 1 else f'fit or {said[0]}'}",
            )

    def _named_choices(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        known = tuple(FORMATS)
        yield "precision", self.precision, known
        yield "backend", self.backend, BACKENDS
        yield "fallback", self.fallback, tuple(f.name for f in SIXTEEN_BIT)
        yield "scales", self.scales, METHODS
        for name, precision in self.stages.items():
            yield f"stages.{name}", precision, known
        for name, precision in self.layers.items():
            yield f"layers.{name}", precision, known


def read(path: Path, overrides: dict[str, object]) -> Recipe:
    """Return a recipe file with flags on top.

    A set of another precision or for another backend than the recipe's has a folder of its own
    beside the recipe's, unless `overrides` name one: the recipe's set is what others open.

    Raises:
        RecipeError: the file cannot be read, or does not hold a recipe; unknown keys come with the
            nearest known one. Or the set of another checkpoint would take the place of the
            recipe's.
    """
    try:
        data = tomllib.loads(files.read_text(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except TextFileError as error:
        raise RecipeError(error.message, hint=error.hint) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    for key in PATHS:
        if isinstance(data.get(key), str):
            data[key] = str(shipped.base(path) / data[key])
    if isinstance(data.get("lora"), list):
        data["lora"] = [
            str(shipped.base(path) / one) if isinstance(one, str) else one for one in data["lora"]
        ]
    if "mllm" in overrides and not _same(overrides["mllm"], data.get("mllm")):
        data.pop("think", None)  # it is what the recipe's own MLLM was trained to answer
    if "output" not in overrides and isinstance(data.get("output"), str):
        data["output"] = _output(data, overrides, path)
    return load({**data, **overrides}, str(path))


def _output(data: dict[str, Any], overrides: dict[str, object], path: Path) -> str:
    """Say where a recipe's set goes that flags have changed."""
    for part in (*CHECKPOINT, *FILES):
        if part in overrides and not _same(overrides[part], data.get(part)):
            raise RecipeError(
                f"{path}: a set of another checkpoint would take the place of the recipe's, "
                f"{data['output']}",
                hint="name its folder: --output DIR",
            )
    if "lora" in overrides and overrides["lora"] != data.get("lora"):
        raise RecipeError(
            f"{path}: a set with a LoRA would take the place of the recipe's, {data['output']}",
            hint="name its folder: --output DIR",
        )
    own = {"precision": Recipe.precision, "backend": Recipe.backend, "fit": Recipe.fit, **data}
    changed = [k for k in ("precision", "fit", "backend") if overrides.get(k, own[k]) != own[k]]
    return "-".join([data["output"], *(re.sub(r"[^\w.-]", "", str(overrides[k])) for k in changed)])


def _same(folder: object, other: object) -> bool:
    if other is None:
        return False
    return os.path.realpath(str(folder)) == os.path.realpath(str(other))


def load(data: dict[str, object], where: str) -> Recipe:
    """Return a recipe from plain data; `where` is how errors call it."""
    try:
        return serialization.load(Recipe, data)
    except serialization.SerializationError as error:
        raise RecipeError(f"{where}: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from None
