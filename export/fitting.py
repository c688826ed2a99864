"""A recipe that says `fit` -> the recipe with the precisions that were chosen for it."""

from __future__ import annotations

import dataclasses

from export import build_plan
from export.checkpoint import Checkpoint
from export.formats import FORMATS
from export.planning import fit, losses, recipe_works
from export.planning.fit import Fitted
from export.recipe import Recipe


def fitted(recipe: Recipe, images: int = 1) -> tuple[Recipe, Fitted]:
    """Choose the precisions of a recipe; see `export/planning/fit.py`.

    Args:
        images: that are drawn at once.

    Raises:
        RecipeError: what it has to fit is unknown or too small.
        CheckpointError: the checkpoint is not a supported one.
    """
    assert recipe.fit is not None
    device = fit.device(recipe.fit)
    works = recipe_works.of_recipe(recipe, checkpoint_of(recipe), images)
    backend = recipe_works.backend_on(device, recipe)
    found = fit.choose(
        *(works, device, losses.read(), FORMATS[recipe.fallback]),
        None if backend is None else lambda storage: recipe_works.in_memory(backend, storage),
        None if backend is None else recipe_works.scratch_share(backend),
    )
    storage = found.storage
    chosen = dataclasses.replace(
        recipe,
        fit=None,
        precision=storage.precision.name,
        stages=dict(storage.stages),
        layers=dict(storage.layers),
    )
    return chosen, found


def checkpoint_of(recipe: Recipe) -> Checkpoint:
    """Return the checkpoint of a recipe, read as far as a plan needs it."""
    return build_plan.read_checkpoint(recipe)[0]
