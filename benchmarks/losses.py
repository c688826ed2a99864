"""What each precision costs group by group: the figures that `export.build --fit` chooses by.

    python -m benchmarks.losses --json export/planning/losses.json

Of the demo model, or of another recipe, in torch: one group of layers at a time is quantized, all
else stays in float32, and the images of a few prompts are compared with those of float32. Groups
are those of `export/quantize/groups.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arguments import new_file
from bifrost_rt import command, dims
from export import build_plan, shipped
from export import recipe as recipes
from export.planning.losses import Loss, Losses
from export.quantize import apply, calibrate, groups, policy, sweep
from export.quantize.formats import FORMATS
from export.quantize.policy import Choice
from export.quantize.statistics import Statistics
from export.recipe import Recipe


def measure(name: str, recipe: Recipe, prompts: Path) -> Losses:
    """Measure every group in every format that its layers can have."""

    def say(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    found: dict[str, dict[str, Loss]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint, model = build_plan.read_checkpoint(recipe)
        plan = build_plan.draw_up(recipe, checkpoint, model, folder)
        asked = calibrate.read_prompts(prompts)
        nothing = Statistics("", asked)
        statistics = calibrate.calibrate(folder, plan, plan.stages, nothing, say)
        bench = sweep.Bench(folder, plan, plan.stages, asked)
        for group, layers in _groups(plan).items():
            for fmt in FORMATS:
                choices = [Choice(stage, path, fmt) for stage, path in layers]
                decisions = apply.decide(
                    plan.stages, choices, statistics, recipe.fallback, recipe.scales
                )
                if any(decision.scales is None for decision in decisions):
                    say(f"{group} in {fmt}: not all of its layers can be")
                    continue
                cost = bench.cost(decisions)
                loss = Loss(sweep.noise(cost.psnr), cost.output, cost.tokens)
                found.setdefault(group, {})[fmt] = loss
                say(f"{group} in {fmt}: {cost.psnr:.1f} dB, output {cost.output:.2g}")
        count = bench.prompts
    source = f"recipe {name}, {count} prompts, all steps, in torch, by benchmarks.losses"
    return Losses(source, found)


def _groups(plan: build_plan.BuildPlan) -> dict[str, list[tuple[str, str]]]:
    """Return the layers of every group of the engines that draw, as stage and path."""
    found: dict[str, list[tuple[str, str]]] = {}
    drawing = set(dims.drawing(plan.engines))
    for stage in plan.stages.values():
        if stage.name not in drawing:
            continue
        for path, linear in policy.linears(stage):
            layer = policy.layer(stage, path, linear)
            if (group := groups.of(stage.name, layer)) is not None:
                found.setdefault(group, []).append((stage.name, path))
    return found


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--recipe", default=shipped.DEFAULT, help="a file, or one that ships")
    parser.add_argument("--json", type=new_file, required=True, help="the record to write")
    given = parser.parse_args()
    recipe = recipes.read(shipped.find(given.recipe), {})
    prompts = Path(recipe.calibration_prompts or calibrate.DEFAULT_PROMPTS)
    measured: dict[str, Any] = dataclasses.asdict(measure(given.recipe, recipe, prompts))
    given.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
