"""A trace depends on the architecture alone, and is made once for all weights and precisions."""

from __future__ import annotations

import ast
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import export
from bifrost_rt import cache
from bifrost_rt.manifest import TensorSpec
from export import fingerprint, graph, lazy_tensors, trace
from export.errors import ExportError
from export.lazy_tensors import LazyTensor
from export.quantize.formats import activation_scale
from export.quantize.linear import QuantizedLinear
from export.stages import Definition, Stage

WIDTH = 32


@dataclasses.dataclass
class Config:
    eps: float = 1e-6


class Net(nn.Module):
    def __init__(self, eps: float = 1e-6, table: float = 1.0, tied: bool = False) -> None:
        super().__init__()
        self.config = Config(eps)
        self.norm = nn.LayerNorm(WIDTH, eps=eps)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        if tied:
            self.last = self.first
        self.register_buffer("table", torch.full((WIDTH,), table))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.norm(x) * (self.table + 1))))


def stage_of(module: nn.Module, rank: int = 3, symbol: str = "images") -> Stage:
    shape = (symbol, *(7,) * (rank - 2), WIDTH)
    spec = TensorSpec("x", "float32", shape)
    out = TensorSpec("y", "float32", shape)
    return Stage(Definition("net", 0), module.eval().requires_grad_(False), (spec,), (out,))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    return tmp_path / trace.KIND


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def traced(*_: Any, **__: Any) -> None:
            raise AssertionError("traced again")

        monkeypatch.setattr(torch.onnx, "export", traced)

    return forbid


def content(model: ir.Model) -> bytes:
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def quantized(fmt: str, migrated: bool = False) -> Net:
    net = Net()
    scale = activation_scale(4.0, fmt)
    factors = torch.linspace(0.5, 2, WIDTH) if migrated else None
    net.first = QuantizedLinear(net.first, fmt, scale, factors)
    return net


def test_one_trace_serves_other_weights_and_every_precision(
    no_tracing: Callable[[], None], place: Path
) -> None:
    first = Net()
    made = graph.to_graph(stage_of(first))
    assert len(list(place.iterdir())) == 1
    no_tracing()
    assert content(graph.to_graph(stage_of(first))) == content(made)
    other = Net()
    found = graph.to_graph(stage_of(other)).graph.initializers["first.weight"].const_value
    assert found is not None
    torch.testing.assert_close(torch.from_numpy(found.numpy()), other.first.weight.T.detach())
    for fmt in ("int8", "fp8"):
        net = quantized(fmt)
        model = graph.to_graph(stage_of(net))
        assert "QuantizeLinear" in {node.op_type for node in model.graph}
        assert isinstance(net.first, QuantizedLinear)


def test_a_trace_that_was_kept_is_the_one_that_is_made(place: Path) -> None:
    kept = [content(graph.to_graph(stage_of(net))) for net in (quantized("int8"), Net())]
    for path in place.iterdir():
        path.unlink()
    torch.manual_seed(0)
    fresh = [trace._to_bytes(trace._trace(stage_of(Net()))) for _ in range(2)]
    assert fresh[0] == fresh[1]
    assert kept[0] != kept[1]


def test_a_damaged_trace_is_made_again(place: Path) -> None:
    net = Net()
    made = content(graph.to_graph(stage_of(net)))
    (path,) = place.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert content(graph.to_graph(stage_of(net))) == made
    assert cache.read(trace.KIND, path.name) is not None


def test_no_weight_is_read(place: Path) -> None:
    net = Net()

    def refuse() -> Tensor:
        raise AssertionError("read")

    for owner in (net.norm, net.first, net.last):
        for name, value in list(owner.named_parameters()):
            whose = f"{id(owner)}.{name}"
            lazy_tensors.attach(
                owner, name, LazyTensor(tuple(value.shape), value.dtype, whose, refuse)
            )
    model = graph.to_graph(stage_of(net))
    names = {"norm.weight", "first.weight", "first.bias", "last.weight"}
    assert names <= model.graph.initializers.keys()
    # a table is no weight: what is computed from it alone is computed once
    assert "Add" not in {node.op_type for node in list(model.graph)[:2]}


def test_a_cache_that_cannot_be_written_is_said_and_costs_nothing_else(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.write_text("a file, where the folder would be")
    with caplog.at_level(logging.WARNING, "export"):
        graph.to_graph(stage_of(Net()))
    assert "the trace of `net` is not kept" in caplog.text


def key(stage: Stage) -> str | None:
    return fingerprint.of(stage)


def patched() -> Net:
    net, factor = Net(), 2.0
    net.norm.forward = lambda x: x * factor
    return net


def test_whatever_decides_a_trace_changes_its_key() -> None:
    deeper = Net()
    deeper.last = nn.Sequential(deeper.last, nn.ReLU())
    half = Net()
    half.first.half()
    without = Net()
    without.first.bias = None
    other_factor = patched()
    other_factor.norm.forward = (lambda factor: lambda x: x * factor)(3.0)
    keys = [
        key(stage_of(Net())),
        key(stage_of(Net(eps=1e-5))),
        key(stage_of(Net(table=2.0))),
        key(stage_of(Net(tied=True))),
        key(stage_of(deeper)),
        key(stage_of(half)),
        key(stage_of(without)),
        key(stage_of(patched())),
        key(stage_of(other_factor)),
        key(stage_of(Net(), rank=4)),
        key(stage_of(Net(), symbol="texts")),
        key(dataclasses.replace(stage_of(Net()), definition=Definition("other", 0))),
    ]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_weights_do_not_change_the_key() -> None:
    meta = Net()
    for owner in (meta.norm, meta.first, meta.last):
        owner.to("meta")
    loose = Net()
    for parameter in loose.parameters():
        parameter.data.zero_()
    assert key(stage_of(Net())) == key(stage_of(loose))
    assert key(stage_of(meta)) == key(stage_of(meta))


def test_what_cannot_be_described_is_not_kept(place: Path) -> None:
    net = Net()
    net.odd = iter(())
    assert key(stage_of(net)) is None
    graph.to_graph(stage_of(net))
    assert not place.exists()


def test_a_weight_that_is_not_a_linear_layers_cannot_be_quantized() -> None:
    class Odd(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.first.weight.sum()

    net = Odd()
    net.first = QuantizedLinear(net.first, "int8", 0.1)
    with pytest.raises(ExportError, match=r"layer first: its weight is read by \w+, expected"):
        graph.to_graph(stage_of(net))


def test_the_code_that_makes_a_trace_is_all_in_its_key() -> None:
    """Whatever the traced files import of this package is hashed with them, or makes no node."""
    root = Path(export.__file__).parent
    traced = [p for n in fingerprint.TRACED_BY for p in (*(root / n).rglob("*.py"), root / n)]
    inside = {p.relative_to(root).with_suffix("").as_posix() for p in traced if p.suffix == ".py"}
    inside = {name.removesuffix("/__init__") for name in inside} | {"errors", "configs"}
    for path in traced:
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("export"):
                module = (node.module or "").removeprefix("export").removeprefix(".")
                for alias in node.names:
                    names = {module.replace(".", "/"), f"{module}/{alias.name}".strip("/")}
                    assert names & inside, f"{path.name} imports {node.module}.{alias.name}"
