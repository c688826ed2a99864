"""The tensors of a checkpoint, as every peer gets them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ORDINARY = 256  # ids that every peer's tokenizer knows as ordinary pieces


def tensors(folders: Iterable[Path]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the tensors of folders of safetensors files, in float32."""
    from safetensors import safe_open

    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        with safe_open(path, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                yield name, stream.get_tensor(name).float().numpy()
