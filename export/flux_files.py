"""Where each part of FLUX lies: in the folders of a diffusers pipeline, or in single files, with a
folder beside them that has the tokenizers and, if need be, the configs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export import foreign, identity
from export.configs import Config
from export.dialects import autoencoder, clip, flux, t5
from export.dialects.named import Named
from export.errors import CheckpointError
from export.identity import Part
from export.recipe import Recipe
from export.weights import Weights

# diffusers' own name for weights, and the one that a network saved by hand has.
DIFFUSERS_STEMS = ("diffusion_pytorch_model", "model")
TOKENIZERS = (
    "give a folder with tokenizer/ and tokenizer_2/ as --flux-configs, for example from "
    "`hf download black-forest-labs/FLUX.1-dev --include 'tokenizer*/*' --local-dir DIR`"
)


@dataclass(frozen=True)
class Kind:
    """One network of FLUX.

    Attributes:
        what: how errors call it.
        option: which one names its file.
        stems: names of its weights in its folder.
        named: its tensors by our names.
        config: what its tensors tell of its config.
        inside: prefixes that its tensors have in a file of the whole model.
        marks: tensors of which a file of it alone has one.
    """

    what: str
    option: str
    part: Part
    stems: tuple[str, ...]
    named: Callable[[Weights], Named]
    config: Callable[[Named], dict[str, Any]]
    inside: tuple[str, ...]
    marks: tuple[str, ...]


KINDS = {
    "transformer": Kind(
        "FLUX's transformer",
        *("flux", identity.TRANSFORMER, DIFFUSERS_STEMS, flux.named, flux.config),
        ("model.diffusion_model.",),
        (flux.MARK, "x_embedder.weight"),
    ),
    "vae": Kind(
        "FLUX's VAE",
        *("vae", identity.VAE, DIFFUSERS_STEMS, autoencoder.named, autoencoder.config),
        ("vae.", "first_stage_model."),
        ("decoder.conv_in.weight",),
    ),
    "text_encoder": Kind(
        "CLIP's text encoder",
        *("clip", identity.CLIP, ("model",), clip.named, clip.config),
        ("text_encoders.clip_l.transformer.",),
        tuple(f"{p}embeddings.token_embedding.weight" for p in (clip.PREFIX, "")),
    ),
    "text_encoder_2": Kind(
        "T5's encoder",
        *("t5", identity.T5, ("model",), t5.named, t5.config),
        ("text_encoders.t5xxl.transformer.",),
        (t5.MARK, *t5.EMBEDDINGS),
    ),
}
# Of a file of the whole model, beside its parts.
INSIDE_UNUSED = ("text_encoders.clip_l.logit_scale", "text_encoders.t5xxl.logit_scale")


@dataclass
class FluxFiles:
    """The parts of FLUX, opened when they are asked for.

    Args:
        flux: a diffusers pipeline folder, or a file of the transformer or of the whole model.
        files: option -> a file that is read in the place of the pipeline's own part.
        configs: beside a file, the folder that a pipeline's tokenizers and configs stand in.

    Attributes:
        pipeline: the folder with the tokenizers.
    """

    flux: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    configs: Path | None = None

    def __post_init__(self) -> None:
        self._single = self.flux.is_file() or self.flux.suffix in foreign.SINGLE_FILE_ENDINGS
        self._opened: dict[str, Named] = {}
        self._whole: Weights | None = None
        self.pipeline = self.configs if self._single and self.configs else self.flux

    def checked(self) -> FluxFiles:
        """Look for the files, and open that of the whole model.

        Raises:
            CheckpointError: a part, or the tokenizers, are nowhere.
        """
        if not self._single:
            if self.configs is not None:
                raise CheckpointError(
                    f"{self.flux}: is a folder, which has configs of its own beside {self.configs}",
                    hint="give --flux-configs with a single file as --flux only",
                )
            if found := foreign.folder(self.flux, "flux"):
                raise CheckpointError(f"{self.flux}: {found.what}", hint=found.hint)
            return self
        if self.configs is None:
            raise CheckpointError(
                f"{self.flux}: a single file of FLUX, which holds no tokenizers", hint=TOKENIZERS
            )
        if not self.configs.is_dir():
            raise CheckpointError(f"{self.configs}: no such folder", hint=TOKENIZERS)
        self._whole = Weights.open_file(self.flux)
        _refuse_left_overs(self._whole)
        return self

    @property
    def paths(self) -> tuple[Path, ...]:
        """Everything that was named."""
        configs = () if self.configs is None else (self.configs,)
        return (self.flux, *self.files.values(), *configs)

    @property
    def in_files(self) -> dict[str, Named]:
        """The parts that were opened, by their folder in a pipeline."""
        return self._opened

    def named(self, part: str) -> Named:
        """Return the tensors of one part.

        Raises:
            CheckpointError: they are missing, damaged or something else.
        """
        if part not in self._opened:
            self._opened[part] = KINDS[part].named(self._weights(part))
        return self._opened[part]

    def config(self, part: str) -> Config:
        """Return the config of one part; without a file, what its tensors tell.

        Raises:
            CheckpointError: it is missing or of another model, or the tensors do not tell all.
        """
        path, kind = self.pipeline / part / "config.json", KINDS[part]
        if self._file(part) is None or os.path.lexists(path):
            return identity.check(Config.read(path), kind.part)
        net = self.named(part)
        return Config(net.weights.folder, kind.config(net))

    def scheduler(self) -> Config:
        """Return the config of the noise schedule; of a single file without one, FLUX.1's.

        Raises:
            CheckpointError: it is missing or of another model.
        """
        path = self.pipeline / "scheduler" / "scheduler_config.json"
        if not self._single or os.path.lexists(path):
            return identity.check(Config.read(path), identity.SCHEDULER)
        return Config(self.flux, flux.scheduler(self.named("transformer")))

    def _file(self, part: str) -> Path | None:
        option = KINDS[part].option
        return self.files.get(option) or (self.flux if self._single else None)

    def _weights(self, part: str) -> Weights:
        kind, file = KINDS[part], self._file(part)
        if file is None:
            return Weights.open(self.flux / part, *kind.stems)
        if file != self.flux:
            weights = Weights.open_file(file)
            return _refuse_other(_inside(weights, part) or weights, part)
        assert self._whole is not None
        if found := _inside(self._whole, part):
            return found
        if part == "transformer":
            return _refuse_other(self._whole, part)
        raise CheckpointError(
            f"{self.flux}: holds nothing of {kind.what}",
            hint=f"give its file as --{kind.option}",
        )


def of_recipe(recipe: Recipe) -> FluxFiles:
    """Say where a recipe says that FLUX is."""
    given = {"vae": recipe.vae, "clip": recipe.clip, "t5": recipe.t5}
    files = {option: Path(file) for option, file in given.items() if file is not None}
    configs = None if recipe.flux_configs is None else Path(recipe.flux_configs)
    return FluxFiles(Path(recipe.flux), files, configs)


def _inside(weights: Weights, part: str) -> Weights | None:
    """Return a part of a file of the whole model."""
    found = (weights.below(prefix) for prefix in KINDS[part].inside)
    return next((one for one in found if one.entries), None)


def _refuse_left_overs(weights: Weights) -> None:
    """Refuse what belongs to no part of a file of the whole model."""
    prefixes = tuple(prefix for kind in KINDS.values() for prefix in kind.inside)
    if not any(name.startswith(prefixes) for name in weights.entries):
        return
    others = [n for n in weights.entries if not n.startswith(prefixes) and n not in INSIDE_UNUSED]
    if others:
        raise CheckpointError(
            f"{weights.folder}: holds {', '.join(sorted(others)[:3])} beside {prefixes[0]}*",
            hint="give a file of FLUX.1, or the files of its parts",
        )


def _refuse_other(weights: Weights, part: str) -> Weights:
    if any(mark in weights for mark in KINDS[part].marks):
        return weights
    for other in KINDS.values():
        if any(mark in weights for mark in other.marks):
            raise CheckpointError(
                f"{weights.folder}: holds {other.what}, expected {KINDS[part].what}",
                hint=f"give it as --{other.option}",
            )
    raise CheckpointError(
        f"{weights.folder}: holds no tensor {KINDS[part].marks[0]}, expected {KINDS[part].what}",
        hint=f"give its file as --{KINDS[part].option}",
    )
