"""`python -m export.build`: trained checkpoints -> an engine set.

From a recipe, from flags, or from a recipe with flags on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bifrost_rt import command, inspect
from bifrost_rt import manifest as manifests
from bifrost_rt.memory_plan import parse as parse_size
from export import checkpoint_options, extras, shipped
from export import recipe as recipes
from export.engine_set import atomic_output
from export.formats import FORMATS, FULL, HALF, SIXTEEN_BIT
from export.recipe import Recipe

INTERRUPTED = "interrupted; nothing was written"
CONTINUES = "interrupted; the next build of this set continues with the engines that are finished"
DEFAULT_RECIPE = shipped.path_of(shipped.DEFAULT)


def build(
    recipe: Recipe,
    progress: Callable[[str], None] | None = None,
    memory_budget: int | None = None,
) -> Path:
    """Build one set and return its folder. Engines that an earlier build has finished, or that the
    set has already, are not built again while nothing has changed that decides their bytes.

    Args:
        memory_budget: bytes that the build may take; default: what the machine has available. Not
            of compiling, which the libraries do as they please.

    Raises:
        BifrostError: the checkpoint, the graph, the parity, too little memory or disk; nothing is
            left behind but finished engines, for the next build.
    """
    recipe = _fitted(recipe, progress or (lambda message: None))
    if recipe.backend in recipes.COMPILED:
        return _build_and_compile(recipe, progress, memory_budget)
    # torch and its company take seconds to import: not before the command line is understood
    from export import build_plan, preprocessor, stage_cache
    from export import build_steps as steps
    from export.quantize.quantize import STATISTICS, quantize

    say = progress or (lambda message: None)
    output = Path(recipe.output)
    say("reading the checkpoint")
    checkpoint, model = build_plan.read_checkpoint(recipe)
    if reason := preprocessor.why_none(checkpoint):
        say(f"the set will read no images: {reason}")
    with atomic_output(output, finished=(stage_cache.REPORT, STATISTICS)) as folder:
        cache = stage_cache.StageCache(folder, output, keep=[STATISTICS])
        plan = build_plan.draw_up(recipe, checkpoint, model, folder)
        for origin in plan.origins.values():
            if origin["packed"]:
                kinds = ", ".join(f"{n} tensors in {kind}" for kind, n in origin["packed"].items())
                say(f"{origin['from']} holds {kinds}: what that lost stays lost")
        for lora in checkpoint.loras:
            say(f"adding {lora.said.file}, times {lora.said.scale:g}, to {len(lora.taken)} layers")
        if plan.chat is None:
            say(f"the set will hold no conversations: {checkpoint.mllm} has another chat template")
        share = steps.reserve(plan, cache, memory_budget, say)
        layers = quantize(recipe, folder, plan, plan.stages, say, share.kept, output)
        built = steps.write_engines(plan, layers, checkpoint, cache, folder, say)
        precisions = steps.read_back(built, layers, folder, say)
        errors = steps.compare(built, folder, share, say)
        steps.write_report(built, layers, cache, precisions, errors, folder)
        steps.draw_selftest(built, folder, share, say)
        steps.write_manifest(built, layers, cache, folder)
    return output


def _fitted(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """Return a recipe with the precisions that its `fit` asks for, and say which and why."""
    if recipe.fit is None:
        return recipe
    from export import fitting
    from export.planning import fit

    chosen, found = fitting.fitted(recipe)
    for line in fit.describe(found):
        say(line)
    return chosen


def _build_and_compile(
    recipe: Recipe, progress: Callable[[str], None] | None, memory_budget: int | None
) -> Path:
    """Return the ONNX set, which is compared with torch and stays beside it, then its engines."""
    from export.compile import builder as builders
    from export.compile import capabilities
    from export.compile.compiled_set import check_on_cpu, check_targets, compile_set
    from export.stages.catalog import DEFINITIONS

    # what cannot be compiled is refused before the graphs are built
    formats = {FULL.name, recipe.precision, *recipe.stages.values(), *recipe.layers.values()}
    formats |= {recipe.fallback} if recipe.quantized else set()
    check_targets(builders.find(recipe.backend), recipe.target, sorted(formats))
    check_on_cpu(recipe.on_cpu, tuple(DEFINITIONS))
    for pattern, fmt in recipe.layers.items():
        stage = pattern.partition(":")[0]
        around = FORMATS[recipe.precision_of(stage)]
        if not around.quantized:
            capabilities.check_pair(recipe.backend, stage, {fmt}, around.dtype)
    graphs = build(graphs_of(recipe), progress, memory_budget)
    return compile_set(
        graphs,
        Path(recipe.output),
        backend=recipe.backend,
        targets=recipe.target,
        max_images=recipe.max_images,
        max_steps=recipe.max_steps,
        on_cpu=recipe.on_cpu,
        progress=progress,
    )


def graphs_of(recipe: Recipe) -> Recipe:
    """Return the recipe of the ONNX set that a recipe of engines is compiled from: `{output}-onnx`.
    Any machine can build it; engines for a Jetson are then compiled on the device."""
    if recipe.backend not in recipes.COMPILED:
        return recipe
    output = Path(recipe.output)
    # what is said of engines alone
    limits: dict[str, Any] = {"target": (), "max_images": None, "max_steps": None, "on_cpu": ()}
    return dataclasses.replace(
        recipe,
        backend="onnxruntime",
        output=str(output.with_name(f"{output.name}-onnx")),
        **limits,
    )


class Progress:
    """One line per step on a terminal, nothing in a pipe."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._shown = sys.stderr.isatty()

    def __call__(self, message: str) -> None:
        """Say what begins."""
        if self._shown:
            print(f"{time.perf_counter() - self._start:7.1f} s  {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    if not options.debug:
        _quiet_libraries()

    @extras.needed("export")
    def built() -> int:
        given = options.memory_budget
        recipe = _fitted(_recipe(options), lambda line: print(line, file=sys.stderr))
        recipe = graphs_of(recipe) if options.onnx_only else recipe
        folder = build(recipe, Progress(), None if given is None else parse_size(given))
        if note := inspect.simulation(manifests.read(folder)):
            print(note, file=sys.stderr)
        print(folder)
        return 0

    return command.run(built, debug=options.debug, interrupted=CONTINUES)


def _recipe(options: argparse.Namespace) -> Recipe:
    names = {field.name for field in dataclasses.fields(Recipe)}
    flags = {k: v for k, v in vars(options).items() if k in names and v is not None}
    flags |= checkpoint_options.read(options)
    if options.recipe is None and flags.keys() & set(recipes.CHECKPOINT):
        return recipes.load(flags, "command line")
    path = DEFAULT_RECIPE if options.recipe is None else shipped.find(options.recipe)
    recipe = recipes.read(path, flags)
    shipped.check_checkpoint(path, recipe.folders)
    return recipe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.build",
        description="Build an engine set from trained Bifrost-1 checkpoints.",
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        help=f"a file, or the name of a recipe that ships ({', '.join(shipped.names())}); default: "
        f"{shipped.DEFAULT}, or none with --mllm …",
    )
    checkpoint_options.add(parser)
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="the engine set to write; default: the recipe's, and beside it for another precision "
        "or backend than the recipe's",
    )
    parser.add_argument("--precision", metavar="NAME", help=", ".join(FORMATS))
    parser.add_argument(
        "--fit",
        metavar="NAME|SIZE",
        help="choose precisions with which everything stays in the memory of a device of the "
        "planner's, or in a size like 12GiB, at the least measured loss",
    )
    parser.add_argument(
        "--fallback",
        metavar="NAME",
        help=f"of a quantized set's other weights: {HALF.name} (default) or "
        + " or ".join(declared.name for declared in SIXTEEN_BIT if declared is not HALF),
    )
    parser.add_argument(
        "--calibration-prompts", metavar="FILE", help="one prompt per line; default: a list of ours"
    )
    parser.add_argument(
        "--calibration-steps", type=int, metavar="N", help="of both loops; default: all of them"
    )
    parser.add_argument(
        "--statistics", metavar="FILE", help="a set's calibration.safetensors, to calibrate once"
    )
    parser.add_argument(
        "--scales", metavar="NAME", help="of activations: mse (default), percentile or max"
    )
    parser.add_argument(
        "--quality-budget",
        type=float,
        metavar="DB",
        help="PSNR to float32 that the images keep: the worst layers stay in 16 bit",
    )
    parser.add_argument("--backend", metavar="NAME", help="onnxruntime, or tensorrt-rtx")
    parser.add_argument("--mllm-max-length", type=int, metavar="N", help="tokens of a chat prompt")
    parser.add_argument(
        "--think",
        metavar="TEXT",
        help="what the MLLM is asked where it thinks before it draws; {prompt} is the prompt",
    )
    parser.add_argument("--t5-max-length", type=int, metavar="N", help="tokens of T5")
    parser.add_argument("--max-images", type=int, metavar="N", help="images per run; no limit")
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        metavar="N",
        help="of an image that is looked at; larger ones are made smaller",
    )
    parser.add_argument(
        "--target",
        type=lambda text: tuple(text.split(",")),
        metavar="NAMES",
        help="of compiled engines: sm89,sm120 or rtx-4090,rtx-5090 …; default: this machine's GPU",
    )
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="of compiled engines: steps of a loop"
    )
    parser.add_argument(
        "--on-cpu",
        type=lambda text: tuple(text.split(",")),
        metavar="ENGINES",
        help="beside compiled engines: those that stay on the CPU, names with commas",
    )
    parser.add_argument(
        "--onnx-only",
        action="store_true",
        help="of compiled engines: stop before them, to run `python -m export.compile` elsewhere",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="of the build, like 8GiB; default: what is available",
    )
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    return parser


def _quiet_libraries() -> None:
    """Our own messages only: the libraries warn of their own deprecations and of packages that are
    not needed here."""
    import logging
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    raise SystemExit(main())
