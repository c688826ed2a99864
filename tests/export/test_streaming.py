"""Building in bounded memory changes nothing but the memory."""

from __future__ import annotations

import dataclasses
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from bifrost_rt import Generator, backends, manifest
from bifrost_rt.backends import onnxruntime as backend
from export import (
    assemble,
    budget,
    graph,
    graph_partitions,
    lazy_tensors,
    memory,
    trace,
    weight_offloading,
)
from export.checkpoint import Checkpoint
from export.errors import BuildError
from export.formats import FULL
from export.lazy_tensors import LazyTensor
from export.planning.storage import Storage
from export.precision import round_weights, store
from export.quantize import linear
from export.quantize.formats import FORMATS, quantize
from export.stages import Stage
from tests.conftest import ALPHA, difference, load_case

FOLDERS = [ALPHA / part for part in ("mllm", "bifrost", "flux")]
LENGTHS = (48, 77, 32)


def stages(read: bool = False) -> dict[str, Stage]:
    checkpoint = Checkpoint(*FOLDERS, read=read)
    facts = assemble.facts(checkpoint)
    return {stage.name: stage for stage in assemble.stages(checkpoint, facts, *LENGTHS)}


def call(stage: Stage) -> list[torch.Tensor]:
    torch.manual_seed(0)
    given = [trace.example(spec) for spec in stage.inputs]
    with torch.inference_mode():
        found = stage.module(*given)
    return list(found) if isinstance(found, tuple) else [found]


class Meter:
    """Counts the bytes that sources have read and that are still in memory."""

    def __init__(self) -> None:
        self.now = self.highest = 0

    def watch(self, module: torch.nn.Module) -> None:
        for owner in module.modules():
            for name, source in lazy_tensors.lazy(owner).items():
                lazy_tensors.attach(owner, name, self.counted(source))

    def counted(self, source: LazyTensor) -> LazyTensor:
        def read() -> torch.Tensor:
            values = source.read().clone()
            self.now += values.nbytes
            self.highest = max(self.highest, self.now)
            weakref.finalize(values.untyped_storage(), self.gone, values.nbytes)
            return values

        return dataclasses.replace(source, read=read)

    def gone(self, size: int) -> None:
        self.now -= size


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_offloading, "SMALL", 0)


@pytest.mark.usefixtures("nothing_is_small")
def test_a_streamed_network_computes_the_same_bits() -> None:
    loaded = stages(read=True)
    for name, stage in stages().items():
        with weight_offloading.streamed(stage.module, 0) as kept:
            found = call(stage)
        assert kept == 0
        pairs = zip(found, call(loaded[name]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("allowed", [0, 100_000])
def test_a_streamed_network_holds_its_budget_and_one_layer(allowed: int) -> None:
    stage = stages()["visual_decode"]
    everything = sum(s.nbytes for s in lazy_tensors.named(stage.module).values())
    meter = Meter()
    meter.watch(stage.module)
    with weight_offloading.streamed(stage.module, allowed) as kept:
        call(stage)
        assert meter.now == kept <= allowed
    assert meter.now == 0
    sizes: dict[bool, list[int]] = {True: [], False: []}
    for owner in stage.module.modules():
        leaf = next(owner.children(), None) is None
        sizes[leaf].append(sum(s.nbytes for s in lazy_tensors.lazy(owner).values()))
    around = sum(sizes[False])  # the branch's own mask and positions, while its layers run
    assert kept < meter.highest <= allowed + max(sizes[True]) + around < everything / 2


def test_a_call_that_fails_leaves_nothing_in_memory() -> None:
    stage = stages()["visual_decode"]
    with pytest.raises(IndexError), weight_offloading.streamed(stage.module, 0):
        stage.module(*(torch.zeros(1) for _ in stage.inputs))
    assert all(tensor.is_meta for tensor in stage.module.parameters())


@pytest.fixture(scope="module")
def traced() -> tuple[Meter, dict[str, ir.Model]]:
    meter, found = Meter(), {}
    made = stages()
    for name in ("visual_decode", "t5_text"):
        meter.watch(made[name].module)
        found[name] = graph.to_graph(made[name])
    return meter, found


def test_tracing_reads_no_weight_matrix(traced: tuple[Meter, dict[str, ir.Model]]) -> None:
    meter, _ = traced
    assert meter.highest <= 4 * 8192 * 2  # what the optimiser computes with


def test_weights_are_written_one_by_one(
    traced: tuple[Meter, dict[str, ir.Model]], tmp_path: Path
) -> None:
    meter, models = traced
    model = models["t5_text"]
    largest = max(v.const_value.nbytes for v in model.graph.initializers.values())
    meter.highest = meter.now
    graph.save(model, tmp_path / "t5_text.onnx")
    assert meter.now == 0
    assert meter.highest <= largest


def test_initializers_carry_the_names_of_their_parameters(
    traced: tuple[Meter, dict[str, ir.Model]],
) -> None:
    _, models = traced
    for name, stage in stages().items():
        if name not in models:
            continue
        shapes = {n: s.shape for n, s in lazy_tensors.named(stage.module).items()}
        initializers = models[name].graph.initializers
        matrices = {n for n, shape in shapes.items() if len(shape) == 2 and shape[0] > 32}
        assert {n for n in matrices if "shared" not in n and "mask" not in n} <= initializers.keys()
        for node in models[name].graph:
            assert node.op_type != "Transpose" or not node.inputs[0].is_initializer()
            if node.op_type == "MatMul":
                weight = node.inputs[1]
                assert tuple(weight.shape) == shapes[weight.name][::-1]


def test_16_bit_is_what_the_checkpoint_holds_rounded() -> None:
    stage = stages()["t5_text"]
    exact = lazy_tensors.named(stage.module)
    round_weights(stage.module, "bf16")
    model = graph.to_graph(stage)
    store(model, "bf16")
    name = "encoder.encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    stored = model.graph.initializers[name].const_value
    assert stored is not None
    assert stored.dtype == ir.DataType.BFLOAT16
    rounded = exact[name].read().T.to(torch.bfloat16)
    assert stored.tobytes() == rounded.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("limit", "fewest"), [(60_000, 50), (400_000, 8)])
def test_engines_in_pieces_draw_the_same_image(
    alpha_set: Path, monkeypatch: pytest.MonkeyPatch, limit: int, fewest: int
) -> None:
    monkeypatch.setattr(backend, "FIXED", 0)
    case = load_case("case_01")
    bounded = graph_partitions.Bounded(backends.load("onnxruntime"), limit)
    with Generator(alpha_set, backend=bounded) as generator:
        result = generator.run(**case.request(), output_type="np")
    assert sum(bounded.partitions.values()) >= fewest
    assert difference(result.tokens, case.tensors["mllm.tokens_final"]) < 1e-4
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
    assert np.abs(result.images.astype(int) - case.tensors["flux.image_u8"]).max() <= 1


def test_a_build_knows_the_disk_it_takes(alpha_set: Path) -> None:
    sizes = {**memory.one_image(48), "steps": 4}
    made = stages()
    wanted = budget.demand(made.values(), sizes, Storage(FULL))
    files = manifest.read(alpha_set).files
    found = sum(file.size for name, file in files.items() if name.endswith(".data"))
    assert wanted.disk - budget.BESIDE == pytest.approx(found, rel=0.03)


DEMAND = budget.Demand(1 << 29, 1 << 30, 3 << 30, 5 << 30, "denoise", 100 << 20)


def test_a_build_never_takes_more_than_it_may() -> None:
    for given in (1 << 30, 2 << 30):
        share = budget.share(DEMAND, given)
        assert share.total == given
        assert share.engines + DEMAND.base == given
        assert share.kept + share.engine <= share.engines
    assert budget.share(DEMAND, 9 << 30).total == 3 << 30


def test_a_build_that_cannot_be_done_is_refused_before_it_begins() -> None:
    with pytest.raises(BuildError, match=r"at least 1 GiB .*`denoise` has a tensor of 100 MiB"):
        budget.share(DEMAND, 900 << 20)


def test_a_disk_without_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 << 30))
    with pytest.raises(BuildError, match="will take 5 GiB, its disk has 4 GiB free"):
        budget.check_disk(DEMAND, tmp_path / "deep" / "set")
    budget.check_disk(DEMAND, tmp_path / "deep" / "set", there=2 << 30)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("migrated", [False, True])
