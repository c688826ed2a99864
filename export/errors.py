"""What can go wrong while building, in one place."""

from __future__ import annotations

from bifrost_rt.errors import BifrostError


class RecipeError(BifrostError):
    """A recipe or a flag: an unknown key, a value out of range, two that contradict."""


class CheckpointError(BifrostError):
    """A checkpoint folder: missing or damaged files, missing, unexpected or misshapen tensors,
    a variant that the engines do not compute."""


class ExportError(BifrostError):
    """A stage could not be turned into a graph, or the graph is not what the stage promised."""


class ParityError(BifrostError):
    """A built engine does not compute what torch computes, within the stage's tolerance."""


class BuildError(BifrostError):
    """The set could not be written where it was asked for."""


class CompileError(BifrostError):
    """An engine cannot be compiled: a target that lacks what the graph needs, a size without a
    limit, or what the builder refused."""


class MissingPackageError(BifrostError):
    """A command needs a Python package that is not installed."""


class CalibrationError(BifrostError):
    """Prompts or statistics that cannot calibrate this checkpoint."""


class PrecisionError(BifrostError):
    """A built file does not hold what was asked for."""
