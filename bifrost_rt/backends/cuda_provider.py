"""What onnxruntime's CUDA provider needs, keeps from the user, and says badly: NVIDIA's libraries,
arithmetic that it leaves to the CPU, and its errors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort

from bifrost_rt.errors import BackendError

PROVIDER, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# Operators that belong on the GPU; sizes are rightly computed on the CPU. A norm or an activation
# there would be waited for and copied to and fro in every step.
ARITHMETIC = {
    *("MatMul", "FusedMatMul", "Gemm", "Conv", "FusedConv", "ConvTranspose", "Attention"),
    *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"),
    *("MatMulNBits", "QLinearConv", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
    *("Softmax", "RMSNormalization", "LayerNormalization", "SkipLayerNormalization"),
    *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupNormalization"),
    *("InstanceNormalization", "Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Sigmoid", "Tanh"),
    *("Erf", "Swish", "RotaryEmbedding", "GridSample", "Resize"),
}


@functools.cache
def load_libraries(preload: Callable[..., None] | None = None) -> str:
    """Load CUDA's libraries and cuDNN from NVIDIA's Python packages: the provider is linked to
    them, and the system's loader does not look there. onnxruntime looks beside itself and in the
    loader's own places; the packages may also be elsewhere on Python's path, as in a virtual
    environment that sees the system's packages.

    Args:
        preload: `onnxruntime.preload_dlls`, or a test's double.

    Returns:
        What is missing, in onnxruntime's words; nothing where all was found.
    """
    load = preload or ort.preload_dlls
    missing = _said(load)
    for root in _nvidia_packages() if missing else ():
        toolkit = max(root.glob("cu[0-9]*/lib"), default=None)
        if toolkit is not None:
            _said(functools.partial(load, cudnn=False, directory=str(toolkit)))
        if (cudnn := root / "cudnn" / "lib").is_dir():
            _said(functools.partial(load, cuda=False, directory=str(cudnn)))
        missing = _said(load)  # what is loaded is found by its name
        if not missing:
            break
    return missing


def _nvidia_packages() -> list[Path]:
    """Return the folders called `nvidia` on Python's path."""
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found is not None else None
    return [Path(place) for place in places or ()]


def _said(load: Callable[[], None]) -> str:
    """Return what a loader prints about its failures, in one line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        load()
    return "; ".join(line.strip() for line in said.getvalue().splitlines() if line.strip())


@contextlib.contextmanager
def in_words(what: str) -> Iterator[None]:
    """Return what onnxruntime raises, as one of this package's errors."""
    try:
        yield
    except Exception as error:  # of many unrelated types
        text = " ".join(str(error).split())
        # onnxruntime puts its own function's whole signature before it
        cuda = re.search(r"(CUDA|CUBLAS|CUDNN)[A-Za-z_ ]*failure \d+: [^;]*", text)
        full = "alloc" in text.lower() or "out of memory" in text.lower()
        raise BackendError(
            f"{what}: onnxruntime {ort.__version__} failed: "
            + (cuda.group().strip() if cuda else text[:400]),
            hint="give it a smaller --memory-budget, or draw fewer images at a time"
            if full
            else None,
        ) from error


def left_to_cpu(assigned: Iterable[Any], provider: str) -> list[str]:
    """Return the arithmetic that onnxruntime gave to the CPU beside a provider, by operator."""
    if provider == CPU:
        return []
    return sorted(
        {
            node.op_type
            for part in assigned
            if part.ep_name == CPU
            for node in part.get_nodes()
            if node.op_type in ARITHMETIC
        }
    )
