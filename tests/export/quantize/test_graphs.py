"""A quantized layer as a graph: it computes what torch computes, and is stored in its bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bifrost_rt import backends
from bifrost_rt.backends import onnxruntime as backend
from bifrost_rt.backends.choice import openvino_refuses
from bifrost_rt.errors import BackendError
from bifrost_rt.formats import FORMATS as RUNTIME
from bifrost_rt.manifest import EngineSpec, Precision, TensorSpec
from export import graph, precision
from export.errors import PrecisionError
from export.quantize import audit
from export.quantize.formats import FORMATS, activation_scale
from export.quantize.linear import QuantizedLinear
from export.stages import Definition, Stage
from export.weight_offloading import streamed

WIDTH = 512
BITS = {"int8": 8, "fp8": 8, "nvfp4": 4.5, "int4": 4.5}


class Two(nn.Module):
    """A quantized layer and one in 16 bit."""

    def __init__(self, fmt: str, migrated: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear, self.last = nn.Linear(WIDTH, 96), nn.Linear(96, 80)
        scale = activation_scale(4.0, fmt) if FORMATS[fmt].calibrated else None
        factors = torch.linspace(0.5, 2.0, WIDTH) if migrated else None
        self.first = QuantizedLinear(linear, fmt, scale, factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def built(folder: Path, fmt: str, migrated: bool = False) -> tuple[Stage, EngineSpec]:
    module = Two(fmt, migrated).eval().requires_grad_(False)
    stage = Stage(
        definition=Definition("two", tolerance=1e-5),
        module=module,
        inputs=(TensorSpec("x", "float32", ("images", 7, WIDTH)),),
        outputs=(TensorSpec("y", "float32", ("images", 7, 80)),),
    )
    return stage, written(stage, folder, fmt)


def written(stage: Stage, folder: Path, fmt: str) -> EngineSpec:
    """A stage's file, the rest of it in 16 bit, and what the manifest says of it."""
    precision.round_weights(stage.module, "bf16")
    traced = graph.to_graph(stage)
    precision.store(traced, "bf16")
    files, _ = graph.save(traced, folder / "two.onnx")
    layers = audit.read(files[0])
    return EngineSpec(
        "two", files[0].name, tuple(f.name for f in files), stage.inputs, stage.outputs, (),
        Precision(fmt, "", audit.compute(layers), audit.formats(layers)),
    )  # fmt: skip


def exact(stage: Stage, x: Tensor) -> Tensor:
    with streamed(stage.module), torch.inference_mode():
        return stage.module(x)


def computed(backend: str, folder: Path, spec: EngineSpec, x: NDArray[np.float32]) -> Tensor:
    found = np.empty((*x.shape[:2], 80), np.float32)
    engine = backends.load(backend).open(folder, spec, {"images": _any()})
    engine.bind({"x": x}, {"y": found})()
    engine.close()
    return torch.from_numpy(found)


def _any() -> object:
    from bifrost_rt.manifest import Range

    return Range(1, None)


