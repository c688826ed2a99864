"""The default model, built and compiled as a user does it, in the formats of RTX cards: each of its
engines compiles, and what it computes in is read back from the builder's network."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from bifrost_rt import dims, manifest, opened, residency
from bifrost_rt.manifest import Manifest
from export import build, flops, shipped
from export.compile import __main__ as command
from export.compile import builder as builders
from export.compile import plan_report, plan_text
from export.stages.catalog import DEFINITIONS
from tests.export.conftest import content

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

RECIPE = shipped.DEFAULT
PROMPTS = "a picture of a pink circle and a blue square\na photo of three green triangles\n"
TARGETS = {
    "fp16": ("sm86", "sm89", "sm120"),
    "int8": ("sm86", "sm89", "sm120"),
    "fp8": ("sm89", "sm120"),
}
DTYPES = {"fp16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}
REST = {"fp16": "float16", "int8": "bfloat16", "fp8": "bfloat16"}
STAGES = {
    *("mllm_text", "visual_decode", "clip_text", "t5_text"),
    *("conditioning", "control_embed", "denoise", "vae_decode"),
}
IN_16_BIT = {
    "conditioning",
    "control_embed",
    "vae_decode",
}  # whatever the format: see their definitions


def ran(main: Any, *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three ONNX sets. fp8 takes the statistics of int8, and over a copy of that set only the
    engines are built that differ."""
    folder = tmp_path_factory.mktemp("default")
    (folder / "prompts.txt").write_text(PROMPTS)
    made = {precision: folder / precision for precision in DTYPES}
    quick = ("--calibration-prompts", folder / "prompts.txt", "--calibration-steps", 2)
    ran(build.main, RECIPE, "--precision", "int8", *quick, "--output", made["int8"])
    shutil.copytree(made["int8"], made["fp8"])
    calibrated = ("--statistics", made["int8"] / "calibration.safetensors")
    ran(build.main, RECIPE, "--precision", "fp8", *calibrated, "--output", made["fp8"])
    ran(build.main, RECIPE, "--precision", "fp16", "--output", made["fp16"])
    return made


@dataclass(frozen=True)
class Compiled:
    """A set, the ONNX set that it was compiled from, and that one's files before."""

    precision: str
    folder: Path
    source: Path
    before: dict[str, str]

    @property
    def facts(self) -> Manifest:
        return manifest.read(self.folder)

    @property
    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "report.json").read_text())
        return found["compiled"]["engines"]


