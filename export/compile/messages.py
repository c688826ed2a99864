"""What parser and builder say, as one sentence that names stage and layer, and what to do.

The libraries log several lines for one failure, some of them only about the GPU that a machine
without one does not have. What they say is kept; what it means for a set is added.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from export.errors import CompileError
from export.formats import OLDEST_HALF

# Logged whenever anything fails on a machine without a driver; never the cause.
_NOISE = ("catchCudaError", "Error reading CUDA GPU properties")
_ADVICE = (
    (
        r"HW-specific datatypes: (?P<what>\w+)",
        "the target has no arithmetic for this type; rebuild the set with "
        f"`python -m export.build --precision {OLDEST_HALF.name}`",
    ),
    (
        r"is_decomposable",
        "no kernel for this attention, and it was not marked decomposable: please report this",
    ),
    (
        r"(?i)out ?of ?memory|bad_?alloc|MEM_ALLOC_FAILED|insufficient memory|MemoryError|"
        r"cannot allocate memory|unable to allocate",
        "compiling takes about three times an engine's size, and room for its largest run: free "
        "memory, leave the weights out with --weights bound, lower --max-images, or compile on a "
        "larger machine",
    ),
    (
        r"violate shape constraints|exceed_int32_dim",
        "the largest run is beyond what an engine can address: lower --max-images or --max-steps",
    ),
    (
        r"MODEL_DESERIALIZE_FAILED|Failed to parse the ONNX",
        "the file is not an ONNX graph: rebuild the set with `python -m export.build`",
    ),
    (
        r"Plugin not found|UNSUPPORTED_NODE|No importer registered",
        "this version of the builder does not know the operator: upgrade it",
    ),
)
_DEFAULT = "rebuild the set with `python -m export.build`; if that does not help, please report it"


def parser_error(stage: str, title: str, errors: Sequence[Any]) -> CompileError:
    """Of the parser's errors the first: the others follow from it."""
    if not errors:
        return CompileError(f"engine `{stage}`: {title} cannot read the graph", hint=_DEFAULT)
    first = errors[0]
    layer = f", layer `{first.node_name()}` ({first.node_operator()})" if first.node_name() else ""
    said = _sentence([f"{first.code()} {first.desc()}"])
    return CompileError(
        f"engine `{stage}`{layer}: {title} cannot read the graph: {said}", hint=advice(said)
    )


def builder_error(stage: str, title: str, logged: Iterable[str]) -> CompileError:
    """From what was logged as an error while the engine was built."""
    said = _sentence(logged)
    layer = re.search(
        r"(?:layer|node|operation)[ :]+[`'\"]?(node_\w+|[\w./]*\.[\w./]+)", said, re.I
    )
    where = f", layer `{layer[1]}`" if layer else ""
    return CompileError(
        f"engine `{stage}`{where}: {title} cannot compile it: {said}", hint=advice(said)
    )


@contextlib.contextmanager
def explained(stage: str, title: str, log: Any) -> Iterator[None]:
    """Turn what a library throws, and what Python raises for want of memory, into an error of the
    stage.

    Args:
        log: see `bifrost_rt.backends.tensorrt_log`.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:  # a C++ exception is one of these
        cause: BaseException = error
        while cause.__cause__ is not None:  # onnx_ir wraps what a tensor's own reading raises
            cause = cause.__cause__
        if isinstance(cause, OSError) and cause.errno != errno.ENOMEM:
            raise
        logged = [str(cause) or type(cause).__name__, *log.take()]
        raise builder_error(stage, title, logged) from error


def advice(said: str) -> str:
    """Return what to do about a message."""
    return next((text for pattern, text in _ADVICE if re.search(pattern, said)), _DEFAULT)


def _sentence(lines: Iterable[str]) -> str:
    said = [
        re.sub(r"\s+", " ", line).strip()
        for message in lines
        for line in message.splitlines()
        if line.strip() and not any(noise in line for noise in _NOISE)
    ]
    return said[0][:600] if len(said) == 1 else " ".join(said)[:600] or "it does not say why"
