"""A format that nothing but this file knows goes the whole way: E5M2, two bits of mantissa."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bifrost_rt import formats as runtime
from bifrost_rt.backends.choice import openvino_refuses
from bifrost_rt.manifest import Deviation, TensorSpec
from export import formats, parity
from export.compile import capabilities
from export.errors import CompileError, RecipeError
from export.formats.quantized import PerOutput
from export.planning.storage import Elements, Storage
from export.quantize import apply, audit, policy
from export.quantize import formats as quantized
from export.quantize.policy import Layer
from export.quantize.statistics import Observer, Statistics
from export.recipe import load
from export.stages import Definition, Stage
from tests.export.quantize.test_graphs import WIDTH, computed, exact, written

NAME = "toy"


@dataclass(frozen=True, kw_only=True)
class Toy(PerOutput):
    def codes(self, x: Tensor) -> Tensor:
        return x.clamp(-self.largest, self.largest).to(torch.float8_e5m2)

    def rounded(self, x: Tensor) -> Tensor:
        return self.codes(x).float()


DECLARED = runtime.Format(
    NAME,
    dtype="float8_e5m2",
    weight_bits=8,
    order=99,
    computes_in="float8_e5m2",
    quantized=True,
    deviation=Deviation(30.0, 6.0),
    session_entries={"session.disable_quant_qdq": "1"},
    in_memory={"onnxruntime": 5.0},
)
TOY = Toy(
    runtime=DECLARED,
    other_bytes=2,
    channel_bytes=4,
    rate="fp8",
    since=120,
    tensorrt="TOY",
    stored="float8e5m2",
    inputs=("float8e5m2",),
    rounding=0.05,
    largest=57344.0,
)


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtime.FORMATS, NAME, DECLARED)
    monkeypatch.setitem(formats.FORMATS, NAME, TOY)
    monkeypatch.setitem(quantized.FORMATS, NAME, TOY)


def test_it_is_quantized_audited_planned_and_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, 96), nn.ReLU(), nn.Linear(96, 80))
    module.eval().requires_grad_(False)
    x = torch.randn(2, 7, WIDTH)
    plain = module(x)
    stage = Stage(
        Definition("two", tolerance=1e-5, not_quantized={"2": "the last layer stays"}),
        module,
        inputs=(TensorSpec("x", "float32", ("images", 7, WIDTH)),),
        outputs=(TensorSpec("y", "float32", ("images", 7, 80)),),
    )
    choices = policy.choose([stage], NAME, "bf16", {}, {})
    assert [(choice.path, choice.fmt) for choice in choices] == [("0", NAME), ("2", "bf16")]
    seen = Observer.nothing(WIDTH)
    seen.add(x, plain)
    statistics = Statistics("", (), {"two:0": seen})
    decisions = apply.decide({"two": stage}, choices, statistics, "bf16", "mse")
    assert [decision.given for decision in decisions] == [NAME, "bf16"]
    apply.replace({"two": stage}, decisions)
    spec = written(stage, tmp_path, NAME)

    report = audit.audit(tmp_path, [spec], {"two": {"0": NAME, "2": "bf16"}})["two"]
    assert report["layers"]["0"]["format"] == NAME
    assert report["layers"]["0"]["bytes"] == WIDTH * 96
    assert spec.precision.compute == f"float32, {NAME} simulated"
    assert spec.precision.layers == {NAME: 1, "bf16": 1}
    layers = (Layer("0", WIDTH, 96), Layer("2", 96, 80, "the last layer stays"))
    planned = Elements("two", layers, other=0, kept=0)
    assert planned.bytes_at(Storage(TOY)) == WIDTH * 96 + 96 * 4 + 96 * 80 * 2
    assert parity.rounding(spec.precision.layers) == pytest.approx(TOY.rounding)

    wanted = exact(stage, x)
    found = computed("onnxruntime", tmp_path, spec, x.numpy())
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    lost = float((wanted - plain).norm() / plain.norm())
    assert 0.01 < lost < 0.2  # E5M2 rounds inputs and weights to an eighth, at most


def test_recipes_targets_and_drivers_know_it() -> None:
    folders = {"mllm": "m", "bifrost": "b", "flux": "f", "output": "o"}
    assert load({**folders, "precision": NAME}, "here").quantized
    with pytest.raises(RecipeError, match=r"'toys' is unknown \(did you mean 'toy'"):
        load({**folders, "precision": "toys"}, "here")
    assert capabilities.check("tensorrt", ["sm120"], [NAME, "float8_e5m2"]) == ("sm120",)
    with pytest.raises(CompileError, match="sm86 .* has no toy arithmetic") as error:
        capabilities.check("tensorrt", ["sm86"], [NAME])
    assert "--precision int8" in str(error.value.hint)
    assert "does not simulate toy" in str(openvino_refuses({NAME}))
