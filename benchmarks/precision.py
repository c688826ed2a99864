"""What each precision costs: score, images and bytes of several sets of one model.

    python -m benchmarks.precision engines/sets/default engines/sets/default-int8 … [--json FILE]

Every set draws the prompts of benchmarks.quality with the same seeds; PSNR and SSIM are against the
first set's images. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import count, new_file
from benchmarks.quality import Drawn, cells, chosen, closeness, measure, percent
from bifrost_rt import Generator, command
from bifrost_rt import manifest as manifests
from bifrost_rt.files import read_text
from scenes.world import FAMILIES

COLUMNS = ("set", "precision", "weights", "overall", "PSNR mean", "PSNR lowest", "SSIM")


def weight_bytes(folder: Path) -> int:
    """Return bytes of a set's weights, as its build read them back."""
    report = json.loads(read_text(folder / "report.json"))
    return sum(sum(engine["weight_bytes"].values()) for engine in report["engines"].values())


def record(
    folder: Path, drawn: list[Drawn], images: list[NDArray[np.uint8]],
    reference: list[NDArray[np.uint8]],
) -> dict[str, Any]:  # fmt: skip
    """One set's line of the table."""
    manifest = manifests.read(folder)
    asked = {engine.precision.requested for engine in manifest.engines}
    return {
        "set": manifest.name,
        "precision": "/".join(sorted(asked)),
        "weight_bytes": weight_bytes(folder),
        "overall": percent(drawn),
        "families": {f: percent([d for d in drawn if d.family == f]) for f in FAMILIES},
        "images": len(drawn),
        **closeness(images, reference),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; the first set is the one that the others are compared with."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for i, r in enumerate(records):
        close = ["–"] * 3 if i == 0 else cells(r)
        size = f"{r['weight_bytes'] / 1e6:.1f} MB"
        lines.append(
            "| " + " | ".join([r["set"], r["precision"], size, f"{r['overall']} %", *close]) + " |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("sets", nargs="+", type=Path, help="the first is compared with")
    parser.add_argument("--limit", type=count, help="this many prompts, evenly over the families")
    parser.add_argument("--json", type=new_file)
    given = parser.parse_args()
    items = chosen(given.limit)
    records: list[dict[str, Any]] = []
    reference: list[NDArray[np.uint8]] | None = None
    for folder in given.sets:
        print(folder, file=sys.stderr)
        with Generator(folder) as generator:
            drawn, images = measure(generator, items, "on", {})
        reference = reference or images
        records.append(record(folder, drawn, images, reference))
        if given.json:
            given.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(table(records))
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
