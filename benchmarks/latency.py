"""How fast, next to what: images in turn, from processes of their own, with the machine on record.

    python -m benchmarks.latency --engines A [--versus B | --versus reference …]
        [--json FILE] [--plot FILE]

A contender is a set's folder, a set on another backend (`DIR@openvino`), or `reference`: the
official loop in torch on the checkpoint that A was built from. Everyone draws the same image before
anyone draws the next, so a machine that slows down slows them all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import figures, machine
from benchmarks.contenders import Remote, Spec, set_digest
from bifrost_rt import manifest
from bifrost_rt.errors import BifrostError

FORMAT = 1
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
    """Time every contender and return the record.

    Args:
        images: timed images per contender, after one that is not timed.
        seconds: start no further round after this long.
        decoding_steps, num_inference_steps: cut equally for all; None takes the set's defaults.
        batches: sizes for images per second.

    Raises:
        BifrostError: a contender cannot be loaded.
    """
    facts = manifest.read(Path(specs[0].engines))
    request: dict[str, Any] = {
        "prompt": PROMPT,
        "decoding_steps": decoding_steps or facts.defaults.decoding_steps,
        "num_inference_steps": num_inference_steps or facts.defaults.num_inference_steps,
    }
    contenders = [Remote(spec) for spec in specs]
    first = [c.image({**request, "seed": 0})["total"] for c in contenders]
    timed: list[list[dict[str, float]]] = [[] for _ in contenders]
    began = time.perf_counter()
    for i in range(images):
        if i and time.perf_counter() - began > seconds:
            break
        for contender, results in zip(contenders, timed, strict=True):
            results.append(contender.image({**request, "seed": i + 1}))
    rates = [_rates(c, request, batches) for c in contenders]
    steps = {
        "visual_decode": request["decoding_steps"],
        "denoise": request["num_inference_steps"],
    }
    record: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine.describe(),
        "request": request,
        "contenders": [
            {
                "name": c.spec.name,
                "set_sha256": set_digest(c.spec.engines),
                "load_seconds": c.load_seconds,
                "first_image_seconds": first_image,
                "peak_memory_bytes": c.close(),
                "steps": steps,
                **figures.summarise(results),
                "images_per_second": rate,
            }
            for c, first_image, results, rate in zip(contenders, first, timed, rates, strict=True)
        ],
    }
    others = {
        spec.name: figures.ratios(timed[0], results)
        for spec, results in zip(specs[1:], timed[1:], strict=True)
    }
    record["ratio_by_contender"] = others
    if others:
        record["ratio"] = next(iter(others.values()))
    return record


def _rates(contender: Remote, request: dict[str, Any], batches: list[int]) -> dict[str, float]:
    rates = {}
    for batch in batches:
        prompts = [PROMPT] * batch
        seconds = [
            contender.image({**request, "prompt": prompts, "seed": s})["total"] for s in (1, 2)
        ]
        rates[str(batch)] = batch / min(seconds)
    return rates


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    specs = [_spec(options.engines, options.engines)]
    specs += [_spec(text, options.engines) for text in options.versus]
    try:
        record = measure(
            specs,
            images=options.images,
            seconds=options.seconds,
            decoding_steps=options.decoding_steps,
            num_inference_steps=options.num_inference_steps,
            batches=options.batches,
        )
    except BifrostError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(figures.table(record))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        figures.plot(record, options.plot)
    return 0


def _spec(text: str, engines: str) -> Spec:
    if text == "reference":
        return Spec("reference", engines.partition("@")[0], reference=True)
    folder, _, backend = text.partition("@")
    return Spec(text.rstrip("/"), folder, backend or None)


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
        help="another DIR[@BACKEND], or `reference`; may be repeated",
    )
    add("--images", type=int, default=10, metavar="N", help="timed images each (10)")
    add("--seconds", type=float, default=600, metavar="S", help="no new round after S (600)")
    add("--decoding-steps", type=int, metavar="N", help="for all; default: the set's")
    add("--num-inference-steps", type=int, metavar="N", help="for all; default: the set's")
    add("--batches", type=int, nargs="*", default=[], metavar="B", help="images per second at B")
    add("--json", type=Path, metavar="FILE", help="write the record")
    add("--plot", type=Path, metavar="FILE", help="draw the stages")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
