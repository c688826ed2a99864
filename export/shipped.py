"""The recipes that come with this package, called by name, and where they look for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bifrost_rt import serialization
from export.errors import RecipeError

FOLDER = Path(__file__).parent / "recipes"
CHECKOUT = Path(__file__).parents[1]
ENGINES = "engines"
DEFAULT = "default"
CHECKOUTS = (DEFAULT, "demo")  # recipes whose checkpoints come with the source


def names() -> list[str]:
    """Every recipe that ships."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def path_of(name: str) -> Path:
    """Return the file of a recipe that ships."""
    return FOLDER / f"{name}.toml"


def find(given: str | Path) -> Path:
    """Return the file of a recipe.

    Args:
        given: a path, or the name of a recipe that ships. A file that exists counts first.

    Raises:
        RecipeError: there is neither.
    """
    path, text, known = Path(given), str(given), names()
    if path.exists() and not path.is_dir():
        return path
    if text in known:
        return path_of(text)
    raise RecipeError(
        f"{path}: no such recipe{serialization.nearest(path.stem, known)}",
        hint=f"give the path of a file, or the name of a recipe that ships: {', '.join(known)}",
    )


def base(recipe: Path) -> Path:
    """Return what the paths in a recipe file are relative to: its folder; for a recipe that ships,
    `engines` in the checkout that this package is in, or else in the current folder."""
    if recipe.parent != FOLDER:
        return recipe.parent
    here, ours = Path(ENGINES), CHECKOUT / ENGINES
    if not ours.is_dir() or (here.is_dir() and here.samefile(ours)):
        return here
    return ours


def check_checkpoint(path: Path, folders: Mapping[str, str]) -> None:
    """Refuse a recipe that ships where its checkpoint is not.

    Args:
        path: the recipe's file.
        folders: the parts of the checkpoint and where they are, as the recipe says with flags on
            top.

    Raises:
        RecipeError: a folder is missing, with what to do about it.
    """
    missing = {name: folder for name, folder in folders.items() if not Path(folder).exists()}
    if path.parent != FOLDER or not missing:
        return
    flags = " ".join([*(f"--{name} DIR" for name in missing), "--output DIR"])
    where = ", ".join(missing.values())
    if path.stem in CHECKOUTS:
        raise RecipeError(
            f"recipe {path.stem}: no checkpoint in {where}: it is in a checkout of the source, not "
            "in the wheel",
            hint=f"to build a model of yours: {flags}",
        )
    raise RecipeError(
        f"recipe {path.stem}: no checkpoint in {where}",
        hint=f"put the folders there, or name yours: {flags}",
    )
