"""`bifrost-rt tune`: which backend draws a set fastest on this machine, measured and kept."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bifrost_rt import manifest, selftest
from bifrost_rt.backends import choice, measured
from bifrost_rt.errors import BackendError, BifrostError
from bifrost_rt.generator import Generator, default_set
from bifrost_rt.manifest import Manifest

SETTLE = 0.3  # seconds before each turn: the threads of the library before go on spinning
REQUEST = {"prompt": "a red circle above a blue square", "seed": 0, "output_type": "np"}


def run(options: argparse.Namespace) -> int:
    """Measure every exact backend that can run the set, say which is fastest, and keep it."""
    path = default_set() if options.engines is None else Path(options.engines)
    facts = manifest.read(path)
    names = choice.candidates(facts)
    if len(names) < 2:
        found = choice.choose(facts)
        print(f"{path}: {found.name}: {found.reason}; there is no other to compare it with")
        return 0
    seconds = measure(path, facts, names, options.rounds, options.steps)
    reason = measured.keep(facts, seconds)
    fastest = min(seconds, key=lambda name: seconds[name])
    for name in sorted(seconds, key=lambda name: seconds[name]):
        print(f"{name:12} {seconds[name]:.3f} s an image")
    if reason is not None:
        raise BackendError(
            f"tune: what was measured cannot be kept: {reason}",
            hint=f"make the folder writable, or pass --backend {fastest}",
        )
    print(f"{path}: {fastest} from now on, where no other is asked for")
    return 0


def measure(
    path: Path, facts: Manifest, names: tuple[str, ...], rounds: int, steps: int | None
) -> dict[str, float]:
    """Return the median seconds of an image by backend. Backends take turns, to and fro; each
    first draws the self-test's image, and one that fails it is left out.

    Raises:
        BackendError: none can run the set.
    """
    found: dict[str, list[float]] = {}
    request: dict[str, Any] = {**REQUEST, "num_inference_steps": steps}
    failed: dict[str, BifrostError] = {}
    for turn in range(2):
        for name in names if turn == 0 else reversed(names):
            if name in failed:
                continue
            try:
                with Generator(path, backend=name, prompt_cache=0) as generator:
                    if turn == 0:
                        selftest.check(generator)
                    generator.run(**request)  # buffers and kernels
                    for _ in range(rounds):
                        time.sleep(SETTLE)
                        began = time.perf_counter()
                        generator.run(**request)
                        found.setdefault(name, []).append(time.perf_counter() - began)
            except BifrostError as error:
                failed[name] = error
                print(f"warning: {name} is left out: {error.message}", file=sys.stderr)
    seconds = {name: statistics.median(of) for name, of in found.items() if name not in failed}
    if not seconds:
        raise next(iter(failed.values()))
    return seconds
