"""A plan as a person wants to read it."""

from __future__ import annotations

from collections.abc import Sequence

from bifrost_rt.dims import CONTEXT
from bifrost_rt.memory_plan import size_text
from export.planning.estimate import Plan, StagePlan

HEAD = (
    *("stage", "weights", "K/V", "tensors", "scratch", "memory then", "calls", "TFLOP"),
    *("seconds", "limit"),
)


def describe(plan: Plan) -> str:
    """Several lines of text: the verdict, the stages, what leaves when, and what to change."""
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{plan.device}, weights {plan.precision}"
        + (f", {plan.images} images at once" if plan.images > 1 else "")
        + f": {verdict}",
        "",
        f"  memory    {size_text(plan.peak_bytes)} at most, of {size_text(plan.budget_bytes)}; "
        f"{size_text(plan.resident_bytes)} to keep everything",
        "  time      " + _time(plan),
    ]
    if plan.joules is not None:
        lines.append(f"  energy    {plan.joules:.0f} J in that time at the device's rated power")
    if plan.answer_cache_bytes:
        lines.append("  answers   " + _answers(plan))
    lines += ["", *table([HEAD, *(_row(stage) for stage in plan.stages)])]
    moves = [
        f"  before {stage.engine}: {', '.join(stage.evict)} leaves"
        if len(stage.evict) == 1
        else f"  before {stage.engine}: {', '.join(stage.evict)} leave"
        for stage in plan.stages
        if stage.evict
    ]
    if moves:
        lines += ["", "schedule of the first image", *moves]
    if plan.changes:
        lines += ["", "what gives" if plan.fits else "what to change"]
        lines += [f"  {change}" for change in plan.changes]
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return "not known: the device's figures are not"
    return (
        f"{_seconds(plan.seconds)} at least, most of it limited by {plan.limit}; "
        "loading comes on top"
    )


def _answers(plan: Plan) -> str:
    cache = f"{size_text(plan.answer_cache_bytes)} of keys and values for {CONTEXT} tokens"
    if plan.tokens_per_second is None:
        return cache
    return f"{plan.tokens_per_second:.3g} tokens a second at most; {cache}"


def _row(stage: StagePlan) -> tuple[str, ...]:
    return (
        stage.engine,
        size_text(stage.weight_bytes),
        size_text(stage.kv_bytes) if stage.kv_bytes else "",
        size_text(stage.tensor_bytes),
        size_text(stage.activation_bytes),
        size_text(stage.peak_bytes),
        str(stage.calls),
        f"{stage.flops / 1e12:.3g}",
        "" if stage.seconds is None else _seconds(stage.seconds),
        stage.limit or "",
    )


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def milliseconds(seconds: float) -> str:
    """With three digits."""
    return f"{seconds * 1e3:.3g}"


def table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of aligned columns, numbers in the middle ones."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
