"""A record of peers as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

OURS, PEER, RATIO = "#4e79a7", "#bab0ac", "#222222"


def text(record: Mapping[str, Any]) -> str:
    """Return one table for each work, in Markdown."""
    return "\n\n".join("\n".join(_table(work)) for work in record["works"])


def _table(work: Mapping[str, Any]) -> Iterator[str]:
    figures = work["figures"]
    heads = [f"{what}, ms" for what in figures.values()]
    heads += [f"over ours: {what}" for what in figures.values()]
    columns = [work["work"], "precision", *heads, "RMS difference"]
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in work["candidates"]:
        about = [row["name"], row["precision"]]
        if "failed" in row:
            reason = " ".join(row["failed"].split()).replace("|", "/")[:200]
            yield "| " + " | ".join([*about, *["–"] * (len(columns) - 3), reason]) + " |"
            continue
        times = [milliseconds(row["seconds"].get(figure)) for figure in figures]
        over = [_ratio(work, row, figure) for figure in figures]
        off = f"{100 * row['difference']['rms']:.2f} %"
        yield "| " + " | ".join([*about, *times, *over, off]) + " |"


def milliseconds(found: Mapping[str, float] | None) -> str:
    """Return the median; a dash where the candidate does not have this figure."""
    return "–" if found is None else f"{1000 * found['median']:.4g}"


def _ratio(work: Mapping[str, Any], row: Mapping[str, Any], figure: str) -> str:
    if row["ours"]:
        return "ours"
    for ratio in work["ratios"]:
        if (ratio["peer"], ratio["figure"]) == (row["name"], figure):
            return f"{ratio['ratio']:.2f}"
    return "–"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write the image: a bar for each candidate and figure, ours in colour; the format is that of
    the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (work, figure, rows)
        for work in record["works"]
        for figure in work["figures"]
        if (rows := [r for r in work["candidates"] if figure in r.get("seconds", {})])
    ]
    heights = [len(rows) + 1.4 for _, _, rows in panels]
    shape, axes = plt.subplots(
        len(panels),
        1,
        figsize=(10, 0.5 + 0.36 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for ax, (work, figure, rows) in zip(axes[:, 0], panels, strict=True):
        rows = sorted(rows, key=lambda row: row["seconds"][figure]["median"])
        longest = max(row["seconds"][figure]["max"] for row in rows)
        for place, row in enumerate(rows):
            times = {name: 1000 * value for name, value in row["seconds"][figure].items()}
            ax.barh(place, times["median"], height=0.66, color=OURS if row["ours"] else PEER)
            ax.plot([times["min"], times["max"]], [place, place], color=RATIO, linewidth=0.8)
            ratio = _ratio(work, row, figure)
            said = f" {times['median']:.4g} ms" + ("" if ratio in ("ours", "–") else f", ×{ratio}")
            ax.text(max(times["max"], times["median"]), place, said, va="center", fontsize=8)
        labels = [f"{row['name']} ({row['precision']})" for row in rows]
        ax.set_yticks(range(len(rows)), labels, fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1250 * longest)
        ax.set_title(f"{work['work']}: {work['figures'][figure]}", loc="left", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("ms, median; the line is from the shortest to the longest", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape.savefig(path, dpi=130)
    plt.close(shape)
