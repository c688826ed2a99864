"""What calibration records, and what becomes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from export import lazy_tensors
from export.errors import CalibrationError
from export.quantize import calibrate, scales
from export.quantize.apply import LEAST_SIGNAL_TO_NOISE, decide
from export.quantize.linear import QuantizedLinear
from export.quantize.policy import Choice
from export.quantize.statistics import Observer, Statistics
from export.stages import Definition, Stage


def seen(*inputs: torch.Tensor, outputs: torch.Tensor | None = None) -> Observer:
    found = Observer.nothing(inputs[0].shape[-1])
    for x in inputs:
        found.add(x, torch.ones(*x.shape[:-1], 8) if outputs is None else outputs)
    return found


def test_statistics_are_those_of_all_calls_together() -> None:
    torch.manual_seed(0)
    calls = [torch.randn(2, 50, 16) * size for size in (0.01, 3.0, 0.5)]
    found, rows = seen(*calls), torch.cat([c.flatten(0, 1) for c in calls])
    assert found.rows == len(rows)
    assert torch.equal(found.channel_max, rows.abs().amax(0))
    assert torch.allclose(found.channel_square, rows.double().square().sum(0), rtol=1e-5)
    assert found.counts.sum() == rows.numel()
    # the histogram has grown by doubling, and still holds every value in its bin
    width = found.top / len(found.counts)
    wanted = torch.bincount((rows.abs().flatten() / width).int(), minlength=len(found.counts))
    assert (found.counts - wanted).abs().sum() <= 4  # on a bin's very edge


def test_the_file_is_the_same_for_the_same_statistics_and_reads_back(tmp_path: Path) -> None:
    layers = {"denoise:b": seen(torch.randn(9, 16))}
    made = Statistics("print", ("a", "猫"), layers, key="k", runs=2, complete=True)
    for name in ("one", "two"):
        made.save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    back = Statistics.load(tmp_path / "one", "print")
    assert back.prompts == made.prompts
    there, here = back.layers["denoise:b"], made.layers["denoise:b"]
    assert (there.rows, there.top, there.output_square) == (here.rows, here.top, here.output_square)
    assert torch.equal(there.counts, here.counts)
    assert torch.equal(there.channel_max, here.channel_max)


def test_what_was_cut_off_is_continued_and_never_used(tmp_path: Path) -> None:
    layers = {"denoise:b": seen(torch.randn(9, 16))}
    Statistics("print", ("a",), layers, key="k", runs=1).save(tmp_path / "s")
    with pytest.raises(CalibrationError, match="cut off after 1 runs"):
        Statistics.load(tmp_path / "s", "print")
    found = Statistics.unfinished(tmp_path / "s", "k")
    assert found is not None
    assert found.runs == 1
    assert Statistics.unfinished(tmp_path / "s", "other") is None
    assert Statistics.unfinished(tmp_path / "nowhere", "k") is None
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-1])
    assert Statistics.unfinished(tmp_path / "s", "k") is None


def test_statistics_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    layers = {"b": seen(torch.randn(9, 16))}
    Statistics("a" * 64, ("a",), layers, complete=True).save(tmp_path / "s")
    with pytest.raises(CalibrationError, match="another checkpoint: expected bbbb") as caught:
        Statistics.load(tmp_path / "s", "b" * 64)
    assert "--statistics" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["text", "empty", "foreign", "missing", "old"])
def test_files_that_are_no_statistics_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    if kind == "text":
        path.write_text("hello")
    if kind == "empty":
        path.touch()
    if kind == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    if kind == "old":
        about = {"version": 0, "checkpoint": "x", "prompts": []}
        save_file({}, path, {"calibration": json.dumps(about)})
    with pytest.raises(CalibrationError, match="statistics"):
        Statistics.load(path, "x")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_no_prompts_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(CalibrationError, match="holds no prompt") as caught:
        calibrate.read_prompts(path)
    assert "one prompt per line" in str(caught.value.hint)


def test_prompts_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n# a comment\na blue square\n", encoding="utf-8-sig")
    assert calibrate.read_prompts(path) == ("a red circle", "a blue square")


def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        calibrate.read_prompts(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CalibrationError, match="cannot be read"):
        calibrate.read_prompts(tmp_path / "binary")


def test_the_list_that_ships_is_of_many_distinct_prompts() -> None:
    prompts = calibrate.read_prompts(calibrate.DEFAULT_PROMPTS)
    assert len(set(prompts)) == len(prompts) >= 32


def test_an_input_that_is_not_finite_names_its_layer() -> None:
    into: dict[str, Observer] = {}
    linear = nn.Linear(4, 8)
    with (
        calibrate.watch(linear, "denoise:a.b", into),
        torch.inference_mode(),
        pytest.raises(CalibrationError, match=r"denoise:a\.b got (nan|inf)"),
    ):
        linear(torch.tensor([[1.0, 2.0, float("nan"), 3.0]]))


def heavy() -> tuple[Observer, torch.Tensor, torch.Tensor]:
    """Inputs with rare large values in every channel."""
    torch.manual_seed(1)
    x = torch.distributions.StudentT(3.0).sample((4000, 32))
    return seen(x), x, torch.randn(32, 8)


def test_mse_clips_where_that_costs_least() -> None:
    found, x, _ = heavy()

    def lost(largest: float) -> float:
        step = largest / 127
        return float(((x / step).round().clamp(-128, 127) * step - x).square().mean())

    chosen = scales.clip(found, "mse", "int8")
    assert chosen < found.largest
    best = min(lost(float(share) * found.largest) for share in torch.linspace(0.02, 1, 99))
    assert lost(chosen) <= 1.02 * best
    assert lost(chosen) < lost(scales.clip(found, "max", "int8"))


def test_percentile_keeps_all_but_one_in_ten_thousand() -> None:
    found, x, _ = heavy()
    beyond = (x.abs() > scales.clip(found, "percentile", "int8")).double().mean()
    assert 0 <= beyond <= 1.5e-4


def test_floating_formats_never_clip() -> None:
    found, _, _ = heavy()
    assert scales.clip(found, "mse", "fp8") == found.largest


def linear_stage(weight: torch.Tensor) -> Stage:
    linear = nn.Linear(*weight.shape, bias=False).requires_grad_(False)
    linear.weight.data = weight.T.contiguous()
    return Stage(Definition("s", 0.0), nn.Sequential(linear), (), ())


def error(layer: nn.Module, exact: nn.Module, x: torch.Tensor) -> float:
    lazy_tensors.load(layer)
    return float((layer(x) - exact(x)).norm() / exact(x).norm())


def test_a_planted_outlier_migrates_and_the_error_falls() -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(4000, 64), torch.randn(64, 8) * 0.1
    x[:, 7] *= 300
    weight[7] /= 300  # the channel counts no more than the others
    stage = linear_stage(weight)
    found = seen(x, outputs=x @ weight)
    choice = Choice("s", "0", "int8")
    [decision] = decide({"s": stage}, [choice], Statistics("", (), {"s:0": found}), "bf16", "mse")
    assert decision.given == "int8"
    assert "outliers migrate" in decision.reason
    assert decision.scales is not None
    exact = stage.module[0]
    moved = QuantizedLinear(exact, "int8", decision.scales.input_scale, decision.scales.smoothing)
    plain = QuantizedLinear(exact, "int8", scales.clip(found, "mse", "int8") / 127)
    assert error(moved, exact, x) < 0.02
    assert error(plain, exact, x) > 10 * error(moved, exact, x)


@pytest.mark.parametrize("outlier", [1.0, 2.0, 100.0])
def test_the_best_strength_of_all_is_chosen(outlier: float) -> None:
    """Against the definition, which no strength is spared: s²/12 for steps of s, in inputs and in
    weights, along a row."""
    torch.manual_seed(4)
    x, weight = torch.randn(2000, 64), torch.randn(64, 8) * 0.1
    x[:, 7] *= outlier
    weight[7] /= outlier
    found = seen(x, outputs=x @ weight)

    def noise(factors: torch.Tensor) -> float:
        inputs, weights = x.double() * factors, weight.double() / factors[:, None]
        of_inputs = (inputs.abs().max() / 127).square() / 12 * weights.square().sum()
        of_weights = (weights.abs().amax(0) / 127).square().sum() / 12
        return float(of_inputs + of_weights * inputs.square().mean(0).sum())

    magnitude = weight.abs().amax(1)
    tried = [scales.smoothing_factors(found.channel_max, magnitude, s) for s in scales.STRENGTHS]
    noises = [noise(factors.double()) for factors in tried]
    plain = noise(torch.ones(64, dtype=torch.float64))
    chosen = scales.choose(found, weight, "int8", "max")
    power = float((x @ weight).double().square().sum(1).mean())
    if min(noises) * scales.GAIN < plain:
        expected = tried[noises.index(min(noises))]
        assert chosen.smoothing is not None
        assert torch.equal(chosen.smoothing, expected)
    else:
        assert chosen.smoothing is None
    kept = plain if chosen.smoothing is None else min(noises)
    assert chosen.signal_to_noise == pytest.approx(10 * math.log10(power / kept), abs=1e-4)
    assert (chosen.smoothing is not None) == (outlier > 2)


def test_a_layer_that_no_scale_can_save_stays_in_16_bit() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(4000, 64), torch.randn(64, 8) * 0.1
    x[::50] *= 3000  # whole rows: nothing to migrate, and clipping loses them
    found = seen(x, outputs=torch.randn(4000, 8) * 0.5)
    statistics = Statistics("", (), {"s:0": found})
    stages = {"s": linear_stage(weight)}
    [decision] = decide(stages, [Choice("s", "0", "int8")], statistics, "bf16", "max")
    assert decision.given == "bf16"
    assert f"less than {LEAST_SIGNAL_TO_NOISE:.0f}" in decision.reason


def test_layers_without_statistics_or_weights_stay_in_16_bit_by_name() -> None:
    stages = {"s": linear_stage(torch.randn(64, 8))}
    empty = {"s": linear_stage(torch.zeros(64, 8))}
    of_zeros = Statistics("", (), {"s:0": seen(torch.zeros(10, 64))})
    choice = [Choice("s", "0", "int8")]
    for given, statistics, reason in (
        (stages, Statistics("", ()), "never reached in calibration"),
        (stages, of_zeros, "only zeros"),
        (empty, of_zeros, "weights are 0"),
    ):
        [decision] = decide(given, choice, statistics, "bf16", "mse")
        assert decision.given == "bf16"
        assert reason in decision.reason
        assert decision.record()["asked"] == "int8"


def test_fingerprints_tell_checkpoints_apart(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-20)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((100, 100), value)}, tmp_path / name / "model.safetensors")
    a, b, c = (calibrate.fingerprint([tmp_path / name]) for name in "abc")
    assert a == b != c
    for name, last in (("a", b"1"), ("b", b"2")):
        (tmp_path / name / "model.gguf").write_bytes(b"GGUF" + bytes(1000) + last)
    with_a, with_b = (calibrate.fingerprint([tmp_path / name]) for name in "ab")
    assert len({a, with_a, with_b}) == 3
