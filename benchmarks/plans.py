"""What TensorRT-RTX makes of the two loops at true widths, read from its plans and estimated.

    python -m benchmarks.plans [--stages visual_decode,denoise] [--cards rtx-4090] [--formats fp8]
        [--json FILE [--label before | --compare before after]]

A checkpoint of the widths of the 7B model and FLUX.1-dev with random weights is written, cut to one
block of each kind in both networks and to two layers of the MLLM: of them the last computes the
unmasked positions alone, and the other all. For every card and format that it multiplies in, the
engine is compiled with its weights in it and outside, each in a process of its own. No GPU is
needed and nothing is run: times are the estimate of `export.planning.kernel_times` for one image;
`visual_decode` is there with guidance, two branches, and without. The ratio is that time over the
time of the same multiplications alone. With `--label` the record keeps the rows of other labels,
and `--compare` prints two of them side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import compiling, machine, truncated_models
from benchmarks.arguments import new_file
from bifrost_rt import command, dims, serialization
from export.compile import capabilities, plan_text
from export.compile.capabilities import ARCHITECTURES
from export.compile.options import WEIGHTS
from export.errors import RecipeError
from export.formats import FORMATS, HALF
from export.planning import devices, kernel_times

if TYPE_CHECKING:
    from export.synthetic.shapes import Shapes

MODULE = "benchmarks.plans"
STAGES = ("visual_decode", "denoise")
LAYERS = 2  # of the MLLM's visual branch
CARDS = ("rtx-3060-12gb", "rtx-4090", "rtx-5090")
REVEALED = 64
MB = 10**6
COLUMNS = {
    "stage": "stage",
    "card": "card",
    "format": "format",
    "weights": "weights",
    "branches": "branches",
    "kernels": "kernels",
    "products": "products",
    "streams": "streams beside",
    "moved": "weights moved",
    "bytes": "MB",
    "seconds": "ms",
    "arithmetic": "products, ms",
    "ratio": "ratio",
}


def sizes(branches: int) -> dict[str, int]:
    """Of one image of the release."""
    return dims.of_run(
        text_tokens=300, steps=256, guided=branches > 1, revealed=REVEALED, **dims.ANSWERS
    )


def formats() -> list[str]:
    """Return what is compared: 16 bit, and those formats in which inputs and weights are
    multiplied."""
    return [HALF.name, *(f.name for f in FORMATS.values() if f.rounding is not None)]


def shapes() -> Shapes:
    """One block of each kind, and two layers."""
    from export.synthetic.shapes import PRESETS  # brings torch, which is not the builder's memory

    cut = PRESETS["7b"].cut(1)
    return dataclasses.replace(
        cut, decoder=dataclasses.replace(cut.decoder, num_hidden_layers=LAYERS)
    )


def measure(
    folder: Path, stages: Sequence[str], cards: Sequence[str], forms: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for every stage, format, card that multiplies in it, and place of the weights."""
    targets = {card: capabilities.architecture(card) for card in cards}
    for spec in truncated_models.written(folder, stages, shapes(), forms):
        fmt = spec.precision.requested
        for card, target in targets.items():
            if fmt not in ARCHITECTURES[target].precisions:
                continue
            for weights in WEIGHTS:
                case = {"stage": spec.name, "card": card, "format": fmt, "weights": weights}
                for row in compiling.in_a_process(folder, spec, fmt, weights, MODULE, card=card):
                    yield {**case, **row}


def compile_one(path: Path) -> list[dict[str, Any]]:
    """Of a task: what its engine's plan says, and the estimate on a card, for one image: with
    guidance, and without where that is less to compute.

    Raises:
        RecipeError: the engine holds no plan that can be read.
    """
    task = json.loads(path.read_text())
    card = devices.find(task["card"])
    built, spec, names = compiling.compiled(task, [capabilities.architecture(card.name)])
    plan = plan_text.find(memoryview(built.engine))
    if plan is None:
        raise RecipeError(f"{task['graph']}: its engine holds no plan that can be read")
    guided = any(dims.BRANCHES in tensor.shape for tensor in spec.inputs)
    streams = 0 if plan.streams is None else plan.streams - 1
    rows = []
    for branches in (2, 1) if guided else (1,):
        calls = kernel_times.of_plan(plan, spec, sizes(branches), names, task["graph"])
        rows.append({"branches": branches, "streams": streams, **figures(calls, card)})
    return rows


