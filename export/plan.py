"""`python -m export.plan`: will it fit, how fast can it be at best, and what has to give.

For a checkpoint (config files and tensor headers; no weights are read), for the published shapes
without a checkpoint, or for a built set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bifrost_rt import backends, command, memory_plan, serialization
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.base import Backend
from bifrost_rt.manifest import EngineSpec, Manifest, Precision
from export import checkpoint_options, extras, shipped
from export import recipe as recipes
from export.errors import RecipeError
from export.formats import FORMATS, HALF
from export.formats.base import Format
from export.planning import devices
from export.recipe import Recipe

if TYPE_CHECKING:
    from export.planning.estimate import InMemory, Plan
    from export.planning.kernel_times import Estimate
    from export.planning.storage import Storage
    from export.planning.work import Work

RELEASE_T5_LENGTH = 512
STEPS = 28
NOWHERE = "."  # a plan writes no set


def main(arguments: list[str] | None = None) -> int:
    """Return the command line. 0: it fits; 3: it does not; 1: there is no plan."""
    options = _parser().parse_args(arguments)
    if not options.debug:
        warnings.simplefilter("ignore")  # the libraries warn of their own deprecations

    @extras.needed("export")
    def planned() -> int:
        plan, times = _plan(options)
        if options.json:
            content = dataclasses.asdict(plan)
            if times is not None:
                content["estimate"] = dataclasses.asdict(times)
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if options.plot:
            from export.planning import chart

            chart.draw(plan, times).save(options.plot)
        from export.planning import kernel_report, report

        print(report.describe(plan))
        if times is not None:
            print(f"\n{kernel_report.describe(times)}")
        for note in _elsewhere(options.engines):
            print(note)
        return 0 if plan.fits else 3

    return command.run(planned, debug=options.debug)


def _plan(options: argparse.Namespace) -> tuple[Plan, Estimate | None]:
    # torch takes seconds to import: not before the command line is understood
    device = devices.find(options.device)
    budget = None if options.memory_budget is None else memory_plan.parse(options.memory_budget)
    storage = _precision(options.precision)
    flags = checkpoint_options.read(options)
    if flags and (options.engines or options.like):
        raise RecipeError(
            f"--{next(iter(flags)).replace('_', '-')} is of a checkpoint, and --engines and --like "
            "name none",
            hint="leave one of them out",
        )
    if options.engines and storage is not None:
        raise RecipeError("--precision does not apply to a built set")
    if options.engines:
        manifest = manifests.read(options.engines)
        if any(spec.compiled is not None for spec in manifest.engines):
            return of_compiled(options.engines, manifest, device, budget)
        return of_set(options.engines, device, budget), None
    if options.recipe or flags:
        return of_recipe(_recipe(options.recipe, flags), device, storage, budget), None
    if options.like is None:
        raise RecipeError(
            "nothing to plan",
            hint="give --recipe, --mllm with --bifrost and --flux, --engines or --like",
        )
    return of_shapes(options.like, device, storage or HALF, budget), None


def of_compiled(
    folder: Path, manifest: Manifest, device: devices.Device, budget: int | None = None
) -> tuple[Plan, Estimate | None]:
    """Plan a compiled set, and estimate its time from the plans inside its engines; None where the
    device's figures are not known.

    Raises:
        RecipeError: an engine has no plan that can be read.
    """
    from export.planning import estimate, kernel_times, work

    at = memory_plan.sizes(manifest)
    calls = kernel_times.of_set(folder, manifest, at)
    times = kernel_times.estimate(calls, device)
    ideal = (
        {}
        if times is None
        else {engine.engine: (engine.ideal_seconds, engine.ideal_limit) for engine in times.engines}
    )
    works = work.of_calls(manifest, calls, at)
    return estimate.plan(works, device, None, budget, ideal=ideal), times


def of_set(folder: Path, device: devices.Device, budget: int | None = None) -> Plan:
    """Plan a built set."""
    from export.planning import estimate, work

    manifest = manifests.read(folder)
    works = work.of_set(folder, manifest, manifest.defaults.num_inference_steps)
    backend = backends.load(manifest.backend)

    def in_memory(one: Work, stored: int) -> int:
        spec = manifest.engine(one.engine)
        return backend.weights_in_memory(spec, manifests.stored_bytes(manifest, spec))

    return estimate.plan(
        works, device, None, budget, in_memory, backend.opens_in_threads, backend.scratch_share
    )


def _recipe(given: str | None, flags: dict[str, Any]) -> Recipe:
    """Return the recipe of a checkpoint: a file's, flags on top of it, or flags alone."""
    flags = {**flags, "output": NOWHERE}
    if given is None:
        return recipes.load(flags, "command line")
    path = shipped.find(given)
    recipe = recipes.read(path, flags)
    shipped.check_checkpoint(path, recipe.folders)
    return recipe