@pytest.mark.parametrize("migrated", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_onnxruntime_computes_what_torch_computes(fmt: str, migrated: bool, tmp_path: Path) -> None:
    stage, spec = built(tmp_path, fmt, migrated)
    x = torch.randn(2, 7, WIDTH)
    wanted = exact(stage, x)
    found = computed("onnxruntime", tmp_path, spec, x.numpy())
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_openvino_computes_the_same_files(fmt: str, tmp_path: Path) -> None:
    if reason := backends.BACKENDS["openvino"].unavailable():
        pytest.skip(reason)
    stage, spec = built(tmp_path, fmt)
    if openvino_refuses({fmt}):  # without VNNI; both kinds are in test_processors.py
        with pytest.raises(BackendError, match="wrong int8 values"):
            computed("openvino", tmp_path, spec, np.zeros((1, 7, WIDTH), np.float32))
        return
    x = torch.randn(2, 7, WIDTH)
    wanted = exact(stage, x)
    found = computed("openvino", tmp_path, spec, x.numpy())
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("fmt", ["nvfp4", "fp8"])
def test_openvino_refuses_what_it_would_compute_differently(fmt: str, tmp_path: Path) -> None:
    if reason := backends.BACKENDS["openvino"].unavailable():
        pytest.skip(reason)
    _, spec = built(tmp_path, fmt)
    with pytest.raises(BackendError, match=f"does not simulate {fmt}"):
        backends.load("openvino").open(tmp_path, spec, {"images": _any()})


@pytest.mark.parametrize("fmt", FORMATS)
def test_weights_are_stored_in_their_bits(fmt: str, tmp_path: Path) -> None:
    _, spec = built(tmp_path, fmt)
    layer = audit.read(tmp_path / "two.onnx")["first"]
    assert layer.fmt == fmt
    ideal = WIDTH * 96 * BITS[fmt] / 8
    assert ideal <= layer.bytes <= 1.05 * ideal
    if BITS[fmt] == 8:
        assert layer.bytes <= 0.27 * WIDTH * 96 * 4
    # and the file has nothing beside it: the other layer in 16 bit, biases, scales of channels
    size = sum((tmp_path / name).stat().st_size for name in spec.files if name.endswith(".data"))
    assert size < layer.bytes + 96 * 80 * 2 + 16 * 1024


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_audit_finds_every_layer_and_its_kernel(fmt: str, tmp_path: Path) -> None:
    _, spec = built(tmp_path, fmt)
    report = audit.audit(tmp_path, [spec], {"two": {"first": fmt, "last": "bf16"}})["two"]
    formats = {path: layer["format"] for path, layer in report["layers"].items()}
    assert formats == {"first": fmt, "last": "bf16"}
    for kernel in RUNTIME[fmt].kernels:
        assert report["kernels"][kernel] == 1
    assert report["unused"] == []


def test_the_audit_refuses_another_format(tmp_path: Path) -> None:
    _, spec = built(tmp_path, "int8")
    with pytest.raises(PrecisionError, match="`two`.*last: asked int8, found bf16"):
        audit.audit(tmp_path, [spec], {"two": {"first": "int8", "last": "int8"}})


def test_the_audit_refuses_a_layer_that_would_run_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spec = built(tmp_path, "int8")

    def unfused(spec: EngineSpec) -> tuple[ort.SessionOptions, list[str]]:
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return options, []

    monkeypatch.setattr(audit, "session_options", unfused)
    with pytest.raises(PrecisionError, match="1 layers are int8.*1 of them in float32"):
        audit.audit(tmp_path, [spec], {"two": {"first": "int8", "last": "bf16"}})


def test_an_asked_layer_that_nothing_reads_is_named(tmp_path: Path) -> None:
    _, spec = built(tmp_path, "int8")
    asked = {"two": {"first": "int8", "last": "bf16", "gone": "int8"}}
    assert audit.audit(tmp_path, [spec], asked)["two"]["unused"] == ["gone"]


def test_int8_computes_in_int8_and_the_others_say_what_they_do(tmp_path: Path) -> None:
    said = {}
    for fmt in FORMATS:
        (tmp_path / fmt).mkdir()
        said[fmt] = built(tmp_path / fmt, fmt)[1].precision.compute
    assert said == {
        "int8": "int8",
        "fp8": "float32, fp8 simulated",
        "nvfp4": "float32, nvfp4 simulated",
        "int4": "float32",
    }


def test_four_bit_weights_keep_their_activations(tmp_path: Path) -> None:
    """onnxruntime's own default rounds them to 8 bit."""
    stage, spec = built(tmp_path, "int4")
    x = torch.randn(1, 7, WIDTH)
    wanted = exact(stage, x)
    found = computed("onnxruntime", tmp_path, spec, x.numpy())
    loose = ort.InferenceSession(str(tmp_path / spec.graph)).run(None, {"x": x.numpy()})[0]
    assert (found - wanted).abs().max() < 0.1 * np.abs(loose - wanted.numpy()).max()


def test_the_drivers_options_follow_the_file_not_the_request(tmp_path: Path) -> None:
    _, spec = built(tmp_path, "fp8")
    renamed = dataclasses.replace(
        spec, precision=dataclasses.replace(spec.precision, requested="int8")
    )
    options, disabled = backend.session_options(renamed)
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert disabled == []
