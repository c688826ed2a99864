"""ONNX operators that OpenVINO's reader lacks, in OpenVINO's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset15 as ops
from openvino.frontend.onnx import ConversionExtension


def add_to(core: ov.Core) -> None:
    """Let models with these operators be read."""
    core.add_extension(ConversionExtension("TensorScatter", _tensor_scatter))


def _tensor_scatter(node: Any) -> list[ov.Output]:
    """Rows [U, H, R, W] into a cache [U, H, C, W], from another place of each text on."""
    cache, rows, at = (node.get_input(i) for i in range(3))
    axis = node.get_attribute("axis")
    assert axis == 2, axis
    zero, one = ops.constant(np.int64(0)), ops.constant(np.int64(1))
    shape = ops.shape_of(rows, "i64")
    count = ops.gather(shape, ops.constant(np.int64(axis)), zero)
    new = ops.range(zero, count, one, "i64")  # [R]
    place = ops.add(ops.unsqueeze(at, ops.constant(np.array([1]))), new)  # [U, R]
    place = ops.unsqueeze(place, ops.constant(np.array([1, 3])))  # [U, 1, R, 1]
    written = ops.scatter_elements_update(
        cache, ops.broadcast(place, shape, broadcast_spec="BIDIRECTIONAL"), rows, ops.constant(axis)
    )
    outputs: list[ov.Output] = written.outputs()
    return outputs