def of_recipe(
    recipe: Recipe, device: devices.Device, precision: Format | None, budget: int | None = None
) -> Plan:
    """Plan what a recipe would build; `precision` takes the place of its own, and what the recipe
    says of stages and layers stays."""
    from export import build_plan
    from export.planning import estimate, work
    from export.planning.storage import Storage

    checkpoint, _ = build_plan.read_checkpoint(recipe)
    length = recipe.mllm_max_length or checkpoint.max_seq_length
    works = work.of_checkpoint(checkpoint, length, recipe.t5_max_length, STEPS)
    if precision is not None:
        recipe = dataclasses.replace(recipe, precision=precision.name)
    storage = Storage.of_recipe(recipe)
    storage.check(one.elements for one in works if one.elements)
    # the recipe's backend runs here; a device of the table runs compiled engines
    if device.name != devices.HERE:
        return estimate.plan(works, device, storage, budget)
    backend = backends.load(recipe.backend)
    in_memory = _in_memory(backend, storage)
    return estimate.plan(
        works, device, storage, budget, in_memory, backend.opens_in_threads, backend.scratch_share
    )


def of_shapes(
    name: str, device: devices.Device, storage: Format, budget: int | None = None
) -> Plan:
    """Plan published shapes without a checkpoint."""
    from export.planning import estimate
    from export.planning.storage import Storage

    return estimate.plan(works_of_shapes(name), device, Storage(storage), budget)


def works_of_shapes(name: str) -> list[Work]:
    """Return the engines of a checkpoint of published shapes, from an outline of it."""
    from export.checkpoint import Checkpoint
    from export.planning import work
    from export.synthesize import synthesize
    from export.synthetic.shapes import PRESETS

    if name not in PRESETS:
        raise RecipeError(
            f"--like {name!r} is unknown{serialization.nearest(name, PRESETS)}",
            hint=f"known: {', '.join(PRESETS)}",
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "outline"
        synthesize(PRESETS[name], folder, seed=None)
        checkpoint = Checkpoint(
            *(folder / part for part in ("mllm", "bifrost", "flux")), read=False
        )
        return work.of_checkpoint(checkpoint, checkpoint.max_seq_length, RELEASE_T5_LENGTH, STEPS)


def _in_memory(backend: Backend, storage: Storage) -> InMemory:
    def in_memory(work: Work, stored: int) -> int:
        assert work.elements is not None
        most = work.elements.most(storage)
        precision = Precision(storage.name, most.dtype, "float32")
        spec = EngineSpec(work.engine, "", (), (), (), (), precision)
        return backend.weights_in_memory(spec, stored)

    return in_memory


def _elsewhere(folder: Path | None) -> list[str]:
    """Return what a plan of a compiled set leaves out."""
    engines = () if folder is None else manifests.read(folder).engines
    return [f"not counted: {spec.name}, on {spec.backend}" for spec in engines if spec.backend]


def _precision(name: str | None) -> Format | None:
    if name is not None and name not in FORMATS:
        raise RecipeError(
            f"--precision {name!r} is unknown{serialization.nearest(name, FORMATS)}",
            hint=f"known: {', '.join(FORMATS)}",
        )
    return None if name is None else FORMATS[name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.plan",
        description="Memory, schedule and least time of one image on a device.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="FILE", help="what it would build; or one that ships")
    source.add_argument("--engines", type=Path, metavar="DIR", help="a built set")
    source.add_argument("--like", metavar="NAME", help="published shapes: 7b, 3b")
    checkpoint_options.add(parser)
    known = ", ".join([devices.HERE, *devices.read(devices.TABLE)])
    parser.add_argument("--device", required=True, metavar="NAME", help=known)
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help=f"{', '.join(FORMATS)}; default: the recipe's, or {HALF.name}",
    )
    parser.add_argument(
        "--memory-budget", metavar="SIZE", help="like 8GiB; default: nine tenths of the device's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plan as an image")
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
