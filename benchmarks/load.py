"""A server under load: many clients at once, what they wait, and whether memory stays flat.

    python -m benchmarks.load --engines engines/sets/default [--requests 200] [--clients 16]
        [--max-waiting N] [--num-inference-steps N] [--json FILE]

Starts `bifrost-rt serve` on this machine, so that what is measured is the product. A client that is
told 429 waits as long as Retry-After says and asks again; anything else that is no image is an
error, and the command ends with 1, as it does where the server's memory has grown: its highest in
the last quarter of the requests may exceed that of the second by 5 %.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.arguments import count, new_file
from bifrost_rt import command
from bifrost_rt.serve.settings import Limits

GROWTH = 1.05
PROMPTS = (
    "a red circle",
    "a photo of a green triangle left of a blue square",
    "three yellow circles",
    "a purple square above an orange triangle, on a white background",
)


@dataclass(frozen=True)
class Served:
    """One request: when it was answered, what its client waited, and how often it was sent away."""

    ended: float
    seconds: float
    status: int
    refused: int


class Memory(threading.Thread):
    """Samples a process's resident memory, [(time, bytes)]."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self._path = Path(f"/proc/{pid}/status")
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopped.wait(0.05):
            fields = dict(line.split(":", 1) for line in self._path.read_text().splitlines())
            resident = int(fields["VmRSS"].split()[0]) * 1024
            self.samples.append((time.perf_counter(), resident))

    def stop(self) -> None:
        """End sampling."""
        self._stopped.set()
        self.join()

    def highest(self, since: float, until: float) -> int:
        """Return bytes."""
        return max(size for at, size in self.samples if since <= at <= until)


def measure(
    engines: str, requests: int, clients: int, options: list[str], body: dict[str, Any]
) -> dict[str, Any]:
    """Start a server, send the requests, stop it, and return the record."""
    command = [sys.executable, "-m", "bifrost_rt", "serve", "--port", "0", "--engines", engines]
    server = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    if not url:
        raise SystemExit("error: the server did not start; try `bifrost-rt serve` by itself")
    memory = Memory(server.pid)
    try:
        host = urllib.parse.urlsplit(url).netloc
        with ThreadPoolExecutor(clients) as pool:
            # backends keep what the first run of a batch size allocates; that is not growth
            for n in range(1, Limits().batch + 1):
                _ask(host, 0, {**body, "n": n})
            list(pool.map(lambda i: _ask(host, i, body), range(2 * clients)))
            memory.start()
            began = time.perf_counter()
            served = list(pool.map(lambda i: _ask(host, i, body), range(requests)))
        took = time.perf_counter() - began
        memory.stop()
    finally:
        server.terminate()
        status = server.wait(timeout=60)
        server.stdout.close()
    ends = np.quantile(sorted(one.ended for one in served), [0.25, 0.5, 0.75, 1])
    second = memory.highest(ends[0], ends[1])
    last = memory.highest(ends[2], ends[3])
    waits = [one.seconds for one in served if one.status == 200]
    return {
        "machine": machine.describe(),
        "engines": engines,
        "options": options,
        "requests": requests,
        "clients": clients,
        "body": body,
        "answers": dict(Counter(str(one.status) for one in served)),
        "refused_with_429": sum(one.refused for one in served),
        "seconds": took,
        "images_per_second": len(waits) / took,
        "wait_seconds": {
            name: float(np.quantile(waits, q)) for name, q in (("p50", 0.5), ("p99", 0.99))
        },
        "memory_bytes": {"second_quarter": second, "last_quarter": last},
        "memory_growth": last / second,
        "server_exit_status": status,
    }


def _ask(host: str, i: int, body: dict[str, Any]) -> Served:
    began, refused = time.perf_counter(), 0
    while True:
        connection = http.client.HTTPConnection(host, timeout=600)
        content = json.dumps({**body, "prompt": PROMPTS[i % len(PROMPTS)], "seed": i})
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/images/generations", content, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if answer.status != 429:
            break
        refused += 1
        time.sleep(int(answer.headers["Retry-After"]))
    assert answer.status != 200 or len(json.loads(data)["data"]) == body.get("n", 1)
    now = time.perf_counter()
    return Served(now, now - began, answer.status, refused)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)
    steps = {
        name: getattr(options, name)
        for name in ("num_inference_steps", "decoding_steps")
        if getattr(options, name)
    }
    serve = ["--max-waiting", str(options.max_waiting)] if options.max_waiting else []
    record = measure(options.engines, options.requests, options.clients, serve, steps)
    text = json.dumps(record, indent=1)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")
    good = set(record["answers"]) == {"200"} and record["server_exit_status"] == 0
    return 0 if good and record["memory_growth"] <= GROWTH else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description="A server under load."
    )
    add = parser.add_argument
    add("--engines", required=True, metavar="DIR", help="the set")
    add("--requests", type=count, default=200, metavar="N", help="images to ask for (200)")
    add("--clients", type=count, default=16, metavar="N", help="at once (16)")
    add("--max-waiting", type=int, metavar="N", help="the server's queue; default: its own")
    add("--num-inference-steps", type=count, metavar="N", help="default: the set's")
    add("--decoding-steps", type=count, metavar="N", help="default: the set's")
    add("--json", type=new_file, metavar="FILE", help="write the record")
    return parser


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
