"""The default model, built and compiled as a user does it, in the formats of RTX cards: each of its
engines compiles, and what it computes in is read back from the builder's network."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from PIL import Image

from bifrost_rt import inspect, manifest, memory_plan, opened
from bifrost_rt.manifest import Manifest
from export import build, flops, plan, shipped
from export.compile import __main__ as command
from export.compile import builder as builders
from export.compile import compiled_set, plan_report, plan_text
from export.compile.network import Arithmetic
from export.stages.catalog import DEFINITIONS
from tests.export.conftest import content

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

RECIPE = shipped.DEFAULT
PROMPTS = "a picture of a pink circle and a blue square\na photo of three green triangles\n"
TARGETS = {
    "fp16": ("sm86", "sm89", "sm120"),
    "bf16": ("sm86", "sm89", "sm120"),
    "int8": ("sm86", "sm89", "sm120"),
    "fp8": ("sm89", "sm120"),
    "nvfp4": ("sm120",),
}
DTYPES = {
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
    "nvfp4": "float4_e2m1fn",
}
FALLBACKS = {"fp16": "float16"} | dict.fromkeys(("bf16", "int8", "fp8", "nvfp4"), "bfloat16")
SOURCES = {"bf16": "fp16"}  # what is compiled from the set of another precision
STORED = {"bf16": "float16", "nvfp4": "uint4"}  # of ONNX files, where it is another dtype
IN_ALL_LAYERS = ("fp16", "bf16")
STAGES = {
    *("mllm_text", "visual_decode", "clip_text", "t5_text"),
    *("conditioning", "control_embed", "denoise", "vae_decode"),
    *("vision_encode", "vae_encode"),
}
IN_16_BIT = {
    "conditioning",
    "control_embed",
    "vae_decode",
    "vae_encode",
}  # whatever the format: see their definitions


def ran(main: Any, *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The ONNX sets. fp8 and nvfp4 take the statistics of int8, and over a copy of that set only
    the engines are built that differ."""
    folder = tmp_path_factory.mktemp("default")
    (folder / "prompts.txt").write_text(PROMPTS)
    made = {precision: folder / SOURCES.get(precision, precision) for precision in DTYPES}
    quick = ("--calibration-prompts", folder / "prompts.txt", "--calibration-steps", 2)
    ran(build.main, RECIPE, "--precision", "int8", *quick, "--output", made["int8"])
    calibrated = ("--statistics", made["int8"] / "calibration.safetensors")
    for precision in ("fp8", "nvfp4"):
        shutil.copytree(made["int8"], made[precision])
        ran(build.main, RECIPE, "--precision", precision, *calibrated, "--output", made[precision])
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


