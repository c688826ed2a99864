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
from bifrost_rt.manifest import Manifest
from export import checkpoint_options, extras, shipped
from export import recipe as recipes
from export.errors import RecipeError
from export.formats import FORMATS, HALF
from export.formats.base import Format
from export.planning import devices
from export.recipe import CHECKPOINT, Recipe

if TYPE_CHECKING:
    from export.planning.estimate import Plan
    from export.planning.fit import Fitted
    from export.planning.kernel_times import Estimate
    from export.planning.work import Work

RELEASE_T5_LENGTH = 512
NOWHERE = "."  # a plan writes no set


def main(arguments: list[str] | None = None) -> int:
    """Return the command line. 0: it fits; 3: it does not; 1: there is no plan."""
    options = _parser().parse_args(arguments)
    if not options.debug:
        warnings.simplefilter("ignore")  # the libraries warn of their own deprecations

    @extras.needed("export")
    def planned() -> int:
        plan, times, chosen = _plan(options)
        if options.json:
            content = dataclasses.asdict(plan)
            if times is not None:
                content["estimate"] = dataclasses.asdict(times)
            if chosen is not None:
                content["fit"] = chosen.record()
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if options.plot:
            from export.planning import chart

            chart.draw(plan, times).save(options.plot)
        from export.planning import fit, kernel_report, report

        if chosen is not None:
            print("\n".join(fit.describe(chosen)), end="\n\n")
        print(report.describe(plan))
        if times is not None:
            print(f"\n{kernel_report.describe(times)}")
        for note in _elsewhere(options.engines):
            print(note)
        return 0 if plan.fits else 3

    return command.run(planned, debug=options.debug)


def _plan(options: argparse.Namespace) -> tuple[Plan, Estimate | None, Fitted | None]:
    # torch takes seconds to import: not before the command line is understood
    _check(options)
    budget = None if options.memory_budget is None else memory_plan.parse(options.memory_budget)
    storage, images = _precision(options.precision), options.images
    flags = checkpoint_options.read(options)
    if flags and (options.engines or options.like):
        raise RecipeError(
            f"--{next(iter(flags)).replace('_', '-')} is of a checkpoint, and --engines and --like "
            "name none",
            hint="leave one of them out",
        )
    if options.fit is not None:
        return _fitted(options, flags)
    device = devices.find(options.device)
    if options.engines:
        manifest = manifests.read(options.engines)
        if any(spec.compiled is not None for spec in manifest.engines):
            return *of_compiled(options.engines, manifest, device, budget), None
        return of_set(options.engines, device, budget, images), None, None
    if options.recipe or flags:
        recipe = _recipe(options.recipe, flags)
        return of_recipe(recipe, device, storage, budget, images), None, None
    return of_shapes(options.like, device, storage or HALF, budget, images), None, None


def _check(options: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        RecipeError: naming it.
    """
    checkpoint = [name for name in CHECKPOINT if getattr(options, name) is not None]
    if not (options.recipe or options.engines or options.like or checkpoint):
        raise RecipeError(
            "nothing to plan",
            hint="give --recipe, --mllm with --bifrost and --flux, --engines or --like",
        )
    if options.engines and options.precision is not None:
        raise RecipeError("--precision does not apply to a built set")
    if (options.fit is None) == (options.device is None):
        raise RecipeError(
            "--device says where a set runs, and --fit for what place its precisions are chosen: "
            f"{'neither' if options.fit is None else 'both'} was given",
            hint="give one of them",
        )
    others = {"--engines": options.engines, "--precision": options.precision}
    others |= {"--memory-budget": options.memory_budget}
    if options.fit is not None and (said := [name for name, given in others.items() if given]):
        raise RecipeError(
            f"--fit chooses precisions for a memory; {' and '.join(said)} goes with --device",
            hint=f"leave out --fit or {said[0]}",
        )


def _fitted(options: argparse.Namespace, flags: dict[str, Any]) -> tuple[Plan, None, Fitted]:
    from export import fitting
    from export.planning import estimate, fit, losses

    device, images = fit.device(options.fit), options.images
    if options.like is not None:
        works = works_of_shapes(options.like, images)
        chosen = fit.choose(works, device, losses.read(), HALF)
        return estimate.plan(works, device, chosen.storage, images=images), None, chosen
    recipe = _recipe(options.recipe, {**flags, "fit": options.fit})
    recipe, chosen = fitting.fitted(recipe, images)
    return of_recipe(recipe, device, None, images=images), None, chosen


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


def of_set(
    folder: Path, device: devices.Device, budget: int | None = None, images: int = 1
) -> Plan:
    """Plan a built set."""
    from export.planning import estimate, work

    manifest = manifests.read(folder)
    at = memory_plan.sizes(manifest, images=images, prompts=images)
    works = work.of_set(folder, manifest, manifest.defaults.num_inference_steps, at=at)
    backend = backends.load(manifest.backend)

    def in_memory(one: Work, stored: int) -> int:
        spec = manifest.engine(one.engine)
        return backend.weights_in_memory(spec, manifests.stored_bytes(manifest, spec))

    return estimate.plan(
        *(works, device, None, budget, in_memory),
        *(backend.opens_in_threads, backend.scratch_share),
        images=images,
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
    recipe: Recipe,
    device: devices.Device,
    precision: Format | None,
    budget: int | None = None,
    images: int = 1,
) -> Plan:
    """Plan what a recipe would build; `precision` takes the place of its own, and what the recipe
    says of stages and layers stays."""
    from export import build_plan
    from export.planning import estimate, recipe_works
    from export.planning.storage import Storage

    checkpoint, _ = build_plan.read_checkpoint(recipe)
    works = recipe_works.of_recipe(recipe, checkpoint, images)
    if precision is not None:
        recipe = dataclasses.replace(recipe, precision=precision.name)
    storage = Storage.of_recipe(recipe)
    storage.check(one.elements for one in works if one.elements)
    backend = recipe_works.backend_on(device, recipe)
    if backend is None:
        return estimate.plan(works, device, storage, budget, images=images)
    return estimate.plan(
        *(works, device, storage, budget, recipe_works.in_memory(backend, storage)),
        *(backend.opens_in_threads, recipe_works.scratch_share(backend)),
        images=images,
    )


def of_shapes(
    name: str,
    device: devices.Device,
    precision: Format,
    budget: int | None = None,
    images: int = 1,
) -> Plan:
    """Plan published shapes without a checkpoint."""
    from export.planning import estimate
    from export.planning.storage import Storage

    works = works_of_shapes(name, images)
    return estimate.plan(works, device, Storage(precision), budget, images=images)


def works_of_shapes(name: str, images: int = 1) -> list[Work]:
    """Return the engines of a checkpoint of published shapes, from an outline of it."""
    from export.checkpoint import Checkpoint
    from export.planning import recipe_works, work
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
        length = checkpoint.max_seq_length
        steps = recipe_works.STEPS
        return work.of_checkpoint(checkpoint, length, RELEASE_T5_LENGTH, steps, images)


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
    parser.add_argument("--device", metavar="NAME", help=known)
    parser.add_argument(
        "--fit",
        metavar="NAME|SIZE",
        help="in the place of --device: choose precisions with which everything stays in its "
        "memory, or in a size like 12GiB, at the least measured loss",
    )
    parser.add_argument("--images", type=int, default=1, metavar="N", help="drawn at once")
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
