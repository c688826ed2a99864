"""Run an engine in a process of its own, which may play another processor; numpy and the backend
are all it needs.

    python -m tests.export.quantize.one_layer FOLDER

FOLDER holds `asked.pickle`: the backend's name, the processors that its backend shall take this one
for, the engine and its input. Writes `found.npy`: an output for each processor.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from bifrost_rt import backends
from bifrost_rt.manifest import Range


def main(folder: Path) -> None:
    backend, processors, spec, x = pickle.loads((folder / "asked.pickle").read_bytes())
    module, _, name = backends.BACKENDS[backend].target.partition(":")
    start: Any = getattr(importlib.import_module(module), name)
    [source], [output] = spec.inputs, spec.outputs
    found = np.empty((len(processors), *x.shape[:-1], output.shape[-1]), np.float32)
    for processor, y in zip(processors, found, strict=True):
        engine = start(processor).open(folder, spec, {"images": Range(1, None)})
        engine.bind({source.name: x}, {output.name: y})()
        engine.close()
    np.save(folder / "found.npy", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