def test_a_weight_is_quantized_in_parts_as_it_would_be_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, fmt: str, migrated: bool
) -> None:
    monkeypatch.setattr(linear, "AT_ONCE", 64 * 16)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 50)
    weight = layer.weight.detach().T.contiguous()
    factors = torch.rand(64) + 0.5 if migrated else None
    scale = 0.1 if FORMATS[fmt].calibrated else None
    found = linear.QuantizedLinear(layer, fmt, scale, factors)
    lazy_tensors.load(found)
    expected = quantize(weight if factors is None else weight / factors[:, None], fmt)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.scale.float(), expected.scale.float())


def counted(name: str, reads: list[str]) -> torch.nn.Linear:
    """A linear layer whose weight is read from elsewhere; `reads` tells when."""
    layer = torch.nn.Linear(64, 50, bias=False)
    values = layer.weight.detach()

    def read() -> torch.Tensor:
        reads.append(name)
        return values

    lazy_tensors.attach(
        layer, "weight", lazy_tensors.LazyTensor((50, 64), torch.float32, name, read)
    )
    return layer


@pytest.mark.parametrize("fmt", FORMATS)
def test_all_parts_of_a_weight_come_from_one_reading(fmt: str) -> None:
    reads: list[str] = []
    scale = 0.1 if FORMATS[fmt].calibrated else None
    layers = [linear.QuantizedLinear(counted(n, reads), fmt, scale) for n in ("a", "b")]
    for layer in layers:
        lazy_tensors.load(layer)
    assert reads == ["a", "b"]
    assert not linear._unread


def test_what_is_not_asked_for_is_kept_of_one_weight_at_most() -> None:
    reads: list[str] = []
    a, b = (linear.QuantizedLinear(counted(n, reads), "int8", 0.1) for n in ("a", "b"))
    first = lazy_tensors.read(a, "scale")
    assert torch.equal(lazy_tensors.read(a, "scale"), first)  # read again, computed again
    lazy_tensors.read(b, "scale")
    assert reads == ["a", "a", "b"]
    assert [key.split("(")[1] for key in linear._unread] == ["b)"]
    kept = lazy_tensors.read(b, "codes")
    assert reads == ["a", "a", "b"]
    assert torch.equal(kept, lazy_tensors.read(b, "codes"))
    assert reads == ["a", "a", "b", "b"]
