"""A plan as an image: what is in memory at each stage, under the budget, and where time goes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from bifrost_rt.memory_plan import size_text
from export.planning import kernel_report
from export.planning.estimate import Plan, StagePlan
from export.planning.kernel_times import Estimate

WIDTH, HEIGHT = 1000, 620
LEFT, TOP, BOTTOM = 90, 90, 130
COLORS = ("#4e79a7", "#f28e2b", "#9c755f", "#76b7b2", "#59a14f", "#e15759", "#b07aa1")
INK, FAINT, ALARM = "#222222", "#dddddd", "#c00000"


def draw(plan: Plan, times: Estimate | None = None) -> Image.Image:
    """Memory, and where the time of kernels is estimated, that below it."""
    memory = _draw(plan)
    if times is None:
        return memory
    kernels = kernel_report.draw(times)
    image = Image.new("RGB", (WIDTH, HEIGHT + kernels.height), "white")
    image.paste(memory, (0, 0))
    image.paste(kernels, (0, HEIGHT))
    return image


def _draw(plan: Plan) -> Image.Image:
    """One column per stage: engines in memory, this stage's tensors and scratch on top."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(20), ImageFont.load_default(13)
    verdict = "fits" if plan.fits else "does not fit"
    pen.text((LEFT, 16), f"{plan.device}, weights {plan.precision}: {verdict}", INK, large)
    time = "" if plan.seconds is None else f", {plan.seconds:.3g} s at least"
    pen.text((LEFT, 46), f"{size_text(plan.peak_bytes)} at most{time}", INK, small)

    top = 1.08 * max(plan.budget_bytes, *(stage.peak_bytes for stage in plan.stages))
    height = HEIGHT - TOP - BOTTOM
    color = dict(zip((stage.engine for stage in plan.stages), itertools.cycle(COLORS)))

    def y(size: float) -> float:
        return HEIGHT - BOTTOM - height * size / top

    step = (WIDTH - LEFT - 20) / len(plan.stages)
    for i, (stage, resident) in enumerate(zip(plan.stages, _memory(plan), strict=True)):
        x, base = LEFT + i * step + 8, 0
        for engine, size in resident:
            fill = color.get(engine, FAINT)
            pen.rectangle((x, y(base + size), x + step - 16, y(base)), fill, "white")
            base += size
        pen.text((x, y(base) - 18), size_text(stage.peak_bytes), INK, small)
        pen.text((x, y(0) + 8), stage.engine, INK, small)
        if stage.seconds is not None:
            pen.text((x, y(0) + 28), f"{stage.seconds:.2g} s", INK, small)
            pen.text((x, y(0) + 46), str(stage.limit), INK, small)
    pen.line((LEFT, y(plan.budget_bytes), WIDTH - 12, y(plan.budget_bytes)), ALARM, 2)
    pen.text((8, y(plan.budget_bytes) - 7), size_text(plan.budget_bytes), ALARM, small)
    pen.line((LEFT, y(0), WIDTH - 12, y(0)), INK)
    x = LEFT
    for engine, fill in [*color.items(), ("tensors", FAINT)]:
        pen.rectangle((x, HEIGHT - 34, x + 12, HEIGHT - 22), fill)
        pen.text((x + 17, HEIGHT - 36), engine, INK, small)
        x += 34 + int(pen.textlength(engine, small))
    return image


def _memory(plan: Plan) -> Iterator[list[tuple[str, int]]]:
    """Yield what is in memory at each stage, from the bottom up."""
    here: dict[str, int] = {}
    for stage in plan.stages:
        here = {name: size for name, size in here.items() if name not in stage.evict}
        here[stage.engine] = _resident(stage)
        if not plan.fits:
            here = {stage.engine: _resident(stage)}
        yield [*here.items(), ("tensors", stage.tensor_bytes)]


def _resident(stage: StagePlan) -> int:
    return stage.weights_in_memory + stage.activation_bytes
