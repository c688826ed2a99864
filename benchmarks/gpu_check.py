"""Everything that only a GPU can show of engine sets, on one record.

    python -m benchmarks.gpu_check --engines DIR [--recordings tests/golden/alpha] [--json FILE]

On ONNX graphs it needs the runtime alone: no torch, no internet. A set is tried on every backend
for GPUs that is installed; for those that run compiled sets it is compiled first, which takes the
package onnx. A compiled set is tried on its own. `--backend` names others, the CPU's too.
`--engines` and `--backend` may be repeated.
The record has the machine, the bare GPU (`benchmarks.gpu_device`), and for each set and backend the
trials of `benchmarks.gpu_trials`. It is written after every trial, and a trial that fails stands in
it with its reason; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_device, machine
from benchmarks.arguments import new_file
from benchmarks.gpu_trials import TRIALS, Subject
from benchmarks.sensors import output
from bifrost_rt import backends, command, manifest
from bifrost_rt.backends import gpu
from bifrost_rt.errors import BackendError, BifrostError


def subjects(
    folders: Sequence[Path], names: Sequence[str], recordings: Path | None, work: Path
) -> tuple[list[Subject], dict[str, str]]:
    """Every set on every backend that runs it, and why others cannot be compiled.

    Args:
        names: backends; none means those for GPUs that can run here.
        work: where compiled sets go.

    Raises:
        BackendError: there is none.
    """
    for name in names:
        backends.load(name)  # an unknown or missing one says so now
    usable = [
        name
        for name, backend in backends.BACKENDS.items()
        if name in names or (not names and backend.gpu and backend.unavailable() is None)
    ]
    found, refused = [], {}
    for folder in folders:
        built_for = manifest.read(folder).backend
        for name in usable:
            if built_for not in ("onnxruntime", name):
                continue
            ready = folder
            if backends.BACKENDS[name].compiled and built_for == "onnxruntime":
                try:
                    ready = compiled(folder, name, work)
                except BifrostError as error:
                    refused[f"{folder.name} for {name}"] = error.message
                    continue
            start = functools.partial(backends.load, name)
            found.append(Subject(ready, name, start, recordings))
    if not found and not refused:
        reasons = {
            name: backend.unavailable() or "no set of these is for it"
            for name, backend in backends.BACKENDS.items()
            if backend.gpu
        }
        raise BackendError(
            "nothing to try: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        )
    return found, refused


def compiled(folder: Path, backend: str, work: Path) -> Path:
    """Return the set, compiled for this machine's GPU.

    Raises:
        BifrostError: it cannot be.
    """
    from export.compile.compiled_set import compile_set  # takes the package onnx

    output = work / f"{folder.name}-{backend}"
    return compile_set(folder, output, backend=backend, max_images=4, max_steps=64)


def check(
    tried: Sequence[Subject],
    refused: Mapping[str, str],
    write: Callable[[dict[str, Any]], None],
    trials: Sequence[str],
) -> bool:
    """Run the trials, and hand the record to `write` after each; whether none failed.

    Args:
        refused: set and backend -> why it is not among those tried.
    """
    record: dict[str, Any] = {
        "refused": dict(refused),
        "machine": machine.describe(),
        "gpu": str(gpu.find()),
        "nvidia_smi": (output("nvidia-smi") or "").splitlines(),
        "device": attempt("device", _device),
        "sets": [],
    }
    rows = [record["device"]]
    for subject in tried:
        row: dict[str, Any] = {"engines": subject.folder.name, "backend": subject.backend}
        record["sets"].append(row)
        for name in trials:
            row[name] = attempt(name, functools.partial(TRIALS[name], subject))
            rows.append(row[name])
            write(record)
    return not refused and not any(failures(row) for row in rows)


def failures(figures: Any) -> list[str]:
    """Return what failed anywhere in a trial's figures."""
    if not isinstance(figures, dict):
        return []
    own = [str(figures["failed"])] if "failed" in figures else []
    return own + [why for value in figures.values() for why in failures(value)]


def _device() -> dict[str, Any]:
    """Return the bare GPU, where there is one and the bindings are installed."""
    if isinstance(reason := gpu.find(), str):
        return {"skipped": reason}
    if not backends.installed("cuda.bindings"):
        return {"skipped": "the Python package `cuda.bindings` is not installed"}
    return gpu_device.check()


def attempt(name: str, trial: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a trial's figures, or how it failed: the record must not be lost with it."""
    start = time.perf_counter()
    try:
        found = trial()
    except Exception as error:  # whatever a library raises on hardware that nobody has tried
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--engines", type=Path, action="append", required=True, metavar="DIR", help="a set")
    add("--backend", action="append", default=[], metavar="NAME", help="in place of the GPU's")
    add("--recordings", type=Path, metavar="DIR", help="golden cases of a set's checkpoint")
    add("--trials", nargs="+", choices=TRIALS, default=list(TRIALS), help="only these")
    add("--json", type=new_file, metavar="FILE", help="write the record; default: print it")
    options = parser.parse_args(arguments)

    def write(record: dict[str, Any]) -> None:
        text = json.dumps(record, indent=1) + "\n"
        if options.json:
            options.json.write_text(text, encoding="utf-8")
        else:
            print(text)

    with tempfile.TemporaryDirectory() as temporary:
        tried, refused = subjects(
            options.engines, options.backend, options.recordings, Path(temporary)
        )
        good = check(tried, refused, write, options.trials)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
