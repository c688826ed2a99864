"""Compiling for RTX cards on a machine without one: what is written, what is refused, and when."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import load, numpy_helper

from bifrost_rt import Generator, backends, inspect, manifest
from bifrost_rt.backends import gpu
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Range
from export import build, shipped
from export import recipe as recipes
from export.compile import __main__ as command
from export.compile import bound, capabilities, quantized
from export.compile import builder as builders
from export.compile.compiled_set import compile_set
from export.errors import CompileError, RecipeError
from export.recipe import Recipe
from export.stages.catalog import DEFINITIONS
from tests.conftest import alpha_recipe
from tests.export.conftest import SMALL, TARGETS, holding, rewritten

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

RECIPES = [shipped.path_of(name) for name in shipped.names()]


def test_a_compiled_set_says_how_and_for_what(compiled: Path, small_set: Path) -> None:
    facts, source = manifest.read(compiled), manifest.read(small_set)
    report = json.loads((compiled / "report.json").read_text())["compiled"]
    assert facts.backend == "tensorrt-rtx"
    assert facts.dimensions["images"] == Range(1, 2)
    assert facts.dimensions["texts"] == Range(1, 3)
    assert all(bounds.max is not None for bounds in facts.dimensions.values())
    for spec in facts.engines:
        about = spec.compiled
        assert about is not None
        assert about.builder == "tensorrt-rtx"
        assert about.version == builders.find("tensorrt-rtx").version
        assert about.targets == ("sm89", "sm120")
        held = sum(report["engines"][spec.name]["weight_bytes"].values())
        assert about.weight_bytes == pytest.approx(held, rel=0.1)
        door = spec.outputs[0].shape
        assert about.activation_bytes > 4 * int(door[-1])  # one row of what it gives, at least
        assert about.flags == ("strongly_typed", "decomposable_attention", "no_tf32")
        graph = source.engine(spec.name).graph
        assert about.source_sha256 == manifest.sha256(small_set / graph)
        assert (compiled / spec.graph).stat().st_size > 100_000
    for spec in source.engines:  # the same doors: parity's figures are theirs
        assert facts.engine(spec.name).inputs == spec.inputs
        assert facts.engine(spec.name).outputs == spec.outputs
    assert not list(compiled.rglob("*.onnx"))
    record = json.loads((compiled / "report.json").read_text())
    assert record["compiled"]["engines"].keys() == set(SMALL)
    assert record["engines"]["t5_text"]["parity"]["calls"] > 0  # of the ONNX graphs


def test_opening_it_without_a_gpu_gives_the_reason(compiled: Path) -> None:
    if backends.BACKENDS["tensorrt-rtx"].unavailable() is None:
        pytest.skip("this machine has a GPU that runs it")
    with pytest.raises(BackendError, match="backend 'tensorrt-rtx' is not available: "):
        Generator(compiled)


@pytest.mark.parametrize(("asked", "found"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_16_bit_set_computes_in_16_bit(
    small_set: Path, compiled: Path, tmp_path: Path, asked: str, found: str
) -> None:
    """Read back from the network: the manifest's word on the graphs was float32."""
    source = shutil.copytree(small_set, tmp_path / asked)
    rewritten(source, lambda m: holding(m, requested=asked))
    output = compile_set(source, tmp_path / "out", targets=("sm89",), max_images=1)
    report = json.loads((output / "report.json").read_text())["compiled"]["engines"]
    before = json.loads((compiled / "report.json").read_text())["compiled"]["engines"]
    for spec in manifest.read(output).engines:
        assert (spec.precision.weights, spec.precision.compute) == (found, found)
        assert report[spec.name]["products"].keys() == {found}
        exact = manifest.read(compiled).engine(spec.name)
        assert (exact.precision.weights, exact.precision.compute) == ("float32", "float32")
        assert exact.inputs == spec.inputs  # doors stay
        held, whole = report[spec.name]["weight_bytes"], before[spec.name]["weight_bytes"]
        assert held[found] == pytest.approx(whole["float32"] / 2, rel=0.1)  # norms stay


