"""What a recipe would build, as the planner counts it, and what a backend holds of it."""

from __future__ import annotations

from bifrost_rt import backends
from bifrost_rt.backends.base import Backend
from bifrost_rt.manifest import EngineSpec, Precision
from export import memory
from export.checkpoint import Checkpoint
from export.planning import devices, work
from export.planning.devices import Device
from export.planning.estimate import InMemory
from export.planning.storage import Storage
from export.planning.work import Work
from export.recipe import COMPILED, Recipe

STEPS = 28  # of denoising


def of_recipe(recipe: Recipe, checkpoint: Checkpoint, images: int = 1) -> list[Work]:
    """Return the engines that a recipe would build of a checkpoint.

    Args:
        images: that are drawn at once.
    """
    length = recipe.mllm_max_length or checkpoint.max_seq_length
    return work.of_checkpoint(checkpoint, length, recipe.t5_max_length, STEPS, images)


def backend_on(device: Device, recipe: Recipe) -> Backend | None:
    """Return what holds the weights there: on this machine, or in a size that names no device, the
    recipe's own backend; None on a device of the table, which runs compiled engines, that take
    what is stored."""
    here = device.name == devices.HERE
    own = here or (not device.known_rates and recipe.backend not in COMPILED)
    return backends.load(recipe.backend) if own else None


def scratch_share(backend: Backend) -> float:
    """Return what a backend's arena takes of scratch memory that was counted tensor by tensor."""
    return backend.scratch_share * memory.ARENA


def in_memory(backend: Backend, storage: Storage) -> InMemory:
    """Return what says how many bytes a backend holds of an engine that is stored so."""

    def held(one: Work, stored: int) -> int:
        assert one.elements is not None
        precision = Precision(storage.name, one.elements.held(storage).dtype, "float32")
        spec = EngineSpec(one.engine, "", (), (), (), (), precision)
        return backend.weights_in_memory(spec, stored)

    return held
