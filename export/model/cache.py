"""A K/V cache of a capacity that stays: new rows are written behind those that are there."""

from __future__ import annotations

import torch
from torch import Tensor

# The domain of nodes that stand for ONNX operators which torch does not know: `export.trace` puts
# them into ONNX's own. TensorScatter came with opset 24.
PLACEHOLDER, PLACEHOLDER_OPSET = "bifrost", 24


def write_rows(cache: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Write `rows` [U, H, R, W] into `cache` [U, H, C, W] from place `at` [U] on.

    ONNX's TensorScatter, which libraries do in place where the result is the cache's own memory.
    """
    if torch.compiler.is_exporting():
        written: Tensor = torch.onnx.ops.symbolic(
            f"{PLACEHOLDER}::TensorScatter",
            (cache, rows, at),
            {"axis": 2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=1,
        )
        return written.to(cache.device)  # where torch believes it to be on the CPU
    places = at[:, None] + torch.arange(rows.shape[2], device=at.device)
    return cache.scatter(2, places[:, None, :, None].expand_as(rows), rows.to(cache.dtype))


def visible(past_length: Tensor, rows: int, capacity: int) -> Tensor:
    """Return which places of a cache each new row sees, bool [U, 1, R, C]: all before it, and its
    own."""
    place = past_length[:, None] + torch.arange(rows, device=past_length.device)  # [U, R]
    return (torch.arange(capacity, device=place.device) <= place[:, :, None])[:, None]
