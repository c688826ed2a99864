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

from bifrost_rt import processor as processors
from bifrost_rt.backends import linked
from bifrost_rt.backends.base import Buffer, HostMemory, check_bindings, return_freed_memory
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import EngineSpec, Range
from bifrost_rt.processor import Processor

# Measured, benchmarks/results/residency.md: over the file's bytes 1.05 in float32 and 2.42 in
# bfloat16 while opening, and a few MiB for the graph itself. The rest was measured on 24 layers of
# width 2048: 1.14 in int8, where what stays in 16 bit comes on top, 4.95 in fp8, 2.2 in int4, and
# 39 in nvfp4.
UNPACKED = {
    **dict.fromkeys(("float16", "bfloat16"), 2.45),
    "int8": 1.4,
    "float8_e4m3fn": 5.0,
    "int4": 2.5,
    "uint4": 40.0,
}
# int8 in the precise mode, measured on 12 layers of width 4096: 2.39 where 1.14 is without it.
# Weights are made unsigned in memory, and reordered from there.
PRECISE = 2.65
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
        """float32 and int8 are held once, reordered, int8 twice in the precise mode; 16 bit is
        unpacked to float32 beside the stored bytes while the engine opens, and what is simulated
        comes to float32 in steps."""
        weights = spec.precision.weights
        factor = UNPACKED.get(weights, 1.08)
        if weights == "int8" and self._processor.saturates:
            factor = PRECISE
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
    """How this driver runs an engine: the session's options, and what is not to be optimised.

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
    if "fp8" in spec.precision.layers:
        # There are no kernels of 8-bit floats: they are rounded to and computed in float32.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    keep_exact(options, spec, processor)
    # A bias joined to its multiplication hides it from the 8-bit kernels.
    return options, ["MatMulAddFusion"] if "int8" in spec.precision.layers else []


def keep_exact(
    options: ort.SessionOptions, spec: EngineSpec, processor: Processor | None = None
) -> None:
    """Set the precise mode where int8 layers would be wrong without it.

    It makes signed weights unsigned, whose kernels add in 32 bit. Not with VNNI, where it changes
    no bit: there a layer of 3584 x 18944 took 2.4 times as long for 300 rows.

    Args:
        processor: None takes this machine's.
    """
    here = processors.here() if processor is None else processor
    if "int8" in spec.precision.layers and here.saturates:
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
        """A call on these arrays' memory."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)
        session = self._session
        if session is None:
            raise BackendError(f"stage `{self.spec.name}` is closed")
        binding = session.io_binding()
        held = []  # the binding knows addresses only; the call keeps the arrays alive
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, buffer in tensors.items():
                array = np.asarray(buffer)
                if not array.flags.c_contiguous:
                    raise BackendError(
                        f"stage `{self.spec.name}`, `{name}`: the array is not contiguous"
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