# float16 by hand: `test_compile` compiles every engine of a smaller model in it.
@pytest.fixture(
    scope="module",
    params=[pytest.param(p, marks=pytest.mark.slow if p == "fp16" else ()) for p in DTYPES],
)
def compiled(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Compiled:
    precision: str = request.param
    source, output = sources[precision], tmp_path_factory.mktemp("compiled") / precision
    before = content(source)
    targets = ",".join(TARGETS[precision])
    compute = ("--compute", precision) if precision in SOURCES else ()
    ran(command.main, source, "--target", targets, "--max-images", 1, *compute, "--output", output)
    return Compiled(precision, output, source, before)


def test_all_engines_are_there_for_all_targets(compiled: Compiled) -> None:
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
    dtype, fallback = DTYPES[compiled.precision], FALLBACKS[compiled.precision]
    for spec in manifest.read(compiled.source).engines:
        quantized = spec.precision.layers.get(compiled.precision, 0)
        products = compiled.report[spec.name]["products"]
        assert set(products) <= {dtype, fallback, "float32"}, spec.name
        nodes = ir.load(compiled.source / spec.graph).graph
        transposed = any(node.op_type == "ConvTranspose" for node in nodes)
        named = DEFINITIONS[spec.name].float32_layers
        assert ("float32" in products) == (bool(named) or transposed), spec.name
        if compiled.precision in IN_ALL_LAYERS:
            # every layer but one or two of embeddings, which are looked up
            assert sum(products.values()) > sum(spec.precision.layers.values()) - 2
            assert products[dtype] > products.get("float32", 0)
        elif spec.name in IN_16_BIT:
            assert quantized == 0
            assert dtype not in products
        else:
            assert products[dtype] == quantized > 10
            assert products[fallback] > 0  # attention


def test_the_manifest_says_what_was_read_back(compiled: Compiled) -> None:
    dtype, fallback = DTYPES[compiled.precision], FALLBACKS[compiled.precision]
    for spec in compiled.facts.engines:
        expected = fallback if spec.name in IN_16_BIT else dtype
        source = SOURCES.get(compiled.precision, compiled.precision)
        assert spec.precision.requested == source
        assert spec.precision.compute == expected
        largest = max(compiled.report[spec.name]["weight_bytes"].items(), key=lambda kv: kv[1])
        assert spec.precision.weights == largest[0]


def test_every_quantized_weight_is_held_in_its_bits(compiled: Compiled) -> None:
    """The network's constants in the format are the source graph's, to the byte."""
    dtype = DTYPES[compiled.precision]
    for spec in manifest.read(compiled.source).engines:
        resident = compiled.report[spec.name]["weight_bytes"]
        graph = ir.load(compiled.source / spec.graph).graph
        tensors = [value.const_value for value in graph.initializers.values()]
        kept = STORED.get(compiled.precision, dtype)
        stored = sum(t.nbytes for t in tensors if t and t.dtype.numpy().name == kept)
        if compiled.precision in IN_ALL_LAYERS:  # some stay float32, some others are computed
            assert resident[dtype] + resident.get("float32", 0) / 2 == pytest.approx(
                stored, rel=0.15
            )
        else:
            assert resident.get(dtype, 0) == stored, spec.name
            assert (stored > 0) == (spec.name not in IN_16_BIT)


def test_every_plan_multiplies_what_the_graph_does(compiled: Compiled) -> None:
    """Not a number is left unknown, and the operations are those counted from the ONNX graph."""
    facts, source = compiled.facts, manifest.read(compiled.source)
    at = memory_plan.sizes(facts)
    shown = inspect.plan(compiled.folder, facts)
    assert "unknown" not in shown
    for spec in facts.engines:
        said = compiled.report[spec.name]["plan"]
        assert (said["plan"], said["capturable"]) == ("read", True), spec.name
        assert said["weights_moved"] == {}, spec.name
        graph = ir.load(compiled.source / source.engine(spec.name).graph)
        attentions = sum(node.op_type == "Attention" for node in graph.graph)
        assert said["attention"] == {"fused": attentions, "decomposed": 0}, spec.name
        assert said["operations"] == pytest.approx(flops.count(graph, at(spec.name)), rel=0.02)
        assert f"{spec.name}: {said['kernels']} kernels, " in shown
        # products are merged, never of a type that the network does not have
        types = {kind.split(" -> ")[0] for kind in said["products"]}
        asked = compiled.report[spec.name]["products"]
        assert types <= asked.keys(), spec.name
        assert 0 < sum(said["products"].values()) + attentions <= sum(asked.values()), spec.name


def test_a_plan_that_contradicts_what_was_asked_is_named(compiled: Compiled) -> None:
    """The plans are right here, so what was asked is changed."""
    spec = compiled.facts.engine("visual_decode")
    resident = plan_text.read(compiled.folder / spec.graph)
    assert resident is not None
    assert resident.targets == TARGETS[compiled.precision]
    found = plan_report.kernels(resident)
    product = next(kernel for kernel in found if kernel.kind == "product")
    layer = next(name for name in product.layers if name.startswith(("node_MatMul", "node_linear")))
    asked = Arithmetic({}, {}, {layer: product.reads}, {})
    assert plan_report.contradictions(resident, asked) == ()
    asked = Arithmetic({}, {}, {layer: "float32"}, {})
    (said,) = plan_report.contradictions(resident, asked)
    assert said == f"{layer} multiplies {product.reads}, where the network says float32"
    (said,) = plan_report.contradictions(replace(resident, capturable=False), Arithmetic({}, {}))
    assert said == "a call of it cannot be recorded as a CUDA graph"
    assert plan_report.describe(replace(resident, capturable=None))["capturable"] == "unknown"


def test_the_time_is_estimated_from_the_plans(
    compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "plan.json"
    asked = ("--engines", compiled.folder, "--device", "rtx-5090", "--json", written)
    ran(plan.main, *asked, "--plot", tmp_path / "plan.png")
    said = capsys.readouterr().out
    assert "estimated from the engines' plans" in said
    document = json.loads(written.read_text())
    times = {engine["engine"]: engine for engine in document["estimate"]["engines"]}
    # two read images, and draw nothing
    assert times.keys() == STAGES - {"vision_encode", "vae_encode"}
    bandwidth = 1792e9
    for stage in document["stages"]:
        engine = times[stage["engine"]]
        reported = compiled.report[stage["engine"]]["plan"]
        assert engine["seconds"] >= 0.999 * reported["bytes"] / bandwidth > 0
        assert engine["seconds"] >= engine["ideal_seconds"] >= engine["arithmetic_seconds"]
        assert stage["seconds"] == pytest.approx(engine["calls"] * engine["ideal_seconds"])
        assert sum(time["count"] for time in engine["kernels"]) == reported["kernels"]
    assert document["seconds"] == pytest.approx(document["estimate"]["ideal_seconds"])
    with Image.open(tmp_path / "plan.png") as image:
        assert image.height > 800


def test_an_engine_without_a_plan_is_unknown(compiled: Compiled, tmp_path: Path) -> None:
    engine = tmp_path / "visual_decode.engine"
    spec = compiled.facts.engine("visual_decode")
    engine.write_bytes(
        (compiled.folder / spec.graph).read_bytes().replace(b"header {", b"HEADER {")
    )
    asked = Arithmetic({}, {}, {}, {})
    sizes = memory_plan.sizes(compiled.facts)(spec.name)
    assert compiled_set.read_plan(tmp_path, spec, sizes, asked) == {"plan": "unknown"}


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
