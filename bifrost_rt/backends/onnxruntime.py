"""onnxruntime on the CPU. Buffers are numpy arrays, bound by address: nothing is copied."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bifrost_rt import formats
from bifrost_rt import processor as processors
from bifrost_rt.backends import linked
from bifrost_rt.backends.base import Buffer, HostMemory, check_bindings, return_freed_memory
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import EngineSpec, Range
from bifrost_rt.processor import Processor

# Measured, benchmarks/results/residency.md: over the file's bytes 1.05 in float32, and a few MiB
# for the graph itself. A format knows what it takes.
PLAIN = 1.08
FIXED = 4 << 20


class OnnxRuntime(HostMemory):
    """The CPU execution provider.

    Args:
        processor: None takes this machine's.
    """

    name = "onnxruntime"

    def __init__(self, processor: Processor | None = None) -> None:
        self._processor = processors.here() if processor is None else processor

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """float32 and bytes are held once, reordered, bytes twice in the precise mode; 16 bit is
        unpacked to float32 beside the stored bytes while the engine opens, and what is simulated
        comes to float32 in steps."""
        weights = spec.precision.weights
        factor = formats.in_memory(weights, self.name, PLAIN)
        stored_as = formats.of_type(weights)
        precise = None if stored_as is None else stored_as.precise_in_memory
        if precise is not None and self._processor.saturates:
            factor = precise
        return math.ceil(stored * factor) + FIXED

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeEngine:
        """Load one graph with its weights.

        Raises:
            BackendError: onnxruntime does not accept the file.
        """
        options, disabled = session_options(spec, self._processor)
        path = folder / spec.graph
        try:
            session = ort.InferenceSession(
                linked.for_onnxruntime(folder, spec, options),
                sess_options=options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=disabled,
            )
        except BackendError:
            raise
        except Exception as error:  # onnxruntime raises many unrelated types here
            raise BackendError(
                f"{path}: onnxruntime {ort.__version__} cannot load this engine: {error}",
                hint="rebuild the set with `python -m export.build --backend onnxruntime`",
            ) from error
        return OnnxRuntimeEngine(session, spec, dimensions)


def session_options(
    spec: EngineSpec, processor: Processor | None = None
) -> tuple[ort.SessionOptions, list[str]]:
    """Say how this backend runs an engine: the session's options, and what is not to be optimised.

    Args:
        processor: None takes this machine's.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; warnings about the graph belong to the build
    # A set has several sessions, run one after another: a pool that spins after its work is
    # done takes the cores from the next engine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without it, weights of 4 bits quietly get activations of 8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    there = formats.of_layers(spec.precision.layers)
    for entry in (entry for fmt in there for entry in fmt.session_entries.items()):
        options.add_session_config_entry(*entry)
    keep_exact(options, spec, processor)
    return options, [name for fmt in there for name in fmt.disabled_optimizers]


def keep_exact(
    options: ort.SessionOptions, spec: EngineSpec, processor: Processor | None = None
) -> None:
    """Set the precise mode where layers of bytes would be wrong without it.

    It makes signed weights unsigned, whose kernels add in 32 bit. Not with VNNI, where it changes
    no bit: there a layer of 3584 x 18944 took 2.4 times as long for 300 rows.

    Args:
        processor: None takes this machine's.
    """
    here = processors.here() if processor is None else processor
    if here.saturates and formats.multiplying_bytes(spec.precision.layers):
        options.add_session_config_entry("session.x64quantprecision", "1")


class OnnxRuntimeEngine:
    """One session."""

    def __init__(
        self, session: ort.InferenceSession, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> None:
        self.spec = spec
        self._session: ort.InferenceSession | None = session
        self._dimensions = dimensions

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on these arrays' memory."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)
        session = self._session
        if session is None:
            raise BackendError(f"engine `{self.spec.name}` is closed")
        binding = session.io_binding()
        held = []  # the binding knows addresses only; the call keeps the arrays alive
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in tensors.items():
                array = np.asarray(buffer)
                if not array.flags.c_contiguous:
                    raise BackendError(
                        f"engine `{self.spec.name}`, `{name}`: the array is not contiguous"
                    )
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
                held.append(array)
        return functools.partial(_run, session, binding, held)

    def close(self) -> None:
        """Drop the session, and hand what it had back to the system."""
        self._session = None
        return_freed_memory()


def _run(session: ort.InferenceSession, binding: ort.IOBinding, held: list[NDArray[Any]]) -> None:
    session.run_with_iobinding(binding)