@pytest.fixture(scope="module", params=list(DTYPES))
def compiled(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    precision: str = request.param
    source, output = sources[precision], tmp_path_factory.mktemp("compiled") / precision
    before = content(source)
    targets = ",".join(TARGETS[precision])
    ran(command.main, source, "--target", targets, "--max-images", 1, "--output", output)
    return Compiled(precision, output, source, before)


def test_all_seven_engines_are_there_for_all_targets(compiled: Compiled) -> None:
    facts, source = compiled.facts, manifest.read(compiled.source)
    assert {spec.name for spec in facts.engines} == STAGES
    for spec in facts.engines:
        about = spec.compiled
        assert about is not None
        assert about.targets == TARGETS[compiled.precision]
        assert (about.builder, about.version) == (
            "tensorrt-rtx",
            builders.find("tensorrt-rtx").version,
        )
        assert {"strongly_typed", "no_tf32"} <= {*about.flags}
        assert about.source_sha256 == compiled.before[source.engine(spec.name).graph]
        assert spec.files == (f"{spec.name}.engine",)
        assert spec.inputs == source.engine(spec.name).inputs
        assert spec.outputs == source.engine(spec.name).outputs
    opened.verify(compiled.folder, facts)


def test_the_set_that_they_are_compiled_from_is_untouched(compiled: Compiled) -> None:
    assert content(compiled.source) == compiled.before


def test_as_many_layers_compute_in_the_format_as_the_source_says(compiled: Compiled) -> None:
    dtype, rest = DTYPES[compiled.precision], REST[compiled.precision]
    for spec in manifest.read(compiled.source).engines:
        quantised = spec.precision.layers.get(compiled.precision, 0)
        products = compiled.report[spec.name]["products"]
        assert set(products) <= {dtype, rest, "float32"}, spec.name
        assert ("float32" in products) == bool(DEFINITIONS[spec.name].float32_layers)
        if compiled.precision == "fp16":
            # every layer but one or two of embeddings, which are looked up
            assert sum(products.values()) > sum(spec.precision.layers.values()) - 2
            assert products["float16"] > products.get("float32", 0)
        elif spec.name in IN_16_BIT:
            assert quantised == 0
            assert dtype not in products
        else:
            assert products[dtype] == quantised > 10
            assert products[rest] > 0  # attention


def test_the_manifest_says_what_was_read_back(compiled: Compiled) -> None:
    dtype, rest = DTYPES[compiled.precision], REST[compiled.precision]
    for spec in compiled.facts.engines:
        expected = rest if spec.name in IN_16_BIT else dtype
        assert spec.precision.requested == compiled.precision
        assert spec.precision.compute == expected
        largest = max(compiled.report[spec.name]["weight_bytes"].items(), key=lambda kv: kv[1])
        assert spec.precision.weights == largest[0]


def test_every_quantised_weight_is_held_in_its_bits(compiled: Compiled) -> None:
    """The network's constants in the format are the source graph's, to the byte."""
    dtype = DTYPES[compiled.precision]
    for spec in manifest.read(compiled.source).engines:
        held = compiled.report[spec.name]["weight_bytes"]
        graph = ir.load(compiled.source / spec.graph).graph
        tensors = [value.const_value for value in graph.initializers.values()]
        stored = sum(t.nbytes for t in tensors if t and t.dtype.numpy().name == dtype)
        if compiled.precision == "fp16":  # some stay float32, some others are computed
            assert held[dtype] == pytest.approx(stored, rel=0.15), spec.name
        else:
            assert held.get(dtype, 0) == stored, spec.name
            assert (stored > 0) == (spec.name not in IN_16_BIT)


def test_every_plan_is_read_and_multiplies_what_the_graph_does(compiled: Compiled) -> None:
    """Not a number is left unknown, and the operations are those counted from the ONNX graph."""
    facts, source = compiled.facts, manifest.read(compiled.source)
    at = residency.sizes(facts)
    for spec in facts.engines:
        plan = plan_text.read(compiled.folder / spec.graph)
        assert plan is not None, spec.name
        assert plan.targets == TARGETS[compiled.precision]
        doors = (*spec.inputs, *spec.outputs)
        shapes = {t.name: dims.shape_at(t.shape, at(spec.name)) for t in doors}
        said = plan_report.describe(plan.at(shapes))
        assert (said["plan"], said["capturable"]) == ("read", True), spec.name
        assert said["weights_moved"] == {}, spec.name
        assert said["attention"]["decomposed"] == 0, spec.name
        graph = ir.load(compiled.source / source.engine(spec.name).graph)
        assert said["operations"] == pytest.approx(flops.count(graph, at(spec.name)), rel=0.02)
        held = sum(t.bytes or 0 for t in plan.tensors.values() if t.constant and not t.base)
        assert said["bytes"] > 0.5 * held, spec.name
        attentions = sum(node.op_type == "Attention" for node in graph.graph)
        assert said["attention"]["fused"] == attentions, spec.name


def test_fp8_is_refused_for_a_card_without_it_before_anything_is_built(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = content(sources["fp8"])
    monkeypatch.setattr(builders, "compile_graph", None)  # would fail in another way
    monkeypatch.setattr("export.checkpoint.Checkpoint", None)
    wanted = ("--target", "sm86,sm89,sm120", "--max-images", "1", "--output", str(tmp_path / "rtx"))
    from_graphs = [str(sources["fp8"]), *wanted]
    from_checkpoint = [RECIPE, "--precision", "fp8", "--backend", "tensorrt-rtx", *wanted]
    for main, arguments in ((command.main, from_graphs), (build.main, from_checkpoint)):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: sm86 (Ampere: RTX 30, RTX A) has no fp8 arithmetic\nhint: ")
        assert "--precision int8" in said
        assert said.endswith("sm86 computes in fp32, fp16, bf16, int8, int4\n")
    assert list(tmp_path.iterdir()) == []
    assert content(sources["fp8"]) == before
