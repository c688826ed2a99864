"""Where quantisation costs quality: the sweep of a set built to a budget, as table and plot.

python -m export.build --precision int8 --quality-budget 45 --output DIR
python -m benchmarks.sensitivity --engines DIR [--plot FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.arguments import new_file
from bifrost_rt import command
from bifrost_rt.errors import BifrostError
from bifrost_rt.files import read_text

HEAD = ("quantised alone", "stage error", "tokens", "residuals", "picture", "")


def read(folder: Path) -> dict[str, Any]:
    """The sweep in a set's report.

    Raises:
        BifrostError: there is none.
    """
    try:
        report: dict[str, Any] = json.loads(read_text(folder / "report.json"))
    except OSError as error:
        raise BifrostError(f"{folder}: no report of a set here: {error.strerror}") from None
    if "sensitivity" not in report:
        raise BifrostError(
            f"{folder}: its report holds no sweep",
            hint="build the set with --quality-budget DB",
        )
    swept: dict[str, Any] = report["sensitivity"]
    return swept


def table(swept: dict[str, Any]) -> str:
    """Markdown: stages first, then groups, the costliest on top."""
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|---|---|---|---|"]
    groups = sorted(swept["groups"].items(), key=lambda item: item[1]["psnr"])
    for name, cost in [*swept["stages"].items(), *groups]:
        output = "" if cost["output"] is None else f"{cost['output']:.2%}"
        kept = "kept in 16 bit" if name in swept["kept"] else ""
        lines.append(
            f"| {name} | {output} | {cost['tokens']:.5f} | {cost['residuals']:.2%} "
            f"| {cost['psnr']:.1f} dB | {kept} |"
        )
    lines.append("")
    lines.append(
        f"{len(swept['kept'])} of {len(swept['groups'])} groups stay in 16 bit; the pictures keep "
        f"{swept['psnr']:.1f} dB, asked for {swept['budget']:g}."
    )
    return "\n".join(lines)


def plot(swept: dict[str, Any], path: Path) -> None:
    """One bar per group: the PSNR that is left when it alone is quantised."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = sorted(swept["groups"].items(), key=lambda item: -item[1]["psnr"])
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.26 * len(groups)))
    colours = ["#e15759" if name in swept["kept"] else "#4e79a7" for name, _ in groups]
    axes.barh([name for name, _ in groups], [c["psnr"] for _, c in groups], color=colours)
    axes.axvline(swept["budget"], color="#222222", linewidth=1)
    axes.axvline(swept["stages"]["all"]["psnr"], color="#222222", linewidth=1, linestyle=":")
    axes.set_xlim(left=0.8 * min(swept["budget"], swept["stages"]["all"]["psnr"]))
    axes.set_xlabel("PSNR of the picture to float32, dB, this group alone quantised")
    axes.set_title(
        "Dotted: everything quantised. Solid: the budget. Red: stays in 16 bit for it.",
        fontsize=10, loc="left",
    )  # fmt: skip
    axes.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sensitivity", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--engines", type=Path, required=True, help="the set")
    parser.add_argument("--plot", type=new_file, help="a picture of the groups")
    given = parser.parse_args()

    swept = read(given.engines)
    print(table(swept))
    if given.plot:
        plot(swept, given.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
