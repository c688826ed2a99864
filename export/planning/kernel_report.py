"""Where the time of a compiled set goes, kernel by kernel: a table and an image."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw, ImageFont

from export.planning.kernel_times import EngineTime, Estimate, KernelTime
from export.planning.report import milliseconds, table

SHOWN = 12  # kinds of kernels that the table has
WIDTH, ROW, LEFT, RIGHT, TOP = 1000, 30, 150, 170, 78
INK, IDEAL = "#222222", "#c00000"
COLORS = {
    "attention": "#f28e2b",
    "part of attention": "#ffbe7d",
    "weight moved": "#e15759",
    "elementwise, norms, moves": "#9c755f",
}
PRODUCTS = ("#4e79a7", "#59a14f", "#76b7b2", "#b07aa1")  # by type, in order of appearance


def describe(found: Estimate) -> str:
    """Several lines of text: the image, its engines, and the kernels that take the time."""
    lines = [
        f"{_seconds(found.seconds)} an image on {found.device}, estimated from the engines' plans",
        f"  at the ideal roofline {_seconds(found.ideal_seconds)}; nothing was measured",
        "  each kernel counts the larger of its bytes over the bandwidth and its operations over",
        "  the rate of their type; caches, launches and loading are left out",
    ]
    if found.missing_rates:
        missing = ", ".join(found.missing_rates)
        lines.append(f"  the device's rate for {missing} is not known: counted by bytes alone")
    rows: list[tuple[str, ...]] = [
        ("engine", "calls", "ms a call", "ideal", "times ideal", "times arithmetic", "most of it")
    ]
    rows += [_engine(engine) for engine in found.engines]
    lines += ["", *table(rows)]
    times = sorted(_every(found), key=lambda pair: -pair[0].calls * pair[1].seconds)
    head = ("kernels", "engine", "in a call", "ms a call", "of the image", "limit", "such as")
    rows = [head]
    for engine, time in times[:SHOWN]:
        share = engine.calls * time.seconds / found.seconds
        rows.append(
            (
                time.label,
                engine.engine,
                str(time.count),
                milliseconds(time.seconds),
                f"{share:.1%}",
                time.limit,
                next(iter(time.layers), time.name)[:40],
            )
        )
    return "\n".join([*lines, "", *table(rows)])


def _engine(engine: EngineTime) -> tuple[str, ...]:
    arithmetic = engine.arithmetic_seconds
    return (
        engine.engine,
        str(engine.calls),
        milliseconds(engine.seconds),
        milliseconds(engine.ideal_seconds),
        f"{engine.seconds / engine.ideal_seconds:.2f}" if engine.ideal_seconds else "",
        f"{engine.seconds / arithmetic:.2f}" if arithmetic else "",
        max(shares, key=lambda what: shares[what]) if (shares := _shares(engine)) else "",
    )


def _every(found: Estimate) -> Iterator[tuple[EngineTime, KernelTime]]:
    for engine in found.engines:
        for time in engine.kernels:
            yield engine, time


def _shares(engine: EngineTime) -> dict[str, float]:
    """Seconds of a call by what kernels do."""
    found: dict[str, float] = {}
    for time in engine.kernels:
        found[time.label] = found.get(time.label, 0.0) + time.seconds
    return found


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def draw(found: Estimate) -> Image.Image:
    """Return a bar for each engine, of all its calls for an image, by what its kernels do; a mark
    at the ideal roofline."""
    products = [label for label in _labels(found) if label not in COLORS]
    colors = {label: PRODUCTS[i % len(PRODUCTS)] for i, label in enumerate(products)} | COLORS
    labels = [label for label in colors if label in _labels(found)]
    height = TOP + ROW * len(found.engines) + 40 + 22 * -(-len(labels) // 3)
    image = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(image)
    large, small = ImageFont.load_default(20), ImageFont.load_default(13)
    pen.text((16, 12), f"Estimated from plans: {_seconds(found.seconds)} an image", INK, large)
    pen.text(
        (16, 42),
        f"{found.device}; nothing was measured. Red: the ideal roofline, "
        f"{_seconds(found.ideal_seconds)} in all.",
        INK,
        small,
    )
    longest = max(engine.calls * engine.seconds for engine in found.engines)
    scale = (WIDTH - LEFT - RIGHT) / longest
    for i, engine in enumerate(found.engines):
        y, x = TOP + i * ROW, float(LEFT)
        pen.text((16, y + 4), engine.engine, INK, small)
        shares = _shares(engine)
        for label in labels:
            width = scale * engine.calls * shares.get(label, 0.0)
            pen.rectangle((x, y, x + width, y + ROW - 8), colors[label])
            x += width
        ideal = LEFT + scale * engine.calls * engine.ideal_seconds
        pen.line((ideal, y - 2, ideal, y + ROW - 6), IDEAL, 2)
        total = _seconds(engine.calls * engine.seconds)
        pen.text((x + 8, y + 4), f"{total}, {engine.calls} x", INK, small)
    for i, label in enumerate(labels):
        x, y = 16 + (i % 3) * 320, TOP + ROW * len(found.engines) + 24 + 22 * (i // 3)
        pen.rectangle((x, y, x + 12, y + 12), colors[label])
        pen.text((x + 18, y - 2), label, INK, small)
    return image


def _labels(found: Estimate) -> list[str]:
    return list(dict.fromkeys(time.label for _, time in _every(found)))
