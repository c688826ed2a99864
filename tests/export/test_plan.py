"""The planner: what it predicts is what a build holds, and its verdicts say why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bifrost_rt import dims, manifest, memory_plan
from export import assemble, graph, precision
from export.checkpoint import Checkpoint
from export.errors import CheckpointError, RecipeError
from export.formats import FORMATS
from export.plan import main, of_set
from export.planning import devices, estimate, report, work
from export.planning.estimate import Plan
from export.planning.storage import Storage
from export.planning.work import Work
from export.stages.catalog import DEFINITIONS
from tests.conftest import ALPHA

LENGTHS = {"mllm_max_length": 48, "t5_length": 32}
FOLDERS = [ALPHA / part for part in ("mllm", "bifrost", "flux")]


@pytest.fixture(scope="module")
def works() -> dict[str, Work]:
    found = work.of_checkpoint(Checkpoint(*FOLDERS, read=False), **LENGTHS, steps=28)
    return {one.engine: one for one in found}


@pytest.fixture(scope="module")
def built(alpha_set: Path) -> dict[str, Work]:
    found = work.of_set(alpha_set, manifest.read(alpha_set), 28)
    return {one.engine: one for one in found}


def stored(name: str) -> Storage:
    return Storage(FORMATS[name])


def on(release: list[Work], device: str, storage: str, **options: Any) -> Plan:
    return estimate.plan(release, devices.find(device), stored(storage), **options)


def test_planned_weights_are_the_built_ones(works: dict[str, Work], built: dict[str, Work]) -> None:
    planned = {name: one.weights(stored("fp32")) for name, one in works.items()}
    found = {name: one.weights(None) for name, one in built.items()}
    assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=0.01)
    # the tiny CLIP's causal mask is 3 % of it, which is no weight
    assert planned == {name: pytest.approx(size, rel=0.04) for name, size in found.items()}


def test_planned_weights_are_the_built_ones_at_16_bit(works: dict[str, Work]) -> None:
    checkpoint = Checkpoint(*FOLDERS)
    planned = found = 0
    for stage in assemble.stages(checkpoint, assemble.facts(checkpoint), 48, 77, 32):
        if stage.name not in works:  # it reads images, and draws nothing
            continue
        precision.round_weights(stage.module, "bf16")
        traced = graph.to_graph(stage)
        precision.store(traced, "bf16")
        found += sum(precision.weight_bytes(traced).values())
        planned += works[stage.name].weights(stored("bf16"))
    assert planned == pytest.approx(found, rel=0.01)


def test_the_built_files_hold_the_counted_bytes(alpha_set: Path, built: dict[str, Work]) -> None:
    for name, one in built.items():
        files = [alpha_set / f"{name}{suffix}" for suffix in (".data", ".onnx")]
        assert files[0].stat().st_size <= one.weights(None) * 1.01
        assert one.weights(None) <= sum(file.stat().st_size for file in files)


def test_arithmetic_is_that_of_the_graphs(works: dict[str, Work], built: dict[str, Work]) -> None:
    """Counted twice: from the modules on the meta device, and from the exported nodes."""
    assert {n: w.flops for n, w in works.items()} == {n: w.flops for n, w in built.items()}
    assert {n: w.calls for n, w in works.items()} == {n: w.calls for n, w in built.items()}


def test_doors_are_those_of_the_set(works: dict[str, Work], built: dict[str, Work]) -> None:
    for name, one in works.items():
        assert (one.tensors, one.cache) == (built[name].tensors, built[name].cache)
        assert 0.5 < one.scratch / built[name].scratch < 2.5


def test_the_manifest_states_the_scratch_memory_of_the_graph(
    alpha_set: Path, built: dict[str, Work]
) -> None:
    facts = manifest.read(alpha_set)
    for name in dims.drawing(facts.engines):
        assert facts.engine(name).scratch_bytes == built[name].scratch


def test_7b_has_the_published_sizes_and_cost(release: list[Work]) -> None:
    """Billions of parameters and TFLOP of one image, from the published shapes."""
    at = {one.engine: one for one in release}
    fp32 = {name: one.weights(stored("fp32")) / 4e9 for name, one in at.items()}
    assert fp32["visual_decode"] == pytest.approx(6.53, abs=0.02)
    # FLUX without modulation and embedders, and the ControlNet without modulation
    assert fp32["denoise"] == pytest.approx(8.59 + 0.75, abs=0.02)
    assert at["denoise"].calls * at["denoise"].flops / 1e12 == pytest.approx(658, rel=0.01)
    assert at["t5_text"].flops / 1e12 == pytest.approx(4.8, rel=0.02)
    assert at["vae_decode"].flops / 1e12 == pytest.approx(2.5, rel=0.02)


def test_7b_answers_at_the_pace_of_its_memory(release: list[Work]) -> None:
    """All weights of the text branch and the head, [152064, 3584] in 16 bit, are read for a token,
    and one row of as large an embedding."""
    for name, linear in (("bf16", 2), ("fp8", 1)):
        plan = on(release, "rtx-4090", name)
        read = 6.53e9 * linear + 2 * 152064 * 3584
        assert plan.tokens_per_second == pytest.approx(1008e9 / read, rel=0.01)
        assert plan.answer_cache_bytes == 28 * 2 * 4 * 128 * 4096 * 4
    assert "tokens a second at most; 448 MiB of keys and values for 4096 tokens" in report.describe(
        plan
    )


def test_a_set_and_its_checkpoint_answer_alike(
    works: dict[str, Work], built: dict[str, Work]
) -> None:
    for found in (works, built):
        assert [name for name, one in found.items() if one.answers] == ["mllm_text"]
    planned, counted = works["mllm_text"].answers, built["mllm_text"].answers
    assert planned is not None
    assert counted is not None
    assert planned.cache == counted.cache
    text, fp32 = works["mllm_text"], stored("fp32")
    held = text.weights(fp32)
    assert planned.read(held, fp32, text.elements) == held - 640 * 64 * 4
    assert counted.read(held, None, None) == held - 640 * 64 * 4


def test_7b_at_fp8_fits_12_gb_and_says_why(release: list[Work]) -> None:
    plan = on(release, "rtx-4070-12gb", "fp8")
    assert plan.fits
    assert plan.peak_bytes <= plan.budget_bytes < 12 * 2**30
    largest = max(plan.stages, key=lambda stage: stage.weight_bytes)
    assert largest.engine == "denoise"
    assert largest.weight_bytes == pytest.approx(9.4e9, rel=0.01)
    assert "conditioning" in largest.evict  # the modulation leaves before the loop
    assert plan.resident_bytes > 32e9
    text = report.describe(plan)
    assert "GeForce RTX 4070 12 GB, weights fp8: fits" in text
    assert "`conditioning` must leave before `denoise`" in text


def test_7b_at_bf16_on_24_gb_says_what_must_give(release: list[Work]) -> None:
    plan = on(release, "rtx-4090", "bf16")
    assert plan.fits
    assert "conditioning" in plan.stages[6].evict
    said = " ".join(plan.changes)
    assert "not everything stays in memory, which would take 6" in said
    assert "must leave before `denoise`" in said
    assert "every further image loads" in said


def test_7b_at_bf16_on_12_gb_says_what_to_change(release: list[Work]) -> None:
    plan = on(release, "rtx-4070-12gb", "bf16")
    assert not plan.fits
    said = " ".join(plan.changes)
    assert "`denoise` needs" in said
    assert "fp8 fits: its largest stage is `denoise`" in said
    assert "int8 fits" in said
    assert "at this precision the least memory is" in said


def test_a_recipe_may_say_otherwise_of_engines_and_layers(release: list[Work]) -> None:
    at = {one.engine: one for one in release}
    asked = Storage(
        FORMATS["fp8"],
        stages={"clip_text": "bf16", "visual_decode": "int4"},
        layers={"conditioning:*_modulation.linears.*": "int4", "t5_text:*.wo": "int4"},
    )
    asked.check(one.elements for one in release if one.elements)
    for same, uniform in (("clip_text", "bf16"), ("visual_decode", "int4"), ("denoise", "fp8")):
        assert at[same].weights(asked) == at[same].weights(stored(uniform))
    # FLUX's and its ControlNet's modulation, [7.0 billion weights], from 16 to 4.5 bits
    saved = at["conditioning"].weights(stored("fp8")) - at["conditioning"].weights(asked)
    assert saved == pytest.approx(3.5e9 * 11.5 / 8, rel=0.03)
    saved = at["t5_text"].weights(stored("fp8")) - at["t5_text"].weights(asked)
    assert saved == pytest.approx(24 * 10240 * 4096 * 11.5 / 8, rel=0.001)
    plan = estimate.plan(release, devices.find("rtx-4090"), asked)
    seconds = {stage.engine: stage.seconds for stage in plan.stages}
    # 4-bit weights are multiplied in 16 bit
    for name, uniform in (("visual_decode", "int4"), ("denoise", "fp8")):
        alone = {s.engine: s.seconds for s in on(release, "rtx-4090", uniform).stages}
        assert seconds[name] == alone[name]
    assert "as the recipe says" in report.describe(plan)
    with pytest.raises(RecipeError, match="no stage 'denoize'"):
        Storage(FORMATS["fp8"], stages={"denoize": "bf16"}).check([at["denoise"].elements])


def test_a_format_that_the_device_lacks_is_named(release: list[Work]) -> None:
    plan = on(release, "rtx-3060-12gb", "fp8")
    assert not plan.fits
    assert plan.changes[0] == "GeForce RTX 3060 12 GB has no fp8 arithmetic"
    assert on(release, "rtx-3060-12gb", "int8").fits


def test_time_is_the_roofline(release: list[Work]) -> None:
    plan = on(release, "rtx-4090", "fp8")
    device = devices.find("rtx-4090")
    for stage, one in zip(plan.stages, release, strict=True):
        rate = device.figures["fp16" if DEFINITIONS[one.engine].all_in_16_bit else "fp8"].value
        compute = one.flops / rate / 1e12
        memory = (stage.weight_bytes + one.tensors) / device.figures["bandwidth"].value / 1e9
        assert stage.seconds == pytest.approx(one.calls * max(compute, memory))
        assert stage.limit == ("compute" if compute >= memory else "bandwidth")
    assert plan.seconds == pytest.approx(sum(stage.seconds or math.nan for stage in plan.stages))
    assert plan.joules == pytest.approx(plan.seconds * 450)


def test_the_schedule_is_the_runtimes(alpha_set: Path) -> None:
    """A set planned here leaves and loads as `Generator` does."""
    facts = manifest.read(alpha_set)
    from bifrost_rt.backends.onnxruntime import OnnxRuntime

    needs = memory_plan.needs(
        facts,
        dims.drawing(facts.engines),
        memory_plan.sizes(facts),
        OnnxRuntime().weights_in_memory,
    )
    budget = sum(need.resident for need in needs) // 2
    plan = of_set(alpha_set, devices.find("rtx-4090"), budget)
    steps = memory_plan.schedule(needs, budget, prefetch=OnnxRuntime.opens_in_threads)
    assert any(step.prefetch for step in steps)
    assert [(s.engine, s.evict, s.peak_bytes) for s in plan.stages] == [
        (s.engine, s.evict, s.peak) for s in steps
    ]


def test_headers_alone_find_what_is_missing(tmp_path: Path) -> None:
    from export.synthesize import synthesize
    from export.synthetic.shapes import Shapes

    synthesize(Shapes(), tmp_path / "set", seed=None)
    folders = [tmp_path / "set" / part for part in ("mllm", "bifrost", "flux")]
    files = [*(tmp_path / "set").rglob("*.safetensors")]
    on_disk = sum(512 * file.stat().st_blocks for file in files)
    assert on_disk < sum(file.stat().st_size for file in files)
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing tensors: .*layers\.2"):
        work.of_checkpoint(Checkpoint(*folders, read=False), 64, 16, 4)


def test_every_figure_has_a_source_and_a_certainty() -> None:
    table = devices.read(devices.TABLE)
    wanted = ("orin-nano", "orin-nx", "agx-orin-32", "agx-orin-64", "thor", "3060", "5090", "spark")
    assert all(any(part in name for name in table) for part in wanted)
    for device in table.values():
        assert {"memory_gib", "bandwidth", "watts", "fp16"} <= device.figures.keys()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("bandwidth = 12", r"x.bandwidth: expected \[number, source, certainty\], found 12"),
        ('bandwidth = [1, "", "published"]', r"x.bandwidth: expected"),
        ('bandwidth = [1, "page", "sure"]', r"x.bandwidth: expected"),
        ('bandwith = [1, "page", "derived"]', r"unknown figure \(did you mean 'bandwidth'"),
        ("", "x has no memory_gib"),
    ],
)
def test_a_figure_without_support_is_refused(tmp_path: Path, entry: str, message: str) -> None:
    (tmp_path / "devices.toml").write_text(f"[x]\n{entry}\n")
    with pytest.raises(RecipeError, match=message):
        devices.read(tmp_path / "devices.toml")


def test_the_command_line_writes_text_json_and_an_image(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    where = ["--engines", str(alpha_set), "--device", "jetson-orin-nano-8gb"]
    assert main([*where, "--json", str(data), "--plot", str(plot)]) == 0
    assert "weights as built: fits" in capsys.readouterr().out
    found = json.loads(data.read_text())
    assert {"fits", "peak_bytes", "seconds", "stages"} <= found.keys()
    assert [stage["engine"] for stage in found["stages"]][-1] == "vae_decode"
    with Image.open(plot) as image:
        assert image.size == (1000, 620)
    assert main([*where, "--memory-budget", "1MiB"]) == 3
    assert "what to change" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "7b", "--device", "rtx-409"], "did you mean 'rtx-4090'"),
        (["--like", "7", "--device", "rtx-4090"], "known: 7b, 3b"),
        (["--like", "7b", "--device", "rtx-4090", "--precision", "fp7"], "'fp7' is unknown"),
        (["--engines", "nowhere", "--device", "rtx-4090"], "cannot read an engine set"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
