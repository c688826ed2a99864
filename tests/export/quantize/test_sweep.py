"""The sweep and the budget, on the golden checkpoint with a few steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bifrost_rt import manifest as manifests
from bifrost_rt.manifest import Manifest
from export import assemble, preprocessor
from export.checkpoint import Checkpoint
from export.errors import PrecisionError
from export.quantize import apply, calibrate, policy, sweep
from export.quantize.apply import Decision
from export.quantize.linear import QuantizedLinear
from export.quantize.statistics import Statistics
from export.stages import Stage
from tests.conftest import ALPHA

FOLDERS = [ALPHA / part for part in ("mllm", "bifrost", "flux")]
PROMPTS = ("a photo of a red apple", "a green bench")


@pytest.fixture(scope="module")
def short(alpha_set: Path) -> Manifest:
    found = manifests.read(alpha_set)
    defaults = dataclasses.replace(found.defaults, decoding_steps=3, num_inference_steps=2)
    return dataclasses.replace(found, defaults=defaults)


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    checkpoint = Checkpoint(*FOLDERS, read=False)
    made = assemble.stages(
        *(checkpoint, assemble.facts(checkpoint), 48, 77, 32), preprocessor.read(checkpoint)
    )
    return {stage.name: stage for stage in made}


@pytest.fixture(scope="module")
def decisions(alpha_set: Path, short: Manifest, stages: dict[str, Stage]) -> list[Decision]:
    said: list[str] = []
    nothing = Statistics("print", tuple(PROMPTS))
    statistics = calibrate.calibrate(alpha_set, short, stages, nothing, said.append)
    assert statistics.complete
    assert any("prompts 1 to 2 of 2" in line for line in said)
    choices = policy.choose(list(stages.values()), "int8", "bf16", {}, {})
    return apply.decide(stages, choices, statistics, "bf16", "mse")


@pytest.fixture(scope="module")
def bench(alpha_set: Path, short: Manifest, stages: dict[str, Stage]) -> sweep.Bench:
    return sweep.Bench(alpha_set, short, stages, PROMPTS)


def test_calibration_reaches_every_layer_that_is_to_be_quantized(
    decisions: list[Decision],
) -> None:
    quantized = [d for d in decisions if d.given == "int8"]
    assert len(quantized) > 60
    # of the last double block the context goes nowhere, yet torch computes it
    assert not [d for d in decisions if "never reached" in d.reason]
    assert all(d.scales is not None and d.scales.input_scale for d in quantized)


def test_quantizing_nothing_costs_nothing(bench: sweep.Bench) -> None:
    cost = bench.cost([])
    assert cost.psnr == sweep.SAME
    assert cost.residuals == 0
    assert cost.tokens == pytest.approx(1, abs=1e-6)


def test_costs_are_where_the_layers_are(bench: sweep.Bench, decisions: list[Decision]) -> None:
    def of(stage: str) -> sweep.Cost:
        return bench.cost([d for d in decisions if d.choice.stage == stage])

    mllm, diffusion = of("visual_decode"), of("denoise")
    assert mllm.output is not None
    assert 1e-4 < mllm.output < 0.1
    assert mllm.tokens < 1 - 1e-7
    assert mllm.residuals > 0
    assert diffusion.tokens == pytest.approx(1, abs=1e-6)
    assert diffusion.psnr < sweep.SAME


def test_layers_are_put_back(
    bench: sweep.Bench, decisions: list[Decision], stages: dict[str, Stage]
) -> None:
    bench.cost(decisions)
    modules = [m for stage in stages.values() for m in stage.module.modules()]
    assert not [m for m in modules if isinstance(m, QuantizedLinear)]


def test_a_budget_keeps_the_costliest_and_no_more(
    bench: sweep.Bench, decisions: list[Decision]
) -> None:
    some = [d for d in decisions if d.choice.stage in ("visual_decode", "mllm_text")]
    everything = bench.cost(some).psnr
    found = sweep.sweep(bench, some, everything + 3, lambda line: None)
    assert 0 < len(found.kept) < len(found.groups)
    assert found.psnr >= everything + 3
    kept_least = max(found.groups[name].psnr for name in found.kept)
    others = [cost.psnr for name, cost in found.groups.items() if name not in found.kept]
    assert kept_least <= min(others)
    after = sweep.keep(some, found.kept, "bf16")
    changed = [d for d in after if "quality budget" in d.reason]
    assert {sweep.group_of(d) for d in changed} == set(found.kept)
    assert {d.given for d in changed} == {"bf16"}
    assert bench.cost(after).psnr == pytest.approx(found.psnr)


def test_a_budget_that_is_met_keeps_nothing(bench: sweep.Bench, decisions: list[Decision]) -> None:
    some = [d for d in decisions if d.choice.stage == "clip_text"]
    found = sweep.sweep(bench, some, 1.0, lambda line: None)
    assert found.kept == ()
    assert found.psnr == found.stages["all"].psnr


def test_a_budget_beyond_reach_is_refused(bench: sweep.Bench, decisions: list[Decision]) -> None:
    some = [d for d in decisions if d.choice.stage == "clip_text"]
    with pytest.raises(PrecisionError, match=r"budget 101 dB: .* keep 100\.0 dB"):
        sweep.sweep(bench, some, 101.0, lambda line: None)