@pytest.mark.parametrize(("compute", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_weights_bound_at_run_time_lie_beside_the_engine(
    small_set: Path,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compute: str,
    dtype: str,
) -> None:
    monkeypatch.setattr(bound, "SMALLEST", 1 << 12)  # the networks are tiny
    output = compile_set(
        small_set, tmp_path / "out", targets=TARGETS, max_images=1, compute=compute, weights="bound"
    )
    for spec in manifest.read(output).engines:
        assert spec.compiled is not None
        assert "bound_weights" in spec.compiled.flags
        assert spec.precision.weights == dtype
        assert spec.files == (f"{spec.name}.engine", f"{spec.name}.weights")
        assert spec.inputs == manifest.read(compiled).engine(spec.name).inputs
        assert len(spec.compiled.weights) > 1
        stored = dict(initializers(small_set / f"{spec.name}.onnx"))
        content = (output / f"{spec.name}.weights").read_bytes()
        for weight in spec.compiled.weights:
            found = np.frombuffer(content, weight.dtype, offset=weight.offset)
            found = found[: weight.size // found.itemsize].reshape(weight.shape)
            expected = stored[weight.name.removesuffix(".bfloat16")]
            assert np.array_equal(found, expected.astype(weight.dtype))
            assert weight.offset % 256 == 0
        engine = (compiled / spec.graph).stat().st_size
        assert (output / spec.graph).stat().st_size < engine


def initializers(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    model = load(path)
    for tensor in model.graph.initializer:
        yield tensor.name, numpy_helper.to_array(tensor)


def test_quantized_layers_are_not_measured(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "formats", lambda graph: {"int8"})
    with pytest.raises(CompileError, match="`clip_text` has int8 layers: .*whole steps"):
        compile_set(small_set, tmp_path / "out", targets=("sm89",), max_images=1, measure=True)


def test_int8_within_fp16_is_refused_before_anything_is_compiled(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "formats", lambda graph: {"int8"})
    monkeypatch.setattr(builders, "compile_graph", None)  # would fail in another way
    with pytest.raises(CompileError, match="`clip_text`: int8 layers within fp16 overflow"):
        compile_set(small_set, tmp_path / "out", targets=("sm89",), max_images=1, compute="fp16")
    mixed = {"precision": "fp16", "layers": {"denoise:*": "int8"}}
    recipe = alpha_recipe(
        tmp_path / "rtx", backend="tensorrt-rtx", target=("sm89",), max_images=1, **mixed
    )
    with pytest.raises(CompileError, match="`denoise`: int8 layers within fp16 overflow"):
        build.build(recipe)
    assert list(tmp_path.iterdir()) == []


def test_this_machines_own_card_is_a_target(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's word for it needs the card, so what it is asked for is looked at."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert hasattr(trt.ComputeCapability, "CURRENT")
    asked: list[dict[str, Any]] = []
    whole = builders.compile_graph

    def listening(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return whole(*arguments)

    monkeypatch.setattr(builders, "compile_graph", listening)
    with pytest.raises(CompileError, match=r"cannot be beside sm89"):
        compile_set(small_set, tmp_path / "out", targets=("current", "sm89"), max_images=1)
    monkeypatch.setattr(gpu, "find", lambda: "there is no NVIDIA driver")
    with pytest.raises(CompileError, match="this machine's own, and there is no NVIDIA driver"):
        compile_set(small_set, tmp_path / "out", targets=("current",), max_images=1)
    monkeypatch.setattr(gpu, "find", lambda: gpu.Gpu("NVIDIA GeForce RTX 4090", "sm89"))
    output = compile_set(small_set, tmp_path / "out", targets=("current",), max_images=1)
    assert asked == [{"current": True}] * 2
    for spec in manifest.read(output).engines:
        assert spec.compiled is not None
        assert spec.compiled.targets == ("sm89",)
        assert spec.compiled.flags[-1] == "current_gpu"


def test_files_that_are_links_of_another_sets_are_read(small_set: Path, tmp_path: Path) -> None:
    """A rebuilt set shares what did not change with the older one."""
    source = shutil.copytree(small_set, tmp_path / "source", copy_function=os.link)
    assert compile_set(source, tmp_path / "out", targets=("sm89",), max_images=1)


def test_engines_stay_on_the_cpu_where_it_is_asked(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(small_set), "--output", str(tmp_path / "out"), "--target", "sm89"]
    arguments += ["--max-images", "1", "--on-cpu"]
    assert command.main([*arguments, "t5_txt"]) == 1
    assert "names 't5_txt', which is no engine (did you mean 't5_text'?)" in capsys.readouterr().err
    assert command.main([*arguments, ",".join(SMALL)]) == 1
    assert "nothing is left to compile" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert command.main([*arguments, "t5_text"]) == 0
    facts, source = manifest.read(tmp_path / "out"), manifest.read(small_set)
    assert [spec.name for spec in facts.engines] == [spec.name for spec in source.engines]
    for spec in facts.engines:
        assert (spec.compiled is None) == (spec.name == "t5_text")
        assert spec.backend == ("onnxruntime" if spec.name == "t5_text" else None)
    kept = facts.engine("t5_text")
    assert kept.files == source.engine("t5_text").files
    assert all(facts.files[name] == source.files[name] for name in kept.files)
    assert "t5_text on onnxruntime" in inspect.describe(facts)
    assert "t5_text" not in inspect.plan(tmp_path / "out", facts)


def test_the_command_line(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(small_set), "--output", str(tmp_path / "out"), "--target", "sm86,rtx-3090"]
    assert command.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: the set draws any number")
    assert said.err.count("\n") == 2
    assert command.main([*arguments, "--max-images", "1", "--max-steps", "9"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert manifest.read(tmp_path / "out").dimensions["steps"] == Range(1, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorrt-rtx"}, "needs max_images"),
        ({"target": ("sm89",)}, "target, max_steps and on_cpu are for compiled engines"),
        ({"on_cpu": ("t5_text",)}, "target, max_steps and on_cpu are for compiled engines"),
        ({"backend": "tensorrt-rtx", "max_images": 1, "max_steps": 0}, "max_steps must be"),
    ],
)
def test_recipes_of_compiled_sets(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        alpha_recipe(tmp_path / "out", **options)


def test_one_command_from_the_checkpoint(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs go beside the engines; what cannot be compiled is refused before they are
    built."""
    compiles = {"backend": "tensorrt-rtx", "max_images": 2}
    recipe = alpha_recipe(tmp_path / "rtx", precision="fp8", target=("sm86",), **compiles)
    with pytest.raises(CompileError, match="has no fp8"):
        build.build(recipe)
    recipe = alpha_recipe(tmp_path / "rtx", target=("sm89",), on_cpu=("t5",), **compiles)
    with pytest.raises(CompileError, match="on_cpu names 't5', which is no engine"):
        build.build(recipe)
    assert list(tmp_path.iterdir()) == []
    recipe = alpha_recipe(tmp_path / "rtx", target=("sm89",), on_cpu=("t5_text",), **compiles)
    whole, asked = build.build, []

    def graphs(inner: Recipe, progress: Any = None, memory_budget: Any = None) -> Path:
        asked.append(inner)
        return alpha_set

    monkeypatch.setattr(build, "build", graphs)
    monkeypatch.setattr("export.compile.compiled_set.compile_set", lambda *a, **k: (a, k))
    places, options = whole(recipe)
    assert places == (alpha_set, tmp_path / "rtx")
    assert (options["targets"], options["on_cpu"]) == (("sm89",), ("t5_text",))
    assert asked[0].on_cpu == ()
    assert (asked[0].backend, asked[0].output) == ("onnxruntime", str(tmp_path / "rtx-onnx"))
    assert asked[0].max_images is None  # the graphs take any number
    assert options["max_images"] == 2


def test_graphs_alone_for_another_machine(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(build, "build", lambda recipe, *a: (asked.append(recipe), alpha_set)[1])
    monkeypatch.setattr(shipped, "CHECKOUT", tmp_path)
    for name in ("Qwen2.5-VL-7B-Instruct", "Bifrost-1", "FLUX.1-dev"):
        (tmp_path / "engines" / "checkpoints" / name).mkdir(parents=True)
    assert build.main(["jetson-agx-thor-fp8", "--onnx-only"]) == 0
    assert (asked[0].backend, asked[0].target) == ("onnxruntime", ())
    assert Path(asked[0].output).name == "jetson-agx-thor-fp8-onnx"
    assert asked[0].precision == "fp8"


@pytest.mark.parametrize(
    "path",
    RECIPES,
    ids=lambda p: p.stem,
)
def test_the_recipes_ask_for_what_their_targets_have(path: Path) -> None:
    recipe = recipes.read(path, {})
    if recipe.target:
        formats = ["fp32", recipe.fallback, recipe.precision]
        assert capabilities.check(recipe.backend, recipe.target, formats)
        formats += [*recipe.stages.values(), *recipe.layers.values()]
        assert recipe.backend != "tensorrt-rtx" or not {"int8", "fp16"} <= {*formats}
        assert Path(recipe.output).name == path.stem


def test_a_device_compiles_without_torch() -> None:
    """A Jetson has a few packages: those of the extra `compile`, and its own TensorRT."""
    code = "import sys, export.compile.compiled_set, export.compile.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "onnxruntime", "onnxscript"} & {*done.stdout.split()}


@pytest.mark.parametrize("compute", ["fp16", "bf16"])
def test_every_engine_compiles_in_16_bit_for_every_generation(
    alpha_set: Path, tmp_path: Path, compute: str
) -> None:
    output = compile_set(
        alpha_set,
        tmp_path / "rtx",
        targets=("sm86", "sm89", "sm120"),
        max_images=4,
        compute=compute,
        measure=True,
    )
    report = json.loads((output / "report.json").read_text())["compiled"]["engines"]
    facts = manifest.read(output)
    assert facts.selftest is not None  # what `verify` then allows four times of
    assert 45 < facts.selftest.psnr < 100
    assert len(facts.engines) == len(DEFINITIONS)
    for spec in facts.engines:
        assert spec.precision.compute == {"fp16": "float16", "bf16": "bfloat16"}[compute]
        measured = report[spec.name]["sixteen_bit"]
        assert (
            0 < measured["max_error"] <= measured["tolerance"] * max(1.0, measured["largest_value"])
        )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8", "nvfp4", "int4"])
def test_every_set_compiles_for_every_generation(
    alpha_set: Path, tmp_path: Path, precision: str
) -> None:
    source = alpha_set
    if precision != "fp32":
        source = build.build(alpha_recipe(tmp_path / "source", precision=precision))
    targets = {"fp8": ("sm89", "sm120"), "nvfp4": ("sm120",)}.get(
        precision, ("sm86", "sm89", "sm120")
    )
    output = compile_set(source, tmp_path / "rtx", targets=targets, max_images=4)
    facts = manifest.read(output)
    assert len(facts.engines) == len(DEFINITIONS)
    computes = {"int8": "int8", "fp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn"}
    expected = {"fp32": "float32", "fp16": "float16"}.get(precision, "bfloat16")
    assert facts.engine("denoise").precision.compute == computes.get(precision, expected)
