"""A latency record as a chart: where the median image of each candidate goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import bars

# One colour for a part in every image: those of the planner's, in the order of the pipeline.
COLORS = {
    "mllm_text": "#4e79a7",
    "visual_decode": "#f28e2b",
    "mllm": "#edc949",
    "clip_text": "#9c755f",
    "t5_text": "#76b7b2",
    "conditioning": "#59a14f",
    "control_embed": "#86bcb6",
    "denoise": "#e15759",
    "vae_decode": "#b07aa1",
    "diffusion": "#ff9da7",
    "host": "#bab0ac",
}
# Beside a bar that is more than this many times as long, nothing can be read of the shortest: those
# that are not get a scale of their own.
CRUSHED = 4
LABELLED = 0.06  # of the axis: what a part must be for its share to be written on it


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Write the image; the format is that of the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["candidates"]
    panels = [rows]
    shortest = min(_total(row) for row in rows)
    near = [row for row in rows if _total(row) <= CRUSHED * shortest]
    if len(near) < len(rows):
        panels.append(near)
    heights = [len(panel) + 0.8 for panel in panels]
    figure, all_axes = plt.subplots(
        len(panels),
        1,
        figsize=(10, 1.3 + 0.62 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for axes, panel in zip(all_axes[:, 0], panels, strict=True):
        handles |= _panel(axes, panel, _total(rows[0]))
    if len(panels) > 1:
        title = f"within {CRUSHED} times the fastest"
        all_axes[1, 0].set_title(title, loc="left", fontsize=9, color="#555555")
    all_axes[-1, 0].set_xlabel("ms for the median image")
    names = [name for name in COLORS if name in handles]
    figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside upper center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parts(row: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of the median image by part, in the order of the bar; `host` is what no engine
    accounts for, and of a reference what lies between its two parts."""
    image = row["median_image"]
    found = {name: 1000 * image[name] for name in bars(image)}
    return {**found, "host": max(0.0, 1000 * image["total"] - sum(found.values()))}


def _total(row: Mapping[str, Any]) -> float:
    """Return the median of all images, as in the table."""
    return 1000 * float(row["seconds"]["total"]["p50"])


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], first: float) -> dict[str, Any]:
    """Bars of these candidates on a scale of their own; `first` is the first candidate's total."""
    longest = max(sum(parts(row).values()) for row in rows)
    handles: dict[str, Any] = {}
    for place, row in enumerate(rows):
        end, total, widths = 0.0, _total(row), parts(row)
        for name, width in widths.items():
            bar = axes.barh(place, width, left=end, height=0.62, color=COLORS[name])
            handles.setdefault(name, bar)
            if width > LABELLED * longest:
                share = f"{100 * width / sum(widths.values()):.0f} %"
                at = (end + width / 2, place)
                axes.text(*at, share, ha="center", va="center", fontsize=8, color="#222222")
            end += width
        said = f" {total:,.0f} ms" if total >= 100 else f" {total:.3g} ms"
        if total != first:
            said += f", ×{total / first:.3g}"
        axes.text(end, place, said, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [_label(row["name"]) for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * longest)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _label(name: str) -> str:
    """Return the set's folder without its path."""
    return name.rpartition("/")[2]
