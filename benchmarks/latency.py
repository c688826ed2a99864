"""How fast, next to what: images in turn, from processes of their own, with the machine on record.

    python -m benchmarks.latency --engines A [--versus B | --versus bare | --versus reference …]
        [--json FILE] [--plot FILE]

A candidate is a set's folder, a set on another backend (`DIR@openvino`), `bare`: A's own graphs run
by the library alone (`bare@openvino`), or `reference`: the official loop in torch on the checkpoint
that A was built from, `reference-compiled` with its networks through torch.compile. Everyone draws
the same image before anyone draws the next, so a machine that slows down slows them all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import candidates, chart, figures, host, machine, roofline, table, telemetry
from benchmarks.arguments import count
from benchmarks.candidates import Spec
from benchmarks.interleaving import to_and_fro
from benchmarks.remote import First, Remote
from benchmarks.telemetry import Log, Telemetry
from bifrost_rt import command, dims, manifest, memory_plan
from bifrost_rt.errors import BifrostError

FORMAT = 2
PROMPT = "a photo of a red circle above a blue square"


def measure(
    specs: list[Spec],
    *,
    images: int,
    seconds: float,
    decoding_steps: int | None,
    num_inference_steps: int | None,
    batches: list[int],
) -> dict[str, Any]:
    """Time every candidate and return the record.

    Args:
        images: timed images per candidate, after one that is not timed.
        seconds: start no further round after this long.
        decoding_steps, num_inference_steps: cut equally for all; None takes the set's defaults.
        batches: sizes for images per second.

    Raises:
        BifrostError: a candidate cannot be loaded.
    """
    facts = manifest.read(Path(specs[0].engines))
    request: dict[str, Any] = {
        "prompt": PROMPT,
        "decoding_steps": decoding_steps or facts.defaults.decoding_steps,
        "num_inference_steps": num_inference_steps or facts.defaults.num_inference_steps,
    }
    found = machine.describe()
    with contextlib.ExitStack() as stack:
        watch = telemetry.open_all()
        stack.callback(watch.close)
        remotes = []
        for spec in specs:
            remotes.append(Remote(spec))
            stack.callback(remotes[-1].end)
        first = [_first(remote, request, watch) for remote in remotes]
        ceilings = roofline.ceilings_of(specs, found)
        timed, logs = _rounds(remotes, request, images, seconds, watch)
        ceilings = roofline.ceilings_of(specs, found, ceilings)
        rates = [_rates(remote, request, batches) for remote in remotes]
        held = [(remote.close(), watch.memory(remote.pid)) for remote in remotes]
    after = host.temperature()
    rows = []
    for i, remote in enumerate(remotes):
        row = {
            **_about(remote, first[i], first[0]),
            "peak_memory_bytes": held[i][0],
            "peak_device_memory_bytes": held[i][1],
            "steps": _steps(facts, request),
            **figures.summarise(timed[i]),
            "images_per_second": rates[i],
            "telemetry": logs[i].summary(len(timed[i])),
        }
        row["roofline"] = roofline.of_contender(specs[i], request, row["seconds"], ceilings)
        rows.append({name: value for name, value in row.items() if value not in (None, {})})
    record: dict[str, Any] = {"format": FORMAT, "machine": found, "request": request}
    if (before := found.get("temperature_c")) is not None and after is not None:
        record["temperature_c"] = {"before": before, "after": after}
    record["ceilings"] = {name: known.record() for name, known in ceilings.items()}
    record["candidates"] = rows
    others = {
        spec.name: figures.ratios(timed[0], results)
        for spec, results in zip(specs[1:], timed[1:], strict=True)
    }
    record["ratio_by_contender"] = others
    if others:
        record["ratio"] = next(iter(others.values()))
    return record


def _first(remote: Remote, request: dict[str, Any], watch: Telemetry) -> First:
    with watch.turn(Log()):  # for the device's memory; its figures are not those of a timed image
        return remote.first({**request, "seed": 0})


def _rounds(
    remotes: list[Remote], request: dict[str, Any], images: int, seconds: float, watch: Telemetry
) -> tuple[list[list[dict[str, float]]], list[Log]]:
    """Return timings of each candidate's images, drawn in turn, and what its turns did to the
    machine."""
    timed: list[list[dict[str, float]]] = [[] for _ in remotes]
    logs = [Log() for _ in remotes]
    began = time.perf_counter()
    for i in range(images):
        if i and time.perf_counter() - began > seconds:
            break
        turns = list(zip(remotes, timed, logs, strict=True))
        for remote, results, log in to_and_fro(turns, i):
            with watch.turn(log):
                results.append(remote.image({**request, "seed": i + 1}))
    return timed, logs


def _rates(remote: Remote, request: dict[str, Any], batches: list[int]) -> dict[str, float]:
    rates = {}
    for batch in batches:
        prompts = [PROMPT] * batch
        seconds = [remote.image({**request, "prompt": prompts, "seed": s})["total"] for s in (1, 2)]
        rates[str(batch)] = batch / min(seconds)
    return rates


def _about(remote: Remote, first: First, ours: First) -> dict[str, Any]:
    """Say who it is, how it started, and how far its first image is from the first
    candidate's."""
    cold = {
        "seconds": remote.start_seconds + first.timings["total"],
        "cpu_seconds": first.cpu_seconds,
    }
    if first.engines_cpu_seconds is not None:
        cold["engines_cpu_seconds"] = first.engines_cpu_seconds
        cold["beyond_engines_cpu_seconds"] = first.cpu_seconds - first.engines_cpu_seconds
    found = {
        "name": remote.spec.name,
        "kind": remote.spec.kind,
        "backend": remote.spec.backend if remote.spec.runs_the_set else "torch",
        "set_sha256": candidates.set_digest(remote.spec.engines),
        "load_seconds": remote.load_seconds,
        "first_image_seconds": first.timings["total"],
        "cold_start": cold,
    }
    if first.pixels.shape == ours.pixels.shape:
        apart = np.abs(first.pixels.astype(np.int16) - ours.pixels.astype(np.int16))
        found["image_difference"] = int(apart.max())
    return found


