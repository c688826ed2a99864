"""docs/guides/add-an-engine.md, followed to the letter: its engine, which nothing else knows, is
built, compared with torch, quantized, planned, compiled and run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bifrost_rt import cache, dims, request
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.onnxruntime import OnnxRuntime
from bifrost_rt.engines import Engines
from bifrost_rt.tokenizers import Tokenizers
from export import parity, torch_pipeline
from export.compile.compiled_set import compile_set
from export.errors import CompileError, ParityError
from export.formats import FORMATS
from export.planning import devices, estimate, work
from export.planning.storage import Storage
from export.stages import Stage, catalog
from tests.conftest import alpha_recipe

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "add-an-engine.md"
WIDTH = 96
Built = tuple[Path, dict[str, Any]]  # the set, and what parity says


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The guide's Python as one module."""
    path = tmp_path_factory.mktemp("guide") / "followed_guide.py"
    parts = re.findall(r"^```python toy\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    assert len(parts) == 4
    path.write_text("\n\n".join(parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, path.stem, module)
        patch.setenv(cache.VARIABLE, str(path.parent / "cache"))
        spec.loader.exec_module(module)
        yield module


def toy(guide: ModuleType, alpha_set: Path) -> Stage:
    facts = manifests.read(alpha_set).model
    torch.manual_seed(0)
    module = guide.Smooth(facts.latent_channels, WIDTH).eval().requires_grad_(False)
    made: Stage = guide.stage(module, facts.num_image_tokens)
    return made


def built(guide: ModuleType, alpha_set: Path, folder: Path, precision: str) -> Built:
    prompts = folder / "prompts.txt"
    prompts.write_text("a red apple\na green bench\n")
    output = folder / precision
    shutil.copytree(alpha_set / "tokenizers", output / "tokenizers")
    recipe = alpha_recipe(
        output, precision=precision, calibration_prompts=str(prompts), calibration_steps=3
    )
    return output, guide.build(recipe, output, manifests.read(alpha_set), toy(guide, alpha_set))


@pytest.fixture(scope="module")
def fp32(guide: ModuleType, alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(guide, alpha_set, tmp_path_factory.mktemp("toy"), "fp32")


@pytest.fixture(scope="module")
def int8(guide: ModuleType, alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built(guide, alpha_set, tmp_path_factory.mktemp("toy"), "int8")


def drawn(guide: ModuleType, folder: Path, backend: Any) -> NDArray[np.float32]:
    manifest = manifests.read(folder)
    checked = request.check(
        manifest, prompt=["a cow"], seed=1, num_images_per_prompt=2, num_inference_steps=5
    )
    engines = Engines(folder, manifest, backend)
    try:
        tokenizers = Tokenizers(folder, manifest.text)
        found: NDArray[np.float32] = guide.generate(engines, tokenizers, manifest, checked).latents
        return found
    finally:
        engines.close()


def test_nothing_else_knows_the_engine(guide: ModuleType) -> None:
    assert guide.DEFINITION.name not in catalog.DEFINITIONS


def test_it_is_built_compared_with_torch_and_run(
    guide: ModuleType, alpha_set: Path, fp32: Built
) -> None:
    folder, report = fp32
    assert report["max_error"] <= report["tolerance"] == guide.DEFINITION.tolerance
    assert report["calls"] == 6  # two outputs of three steps
    exact = drawn(guide, folder, torch_pipeline.Torch({"smooth": toy(guide, alpha_set)}))
    assert np.abs(drawn(guide, folder, OnnxRuntime()) - exact).max() < 1e-5


def test_an_engine_that_differs_from_its_module_is_refused(
    guide: ModuleType, alpha_set: Path, fp32: Built
) -> None:
    folder, _ = fp32
    other = toy(guide, alpha_set)
    other.module.get_parameter("out.bias").add_(0.1)
    manifest, stages = manifests.read(folder), {"smooth": other}
    with pytest.raises(ParityError, match="engine `smooth`: differs from torch"):
        parity.compare(folder, manifest, stages, OnnxRuntime(), generate=guide.generate)


def test_it_is_quantized_but_for_the_layer_that_its_definition_excepts(
    guide: ModuleType, fp32: Built, int8: Built
) -> None:
    folder, report = int8
    assert manifests.read(folder).engine("smooth").precision.layers == {"int8": 2, "bf16": 1}
    assert 0 < report["relative_error"] <= report["tolerance"]
    exact, found = drawn(guide, fp32[0], OnnxRuntime()), drawn(guide, folder, OnnxRuntime())
    assert 0 < np.abs(found - exact).mean() / np.abs(exact).mean() < 0.02


def test_it_is_planned_from_its_module_and_from_its_graph(
    guide: ModuleType, alpha_set: Path, fp32: Built
) -> None:
    folder, _ = fp32
    manifest = manifests.read(folder)
    (of_graph,) = work.of_set(folder, manifest, 5)
    sizes = dims.of_run(text_tokens=manifest.text.mllm.max_length, steps=5)
    of_module = work.of_stage(toy(guide, alpha_set), sizes)
    assert of_graph.calls == of_module.calls == 5  # it carries something from step to step
    tokens, channels = manifest.model.num_image_tokens, manifest.model.latent_channels
    products = 2 * tokens * (channels * WIDTH + WIDTH * WIDTH + WIDTH * channels)
    assert of_graph.flops == of_module.flops == products
    assert of_graph.linear
    assert of_module.linear
    plan = estimate.plan([of_module], devices.find("rtx-4090"), Storage(FORMATS["int8"]))
    assert plan.fits
    assert plan.stages[0].flops == 5 * products


def test_a_set_with_an_engine_that_is_not_known_is_not_compiled(
    fp32: Built, tmp_path: Path
) -> None:
    with pytest.raises(CompileError, match="an engine `smooth`, which this version does not know"):
        compile_set(fp32[0], tmp_path / "engines", targets=("sm89",), max_images=2)
    assert not (tmp_path / "engines").exists()


def compiled(guide: ModuleType, source: Path, output: Path, **options: Any) -> dict[str, Any]:
    pytest.importorskip("tensorrt_rtx")
    folder = compile_set(
        *(source, output),
        targets=("sm89",),
        max_images=2,
        definitions={"smooth": guide.DEFINITION},
        generate=guide.generate,
        **options,
    )
    manifest = manifests.read(folder)
    assert (folder / manifest.engine("smooth").graph).stat().st_size > 0
    assert manifest.dimensions["images"] == manifests.Range(1, 2)
    report = json.loads((folder / "report.json").read_text())
    record: dict[str, Any] = report["compiled"]["engines"]["smooth"]
    return record


def test_it_is_compiled_in_16_bit_but_for_the_layer_that_stays_float32(
    guide: ModuleType, fp32: Built, tmp_path: Path
) -> None:
    record = compiled(guide, fp32[0], tmp_path / "engines", compute="bf16", measure=True)
    assert record["sixteen_bit"]["tolerance"] == guide.DEFINITION.half_tolerance["bfloat16"]
    assert record["sixteen_bit"]["max_error"] > 0
    assert record["products"] == {"bfloat16": 2, "float32": 1}


def test_it_is_compiled_in_int8(guide: ModuleType, int8: Built, tmp_path: Path) -> None:
    record = compiled(guide, int8[0], tmp_path / "engines")
    assert record["products"] == {"int8": 2, "float32": 1}
