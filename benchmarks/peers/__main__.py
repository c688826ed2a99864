"""Peers and ours on the same work, in one interleaved run.

    python -m benchmarks.peers [--works text,flux-bench,flux-7b] [--json FILE] [--plot FILE]

Every candidate runs in a process of its own, peers in environments that are made in the cache
folder at the first run (which takes minutes: those without a wheel are compiled). Candidates of one
precision are loaded, what they compute is compared, and they take turns, to and fro. Medians count.
Leave the machine alone meanwhile; its load is on record.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import machine
from benchmarks.arguments import count, new_file
from benchmarks.peers import flux, report, text
from benchmarks.peers.candidates import Work
from benchmarks.peers.measure import measure
from bifrost_rt import command
from bifrost_rt.files import atomic_write

FORMAT = 1
# At true width one block of each kind in each network, 4 GB in float32.
WORKS: Mapping[str, Callable[[], Work]] = {
    "text": text.work,
    "flux-bench": lambda: flux.work("bench", None),
    "flux-7b": lambda: flux.work("7b", 1),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--works", default=",".join(WORKS), help=f"comma between; default: {','.join(WORKS)}")
    add("--rounds", type=count, default=5, help="timed calls each; default: 5")
    add("--threads", type=count, default=machine.cores(), help="of each; default: all cores")
    add("--json", type=new_file, metavar="FILE", help="write the record")
    add("--plot", type=new_file, metavar="FILE", help="write the image")
    options = parser.parse_args(arguments)
    names = options.works.split(",")
    if unknown := [name for name in names if name not in WORKS]:
        parser.error(f"unknown works {', '.join(unknown)}; known: {', '.join(WORKS)}")
    warnings.simplefilter("ignore")  # diffusers constructs its own deprecated class
    works = [WORKS[name]() for name in names]
    start = time.perf_counter()
    record: dict[str, Any] = {
        **{"format": FORMAT, "machine": machine.describe(), "threads": options.threads},
        "works": [measure(work, options.rounds, options.threads) for work in works],
    }
    record["seconds"] = time.perf_counter() - start
    print(report.text(record))
    if options.json:
        with atomic_write(options.json) as aside:
            aside.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        report.draw(record, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
