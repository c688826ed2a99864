"""Candidates in turn, each in its process -> the record of one work."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.interleaving import to_and_fro
from benchmarks.peers.candidates import Candidate, Work
from benchmarks.peers.child import Child
from bifrost_rt.errors import BackendError


def measure(work: Work, rounds: int, threads: int) -> dict[str, Any]:
    """Load the candidates of one precision, compare what they compute, and let them work in turn;
    then those of the next: all at once would not fit in memory.

    A candidate that cannot be installed or loaded is a row that says why.

    Raises:
        BackendError: the candidate that the others are compared with is not there, or one of those
            that were loaded ended.
    """
    first = next(c.precision for c in work.candidates if c.name == work.reference)
    groups = dict.fromkeys((first, *(c.precision for c in work.candidates)))
    outputs: dict[str, NDArray[Any]] = {}
    load: list[float] = []
    rows: dict[str, dict[str, Any]] = {}
    for precision in groups:
        group = [c for c in work.candidates if c.precision == precision]
        rows |= _group(work, group, rounds, threads, outputs, load)
    found = [rows[candidate.name] for candidate in work.candidates]
    return {
        "work": work.name,
        "figures": dict(work.figures),
        "sizes": dict(work.sizes),
        "reference": work.reference,
        "rounds": rounds,
        "load": load,
        "candidates": found,
        "ratios": ratios(found, tuple(work.figures)),
    }


def _group(
    work: Work,
    group: Sequence[Candidate],
    rounds: int,
    threads: int,
    outputs: dict[str, NDArray[Any]],
    load: list[float],
) -> dict[str, dict[str, Any]]:
    """Return the rows of those that work in turn.

    Args:
        outputs: gets what they compute; has the reference's, unless it is among them.
        load: gets the machine's, before every round.
    """
    rows: dict[str, dict[str, Any]] = {}
    children: list[Child] = []
    with contextlib.ExitStack() as stack:
        for candidate in group:
            about = {"name": candidate.name, "precision": candidate.precision}
            rows[candidate.name] = {**about, "ours": candidate.ours}
            print(f"{work.name}: loading {candidate.name}", file=sys.stderr)
            try:
                child = _started(candidate, threads)
                stack.callback(child.end)
                outputs[candidate.name] = child.output()
                child.run()  # the first call is not timed: memory is touched, kernels are made
            except BackendError as error:
                if candidate.name == work.reference:
                    raise
                rows[candidate.name]["failed"] = error.message
                continue
            rows[candidate.name]["about"] = child.about
            children.append(child)
        timed: dict[str, list[dict[str, float]]] = {child.name: [] for child in children}
        for number in range(rounds):
            load.append(os.getloadavg()[0])
            for child in to_and_fro(children, number):
                timed[child.name].append(child.run())
        for child in children:
            rows[child.name]["peak_memory_bytes"] = child.close()
    for name, runs in timed.items():
        rows[name]["seconds"] = summary(runs)
        rows[name]["difference"] = difference(outputs[work.reference], outputs[name])
    return rows


def _started(candidate: Candidate, threads: int) -> Child:
    environment = candidate.environment
    python = Path(sys.executable) if environment is None else environment.make()
    return Child(candidate.name, python, candidate.program, candidate.settings, threads)


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each figure."""
    return {
        name: {
            "median": float(np.median([run[name] for run in runs])),
            "min": min(run[name] for run in runs),
            "max": max(run[name] for run in runs),
        }
        for name in runs[0]
    }


def difference(reference: NDArray[Any], other: NDArray[Any]) -> dict[str, float]:
    """Of what two candidates compute: the largest over the reference's largest, and the root of the
    mean square over the reference's.

    Raises:
        BackendError: they do not even have the same shape.
    """
    if reference.shape != other.shape:
        raise BackendError(
            f"a candidate computes {list(other.shape)}, expected {list(reference.shape)}"
        )
    off = other.astype(np.float64) - reference
    return {
        "largest": float(np.abs(off).max() / np.abs(reference).max()),
        "rms": float(np.sqrt(np.square(off).mean() / np.square(reference, dtype=float).mean())),
    }


def ratios(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> list[dict[str, Any]]:
    """Say of every peer and figure how many times as long it takes as ours of the same precision;
    of several of ours, the fastest. `least` is the same of the shortest times, which other work on
    the machine moves less."""
    there = [row for row in rows if "seconds" in row]
    found = []
    for row in there:
        mine = [r for r in there if r["ours"] and r["precision"] == row["precision"]]
        if row["ours"] or not mine:
            continue
        for figure in figures:
            if figure not in row["seconds"]:
                continue
            best = min(mine, key=lambda r: r["seconds"][figure]["median"])
            theirs, ours = row["seconds"][figure], best["seconds"][figure]
            found.append(
                {
                    **{"peer": row["name"], "ours": best["name"], "figure": figure},
                    "ratio": theirs["median"] / ours["median"],
                    "least": theirs["min"] / min(r["seconds"][figure]["min"] for r in mine),
                }
            )
    return found