def _steps(facts: manifest.Manifest, request: dict[str, Any]) -> dict[str, int]:
    """Return calls of the engines that run in a loop."""
    steps = ("decoding_steps", "num_inference_steps")
    at = memory_plan.sizes(facts, **{name: request[name] for name in steps})
    return {
        spec.name: dims.calls(spec, at(spec.name)) for spec in facts.engines if dims.loops(spec)
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    try:
        names = [options.engines, *options.versus]
        record = measure(
            [candidates.parse(text, options.engines) for text in names],
            images=options.images,
            seconds=options.seconds,
            decoding_steps=options.decoding_steps,
            num_inference_steps=options.num_inference_steps,
            batches=options.batches,
        )
    except BifrostError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table.text(record))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        chart.draw(record, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description="Time engine sets, in turn."
    )
    add = parser.add_argument
    add("--engines", required=True, metavar="DIR[@BACKEND]", help="the set, and its backend")
    add(
        "--versus",
        action="append",
        default=[],
        metavar="WHAT",
        help="another DIR[@BACKEND]; bare[@BACKEND], the set's graphs run by the library alone; "
        "reference, the official loop in torch, or reference-compiled; may be repeated",
    )
    add("--images", type=count, default=10, metavar="N", help="timed images each (10)")
    add("--seconds", type=float, default=600, metavar="S", help="no new round after S (600)")
    add("--decoding-steps", type=count, metavar="N", help="for all; default: the set's")
    add("--num-inference-steps", type=count, metavar="N", help="for all; default: the set's")
    add("--batches", type=count, nargs="*", default=[], metavar="B", help="images per second at B")
    add("--json", type=Path, metavar="FILE", help="write the record")
    add("--plot", type=Path, metavar="FILE", help="draw the stages")
    return parser


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
