"""What the built files really hold, layer by layer: read back, compared with what was asked.

A build that quietly keeps a layer in float32, or a runtime that quietly computes it there, is what
users of such tools complain about most. Nothing here trusts what the build believes it wrote: the
files are opened again, and onnxruntime is asked which kernels it makes of them.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto

from bifrost_rt import formats as runtime
from bifrost_rt.backends.onnxruntime import session_options
from bifrost_rt.formats import FORMATS as RUNTIME
from bifrost_rt.formats import of_layers
from bifrost_rt.manifest import EngineSpec
from export.errors import PrecisionError
from export.formats import FORMATS, FULL, SIXTEEN_BIT
from export.precision import SMALL

# Operators with a weight, and the place of the input that it meets.
LAYERS = {
    "MatMul": (1, 0),
    "Gemm": (1, 0),
    "Conv": (1, 0),
    "ConvTranspose": (1, 0),
    "Gather": (0, 1),
}
_UNPACKS = {f.weight_function for f in FORMATS.values() if f.weight_function is not None}
PASSED = ("Cast", "Transpose", "DequantizeLinear", *_UNPACKS, "Identity")
READABLE = 1 << 30  # bytes of weights that are written a second time to see the kernels


@dataclass(frozen=True)
class Layer:
    """One weight as a file holds it.

    Attributes:
        fmt: as recipes call it, or `stored/input` where recipes have no name for it.
        bytes: of the weight and its block scales.
    """

    fmt: str
    shape: tuple[int, ...]
    bytes: int


def read(path: Path) -> dict[str, Layer]:
    """Return the layers of an ONNX file, by the path of the module that the weight belongs to."""
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    # (stored weight, rounded input) -> what the recipe calls it
    forms = {(f.stored, rounded): f.name for f in FORMATS.values() for rounded in f.inputs}
    found: dict[str, Layer] = {}
    for node in graph.node:
        if node.op_type not in LAYERS:
            continue
        of_weight, of_input = LAYERS[node.op_type]
        chain = _chain(node.input[of_weight], makers)
        stored = weights.get(chain[-1].input[0] if chain else node.input[of_weight])
        if stored is None or math.prod(stored.dims) < 2:
            continue
        path_of, _, leaf = stored.name.rpartition(".")
        if leaf not in ("weight", "codes"):
            continue
        scales = [
            weights[name]
            for step in chain
            for scale in step.input[1:]
            if (name := _stored(scale, makers)) in weights
        ]
        kind = _name(stored.data_type)
        rounded = _rounded(node.input[of_input], makers, weights) if kind != "float" else ""
        found[path_of] = Layer(
            forms.get((kind, rounded), f"{kind}/{rounded or 'float'}"),
            tuple(stored.dims),
            _bytes(stored) + sum(_bytes(scale) for scale in scales if len(scale.dims) > 1),
        )
    return found


def _stored(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """Return the initializer behind a value, where only what keeps its numbers stands between."""
    steps = _chain(name, makers)
    return steps[-1].input[0] if steps else name


def _chain(name: str, makers: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes between a layer and its stored weight."""
    steps: list[onnx.NodeProto] = []
    while (node := makers.get(name)) is not None and node.op_type in PASSED:
        steps.append(node)
        name = node.input[0]
    return steps


def _rounded(
    name: str, makers: Mapping[str, onnx.NodeProto], weights: Mapping[str, TensorProto]
) -> str:
    """Return the type that an input goes through, or nothing."""
    node = makers.get(name)
    if node is not None and node.domain and any(node.op_type in f.inputs for f in FORMATS.values()):
        return node.op_type
    before = makers.get(node.input[0]) if node is not None and node.input else None
    if node is None or node.op_type != "DequantizeLinear" or before is None:
        return ""
    if before.op_type != "QuantizeLinear":
        return ""
    if len(before.input) > 2 and before.input[2]:
        zero = weights.get(before.input[2])
        return "" if zero is None else _name(zero.data_type)
    kind = next((a.i for a in before.attribute if a.name == "output_dtype"), TensorProto.UINT8)
    return _name(kind)