def figures(calls: kernel_times.Calls, card: devices.Device) -> dict[str, Any]:
    """One call's kernels, those that multiply by a weight and those that only move one; bytes;
    seconds, estimated, those of its multiplications alone, and their ratio; the slowest kernels."""
    found = kernel_times.estimate([calls], card)
    if found is None or found.missing_rates:
        raise RecipeError(f"{card.name}: its bandwidth or a rate of its arithmetic is not known")
    (engine,) = found.engines
    return {
        "kernels": len(calls.kernels),
        "products": sum(kernel.kind == "product" for kernel in calls.kernels),
        "moved": sum(kernel.kind == "weight" for kernel in calls.kernels),
        "bytes": sum(kernel.bytes or 0 for kernel in calls.kernels),
        "seconds": engine.seconds,
        "arithmetic": engine.arithmetic_seconds,
        "ratio": round(engine.seconds / engine.arithmetic_seconds, 3),
        "slowest": [
            {"kernel": time.name, "label": time.label, "count": time.count, "seconds": time.seconds}
            for time in engine.kernels[:8]
        ],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS.values()) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row).values()) + " |")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        **{name: str(row[name]) for name in COLUMNS},
        "bytes": f"{row['bytes'] / MB:.0f}",
        "seconds": f"{1e3 * row['seconds']:.3f}",
        "arithmetic": f"{1e3 * row['arithmetic']:.3f}",
        "ratio": f"{row['ratio']:.3f}",
    }


def compared(states: Mapping[str, Sequence[Mapping[str, Any]]], first: str, last: str) -> str:
    """Markdown: the rows that two states of a record have both, their figures side by side."""
    cases = ("stage", "card", "format", "weights", "branches")
    known = {tuple(row[name] for name in cases): row for row in states[first]}
    figures = ("kernels", "moved", "bytes", "seconds", "ratio")
    heads = [*cases, *(COLUMNS[name] for name in figures)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in states[last]:
        case = tuple(row[name] for name in cases)
        if case in known:
            before, after = _cells(known[case]), _cells(row)
            sides = [f"{before[name]} → {after[name]}" for name in figures]
            lines.append("| " + " | ".join([*(str(part) for part in case), *sides]) + " |")
    return "\n".join(lines)


def write(path: Path, label: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into a record under a label, in the place of those that had it."""
    held = json.loads(path.read_text()) if path.exists() else {}
    held["machine"] = machine.describe()
    held["sizes"] = {**sizes(1), "layers": LAYERS}
    held.setdefault("states", {})[label] = list(rows)
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}", description=(__doc__ or "").split("\n")[0]
    )
    for name, values in (("stages", STAGES), ("cards", CARDS), ("formats", formats())):
        parser.add_argument(f"--{name}", default=",".join(values), help="comma between")
    parser.add_argument("--json", type=new_file, help="write the record")
    parser.add_argument("--label", default="now", help="of these rows in the record; default: now")
    parser.add_argument("--compare", nargs=2, help="print two labels of the record side by side")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        print(json.dumps(compile_one(given.one)))
        return 0
    if given.compare:
        if not given.json:
            parser.error("--compare needs --json, the record")
        states = json.loads(given.json.read_text())["states"]
        if unknown := [label for label in given.compare if label not in states]:
            parser.error(f"{given.json}: no label {unknown[0]!r}, only {', '.join(states)}")
        print(compared(states, *given.compare))
        return 0
    forms = given.formats.split(",")
    for name in forms:
        if name not in FORMATS:
            parser.error(f"--formats: unknown {name!r}{serialization.nearest(name, FORMATS)}")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for row in measure(Path(temporary), given.stages.split(","), given.cards.split(","), forms):
            rows.append(row)
            print(
                f"{row['stage']}, {row['format']}, {row['card']}, {row['weights']}: "
                f"{row['ratio']:.3f}",
                file=sys.stderr,
            )
            if given.json:
                write(given.json, given.label, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
