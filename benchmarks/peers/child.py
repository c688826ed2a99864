"""A candidate in a process of its own, seen from the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.errors import BackendError

CHECKOUT = Path(__file__).resolve().parents[2]
SHOWN = 2000  # characters of what a process wrote before it failed


class Child:
    """Starts a program and waits until it is ready.

    Args:
        name: the candidate's, for errors.
        python: of its environment.
        program: a module of `benchmarks.peers.programs`, or another that serves the protocol.
        settings: what it is given.
        threads: how many it may use.

    Attributes:
        about: what it said of itself.

    Raises:
        BackendError: it did not get ready; with what it said.
    """

    def __init__(
        self, name: str, python: Path, program: str, settings: Mapping[str, Any], threads: int
    ) -> None:
        self.name = name
        # its files are read here when it has failed
        self._log = tempfile.TemporaryFile(  # noqa: SIM115  open as long as the process is
            "w+", encoding="utf-8", errors="replace"
        )
        environment = {
            **{key: value for key, value in os.environ.items() if key != "PYTHONHOME"},
            **{"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": str(threads)},
        }
        given = json.dumps({**settings, "threads": threads})
        self._process = subprocess.Popen(
            [str(python), "-m", program, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=CHECKOUT,
            env=environment,
        )
        try:
            self.about: dict[str, Any] = self._answer("ready")
        except BackendError:
            self.end()
            raise

    def run(self) -> dict[str, float]:
        """Let it do the work once; return seconds by figure."""
        figures: dict[str, float] = self._ask("figures", do="run")
        return figures

    def output(self) -> NDArray[Any]:
        """Let it compute what is compared."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._ask("saved", do="output", to=str(Path(folder) / "output.npy"))
            array: NDArray[Any] = np.load(path)
        return array

    def close(self) -> int:
        """Let it end; return its peak memory in bytes."""
        peak: int = self._ask("peak_bytes", do="end")
        self.end()
        return peak

    def end(self) -> None:
        """End it, whatever it does; nothing where it has ended."""
        self._process.terminate()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self._process.wait()
        self._log.close()

    def _ask(self, key: str, **message: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before says why
        return self._answer(key)

    def _answer(self, key: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            said = self._log.read()[-SHOWN:].strip()
            raise BackendError(
                f"{self.name}: the process ended with status {status}: {said or 'it said nothing'}"
            )
        answer = json.loads(line)
        if key not in answer:
            raise BackendError(f"{self.name}: {answer.get('error', line.strip())}")
        return answer[key]