def _name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


def _bytes(tensor: TensorProto) -> int:
    return int(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)


def kernels(folder: Path, spec: EngineSpec) -> Counter[str] | None:
    """Say how often onnxruntime uses each operator for an engine, after its own optimisation; None
    where its weights are too many to be written again."""
    if sum((folder / name).stat().st_size for name in spec.files) > READABLE:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        options, disabled = session_options(spec)
        options.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights"
        )
        ort.InferenceSession(
            str(folder / spec.graph),
            sess_options=options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=disabled,
        )
        made = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return Counter(node.op_type for node in made.graph.node)


def _too_small(layer: Layer, fmt: str) -> bool:
    """Say whether it is stored in float32 because 16 bit is not worth a node."""
    sixteen_bit = fmt in (declared.name for declared in SIXTEEN_BIT)
    return sixteen_bit and layer.fmt == FULL.name and layer.bytes < SMALL


def audit(
    folder: Path, specs: Sequence[EngineSpec], asked: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, Any]]:
    """Compare every engine's file with what was decided for it.

    Args:
        asked: engine -> path of a linear layer -> format.

    Returns:
        Per engine: its layers (format, shape, bytes), those that nothing reads, and the kernels.

    Raises:
        PrecisionError: naming the layers that are something else.
    """
    report: dict[str, dict[str, Any]] = {}
    for spec in specs:
        layers = read(folder / spec.graph)
        wanted = asked[spec.name]
        wrong = [
            f"{path}: asked {fmt}, found {layers[path].fmt}"
            for path, fmt in wanted.items()
            if path in layers and layers[path].fmt != fmt and not _too_small(layers[path], fmt)
        ]
        if wrong:
            raise PrecisionError(
                f"engine `{spec.name}` is not what was asked for: {_listed(wrong)}",
                hint="nothing was written; please report this with the recipe and the versions",
            )
        used = kernels(folder, spec)
        _check_kernels(spec, layers, used)
        report[spec.name] = {
            "layers": {
                path: {"format": layer.fmt, "shape": list(layer.shape), "bytes": layer.bytes}
                for path, layer in layers.items()
            },
            "unused": sorted(wanted.keys() - layers.keys()),
            "kernels": None if used is None else dict(used.most_common()),
        }
    return report


def _check_kernels(
    spec: EngineSpec, layers: Mapping[str, Layer], used: Counter[str] | None
) -> None:
    for fmt in (declared for declared in RUNTIME.values() if declared.kernels):
        wanted = sum(layer.fmt == fmt.name for layer in layers.values())
        found = wanted if used is None else sum(used[name] for name in fmt.kernels)
        if found < wanted:
            raise PrecisionError(
                f"engine `{spec.name}`: {wanted} layers are {fmt.name}, but onnxruntime "
                f"{ort.__version__} would compute {wanted - found} of them in float32",
                hint="build with another version of onnxruntime, or keep these layers in 16 bit",
            )


def formats(layers: Mapping[str, Layer]) -> dict[str, int]:
    """Say how many layers have each format, the most frequent first."""
    return dict(Counter(layer.fmt for layer in layers.values()).most_common())


def compute(layers: Mapping[str, Layer]) -> str:
    """Return what the layers of an engine compute in on a CPU, for the manifest."""
    forms = {layer.fmt for layer in layers.values()}
    if computed := next((f.computes_in for f in of_layers(forms) if f.multiplies_bytes), None):
        return computed
    simulated = runtime.simulated(forms)
    return f"{FULL.dtype}, {' and '.join(simulated)} simulated" if simulated else FULL.dtype


def _listed(lines: Sequence[str], limit: int = 8) -> str:
    rest = f" … and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + rest
