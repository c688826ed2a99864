"""What to build: a TOML recipe, flags on top of it, checked before anything is read."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from bifrost_rt import strict
from export.errors import RecipeError
from export.precision import PRECISIONS

COMPILED = ("tensorrt-rtx", "tensorrt")
BACKENDS = ("onnxruntime", *COMPILED)


@dataclass(frozen=True)
class Recipe:
    """One engine set. Paths in a recipe file are relative to that file.

    Attributes:
        mllm, bifrost, flux: the checkpoint folders.
        output: the set's folder.
        mllm_max_length: tokens of the chat prompt; None takes the checkpoint's max_seq_length.
        t5_max_length: tokens of T5; FLUX pads to exactly this many.
        max_images: images per run; None sets no limit, which compiled engines cannot do.
        target: of compiled engines, the GPUs; none means this machine's own.
        max_steps: of compiled engines, steps of a loop; None takes the set's defaults.
    """

    mllm: str
    bifrost: str
    flux: str
    output: str
    precision: str = "fp32"
    backend: str = "onnxruntime"
    mllm_max_length: int | None = None
    t5_max_length: int = 512
    max_images: int | None = None
    target: tuple[str, ...] = ()
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("precision", PRECISIONS), ("backend", BACKENDS)):
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(
                    f"{name} {value!r} is unknown{strict.nearest(value, known)}",
                    hint=f"this version builds {', '.join(known)}",
                )
        for name in ("mllm_max_length", "t5_max_length", "max_images", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, got {value}")
        if self.backend in COMPILED and self.max_images is None:
            raise RecipeError(
                f"backend {self.backend!r} needs max_images: engines plan memory for their largest "
                "run",
                hint="give it, such as --max-images 1",
            )
        if self.backend not in COMPILED and (self.target or self.max_steps):
            raise RecipeError(
                f"target and max_steps are for compiled engines, not for {self.backend!r}",
                hint="add --backend tensorrt-rtx, or leave them out",
            )


def read(path: Path, overrides: dict[str, object]) -> Recipe:
    """A recipe file with flags on top.

    Raises:
        RecipeError: the file cannot be read, or does not hold a recipe; unknown keys come with the
            nearest known one.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    for key in ("mllm", "bifrost", "flux", "output"):
        if isinstance(data.get(key), str):
            data[key] = str(path.parent / data[key])
    return load({**data, **overrides}, str(path))


def load(data: dict[str, object], where: str) -> Recipe:
    """A recipe from plain data; `where` is how errors call it."""
    try:
        return strict.load(Recipe, data)
    except strict.StrictError as error:
        raise RecipeError(f"{where}: {error}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from None
