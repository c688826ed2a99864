"""Memory that engines take, and an image under a memory budget: measured, beside the prediction.

    python -m benchmarks.residency SET [--backend NAME] [--budget-share 0.5]

First every engine alone: resident memory once it is open, at its highest while it opens, and when
it is closed again, over the bytes of its files. Then one image with everything resident and one
under a share of what that takes; each runs in a process of its own, and the images must be equal
to the bit. Resident memory counts from a process that has loaded the backend and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import machine
from bifrost_rt import backends, command, dims, manifest, memory_plan
from bifrost_rt.generator import Generator
from bifrost_rt.memory_plan import Requirement

STEPS: dict[str, Any] = {"num_inference_steps": 2, "decoding_steps": 4}


def status() -> tuple[int, int]:
    """Resident bytes of this process: now, and at their highest since `reset`. Pages of mapped
    files count."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def reset() -> int:
    """Forget the highest value; returns the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return status()[0]


def engines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Each engine of a set, opened alone."""
    facts, backend = manifest.read(folder), backends.load(name)
    found = []
    for spec in facts.engines:
        stored = manifest.stored_bytes(facts, spec)
        base = reset()
        engine = backend.open(folder, spec, facts.dimensions)
        opened, peak = status()
        engine.close()
        del engine
        found.append(
            {
                "engine": spec.name,
                "file_bytes": stored,
                "open_bytes": opened - base,
                "peak_bytes": peak - base,
                "closed_bytes": status()[0] - base,
                "counted_bytes": backend.weights_in_memory(spec, stored),
            }
        )
    return found


def needs(folder: Path, name: str) -> list[Requirement]:
    """Return what the schedule of one image counts with."""
    facts, backend = manifest.read(folder), backends.load(name)
    order = dims.drawing(facts.engines)
    at = memory_plan.sizes(facts, **STEPS)
    return memory_plan.needs(facts, order, at, backend.weights_in_memory, backend.scratch_share)


def image(folder: Path, name: str, budget: int) -> dict[str, Any]:
    """Two images of one generator; the second finds what the first has left."""
    backend = backends.load(name)
    base = reset()
    with Generator(folder, backend=backend, memory_budget=budget, prompt_cache=0) as generator:
        result = [generator.run("a red circle", seed=1, output_type="np", **STEPS) for _ in "ab"]
        peak = status()[1] - base
    digests = {
        hashlib.sha256(r.images.tobytes() + r.latents.tobytes()).hexdigest()[:16] for r in result
    }
    seconds = [round(r.timings["total"], 2) for r in result]
    return {"peak_bytes": peak, "digests": sorted(digests), "seconds": seconds}


def measure(folder: Path, backend: str, share: float) -> dict[str, Any]:
    """All of it, each part in a fresh process."""

    def fresh(what: str, budget: int = 0) -> Any:
        command = [sys.executable, "-m", "benchmarks.residency", str(folder)]
        command += ["--backend", backend, "--only", what, "--budget", str(budget)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    wanted = needs(folder, backend)
    everything = sum(need.resident for need in wanted) + max(need.tensors for need in wanted)
    budget = max(int(everything * share), max(need.total for need in wanted))
    prefetch = backends.load(backend).opens_in_threads
    planned = memory_plan.schedules_of(wanted, budget, prefetch=prefetch)
    return {
        "machine": machine.describe(),
        "set": folder.name,
        "backend": backend,
        "engines": fresh("engines"),
        "everything": {"counted_bytes": everything, **fresh("image", everything)},
        "budget": {
            "budget_bytes": budget,
            "planned_peak_bytes": max(step.peak for steps in planned for step in steps),
            "leaves": {step.engine: step.evict for step in planned[0] if step.evict},
            **fresh("image", budget),
        },
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residency", description=__doc__)
    parser.add_argument("set", type=Path)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--budget-share", type=float, default=0.5)
    parser.add_argument("--only", choices=("engines", "image"), help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only == "engines":
        print(json.dumps(engines(options.set, options.backend)))
    elif options.only == "image":
        print(json.dumps(image(options.set, options.backend, options.budget)))
    else:
        report = measure(options.set, options.backend, options.budget_share)
        print(json.dumps(report, indent=1))
        same = report["everything"]["digests"] == report["budget"]["digests"]
        return 0 if same and len(report["budget"]["digests"]) == 1 else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
