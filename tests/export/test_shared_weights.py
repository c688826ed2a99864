"""Weights that two engines of a set read are stored once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bifrost_rt import backends, manifest, opened
from bifrost_rt.backends.onnxruntime import OnnxRuntime
from bifrost_rt.errors import IntegrityError
from bifrost_rt.manifest import EngineSpec, TensorSpec
from export import build_plan
from export import build_steps as steps
from export.build_plan import BuildPlan
from export.compile import bound, graphs
from export.engine_set import describe_files
from export.quantize.quantize import quantize
from export.stage_cache import StageCache
from export.stages import Definition, Stage
from tests.conftest import alpha_recipe
from tests.linked_layouts import as_a_hub

WIDTH, ROWS = 128, 3


class Both(torch.nn.Module):
    """A layer of its own behind one that engines share."""

    def __init__(self, common: torch.nn.Linear, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.common, self.own = common, torch.nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.own(self.common(x).relu()),)


def stages() -> dict[str, Stage]:
    torch.manual_seed(0)
    common = torch.nn.Linear(WIDTH, WIDTH)
    return {
        name: Stage(
            Definition(name, tolerance=1e-5),
            Both(common, seed).eval().requires_grad_(False),
            (TensorSpec("x", "float32", (ROWS, WIDTH)),),
            (TensorSpec("y", "float32", (ROWS, 8)),),
        )
        for seed, name in enumerate(("first", "second"), 1)
    }


Write = Callable[..., tuple[BuildPlan, list[str]]]


@pytest.fixture(params=["fp32", "bf16"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Writes a set of both engines into a folder, as a build does."""

    def written(folder: Path, made: dict[str, Stage] | None = None) -> tuple[BuildPlan, list[str]]:
        folder.mkdir(exist_ok=True)
        said: list[str] = []
        recipe = alpha_recipe(folder, precision=request.param)
        checkpoint, model = build_plan.read_checkpoint(recipe)
        cache = StageCache(folder)
        plan = build_plan.draw_up(recipe, checkpoint, model, folder)
        made = made or stages()
        outlines = tuple(stage.outline() for stage in made.values())
        plan = dataclasses.replace(plan, stages=made, engines=outlines)
        layers = quantize(recipe, folder, plan, plan.stages, said.append, None, folder)
        built = steps.write_engines(plan, layers, checkpoint, cache, folder, said.append)
        return built, [line for line in said if "first" in line or "second" in line]

    return written


def computed(folder: Path, spec: EngineSpec, backend: str = "onnxruntime") -> np.ndarray:
    started = backends.load(backend)
    engine = started.open(folder, spec, {})
    x = np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    out = started.empty((ROWS, 8), np.float32)
    engine.bind({"x": started.upload(x)}, {"y": out})()
    engine.close()
    return np.array(started.download(out))


def expected(name: str) -> np.ndarray:
    x = np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    with torch.no_grad():
        return stages()[name].module(torch.from_numpy(x))[0].numpy()


def test_the_second_engine_reads_the_firsts_file(write: Write, tmp_path: Path) -> None:
    built, _ = write(tmp_path / "set")
    first, second = built.engines
    size = (2 if built.recipe.precision == "bf16" else 4) * WIDTH * WIDTH
    assert first.shared == {}
    assert second.shared == {"first.data": size}
    own = (tmp_path / "set" / "second.data").stat().st_size
    assert own < size
    stored = manifest.stored_bytes(built, second)
    assert stored == own + size + (tmp_path / "set" / "second.onnx").stat().st_size
    assert "first.data" in opened.files_of(second)
    for spec in built.engines:
        found, exact = computed(tmp_path / "set", spec), expected(spec.name)
        assert np.abs(found - exact).max() < (1e-5 if built.recipe.precision == "fp32" else 0.02)
    if backends.BACKENDS["openvino"].unavailable() is None:
        assert np.allclose(computed(tmp_path / "set", second, "openvino"), found, atol=1e-5)


def test_links_to_shared_files_are_followed(write: Write, tmp_path: Path) -> None:
    built, _ = write(tmp_path / "set")
    whole = dict(describe_files(tmp_path / "set"))
    hub = as_a_hub(tmp_path / "set", tmp_path / "hub")
    assert whole.keys() >= {"first.data", "second.data"}
    second = built.engine("second")
    assert np.array_equal(computed(hub, second), computed(tmp_path / "set", second))


def test_a_build_that_continues_finds_both(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    built, said = write(folder)
    assert said == ["building first", "building second"]
    before = {path.name: path.read_bytes() for path in folder.glob("*.data")}
    again, said = write(folder)
    assert said == ["first is there already", "second is there already"]
    assert again.engines == built.engines
    (folder / "first.data").write_bytes(b"damaged")
    again, said = write(folder)
    assert said == ["building first", "second is there already"]
    assert {path.name: path.read_bytes() for path in folder.glob("*.data")} == before
    assert np.array_equal(
        computed(folder, again.engine("second")), computed(folder, built.engine("second"))
    )


def test_another_first_engine_makes_another_second(write: Write, tmp_path: Path) -> None:
    """Its file may have another layout: what the second names would be other bytes."""
    folder = tmp_path / "set"
    write(folder)
    whole = stages()
    torch.manual_seed(7)
    whole["first"].module.own = torch.nn.Linear(WIDTH, 8).requires_grad_(False)
    _, said = write(folder, whole)
    assert said == ["building first", "building second"]


def test_a_damaged_shared_file_is_refused(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    built, _ = write(folder)
    files = describe_files(folder)
    (folder / "first.data").write_bytes(bytes(files["first.data"].size))
    with pytest.raises(IntegrityError, match=r"first\.data: damaged"):
        manifest.verify_file(folder, "first.data", files["first.data"])
    assert OnnxRuntime().weights_in_memory(built.engine("second"), 1000) > 1000


def test_bound_weights_are_shared_too(write: Write, tmp_path: Path) -> None:
    folder, known = tmp_path / "set", dict[str, manifest.BoundWeight]()
    built, _ = write(folder)
    found = {}
    for spec in built.engines:
        tensors = bound.bind(graphs.read(folder / spec.graph, spec.name))
        assert tensors or built.recipe.precision == "bf16"  # there too small
        found[spec.name] = bound.store(tensors, tmp_path / f"{spec.name}.weights", known)
    names = [{weight.file for weight in weights} for weights in found.values()]
    if built.recipe.precision == "fp32":
        assert names == [{"first.weights"}] * 2
        assert (tmp_path / "first.weights").stat().st_size == 4 * WIDTH * WIDTH
    assert not (tmp_path / "second.weights").exists()
