"""A set that changes under an open generator: what was opened draws, or the run is refused by name.
Old and new never draw together."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from bifrost_rt import (
    EngineSetError,
    Generator,
    IntegrityError,
    dims,
    manifest,
    memory_plan,
    opened,
)
from bifrost_rt.backends.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from bifrost_rt.manifest import BoundWeight, Compiled, EngineSpec, Manifest, Range
from bifrost_rt.opened import OpenedFiles
from export.engine_set import describe_files

DOC_STRING = b"\x32\x03new"  # of an ONNX model: another file of the same graph

SETTINGS: dict[str, Any] = {
    **{"prompt": "a cow", "seed": 5, "output_type": "np"},
    **{"num_inference_steps": 2, "decoding_steps": 4},
}


def draw(generator: Generator, **changes: Any) -> NDArray[np.uint8]:
    images: NDArray[np.uint8] = generator.run(**{**SETTINGS, **changes}).images
    return images


@pytest.fixture
def folder(alpha_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(alpha_set, tmp_path / "set"))


@pytest.fixture(scope="module")
def other_set(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid set of the same shapes with other weights."""
    other = Path(shutil.copytree(alpha_set, tmp_path_factory.mktemp("other") / "alpha"))
    for path in other.glob("*.data"):
        spoil(path)
    for path in other.glob("*.onnx"):
        path.write_bytes(path.read_bytes() + DOC_STRING)
    facts = dataclasses.replace(manifest.read(alpha_set), files=describe_files(other))
    (other / manifest.FILENAME).write_bytes(facts.dumps())
    return other


def spoil(path: Path) -> None:
    """Change every weight by a few percent, in place; tables of places stay."""
    content = np.fromfile(path, np.uint8)
    graph = onnx.load(path.with_suffix(".onnx"), load_external_data=False).graph
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.external_data:
            at = {entry.key: entry.value for entry in tensor.external_data}
            start = int(at["offset"])
            content[start + 2 : start + int(at["length"]) : 4] ^= 4
    with path.open("r+b") as file:
        file.write(content.tobytes())


def replace(folder: Path, by: Path) -> None:
    """As a deployment does: the new set is complete before it has the name."""
    new = shutil.copytree(by, folder.with_name("new"))
    folder.rename(folder.with_name("old"))
    new.rename(folder)


def half(folder: Path) -> int:
    facts = manifest.read(folder)
    order = dims.drawing(facts.engines)
    needs = memory_plan.needs(
        facts, order, memory_plan.sizes(facts), OnnxRuntime().weights_in_memory
    )
    return sum(need.resident for need in needs) // 2


def test_what_is_in_memory_draws_on_when_the_folder_is_replaced(
    folder: Path, other_set: Path, generator: Generator
) -> None:
    expected = draw(generator)
    with Generator(folder) as whole:
        replace(folder, other_set)
        assert np.array_equal(draw(whole), expected)  # its first run: texts were read before
        shutil.rmtree(folder)
        assert np.array_equal(draw(whole), expected)
    shutil.copytree(other_set, folder)
    with Generator(folder) as new:
        assert not np.array_equal(draw(new), expected)


def test_engines_that_come_back_are_not_those_of_another_set(
    folder: Path, other_set: Path, generator: Generator
) -> None:
    with Generator(folder, memory_budget=half(folder)) as small:
        assert np.array_equal(draw(small), draw(generator))
        replace(folder, other_set)
        for _ in range(2):
            with pytest.raises(EngineSetError, match=r"set/\w+\.onnx: the set changed") as raised:
                draw(small)
            assert "holds something else" in raised.value.message
            assert "open a new Generator" in str(raised.value.hint)
        shutil.rmtree(folder)
        folder.with_name("old").rename(folder)
        assert np.array_equal(draw(small), draw(generator))  # the first one is back


def test_a_set_that_is_replaced_during_a_run(folder: Path, other_set: Path) -> None:
    def swap(g: Any, step: int, timestep: float | None, tensors: Any) -> None:
        if timestep is None and step == 0:
            replace(folder, other_set)

    with (
        Generator(folder, memory_budget=half(folder)) as small,
        pytest.raises(EngineSetError, match="the set changed after it was opened"),
    ):
        draw(small, callback_on_step_end=swap)


def test_a_set_that_is_deleted(folder: Path) -> None:
    with Generator(folder, memory_budget=half(folder)) as small:
        draw(small)
        shutil.rmtree(folder)
        with pytest.raises(EngineSetError, match=r"\.(onnx|data): the set changed .* is missing"):
            draw(small)


def test_weights_that_are_overwritten_while_they_are_in_use(
    folder: Path, generator: Generator
) -> None:
    """A library may have the file mapped: what it computes then is neither set's."""
    original = (folder / "denoise.data").read_bytes()
    with Generator(folder) as whole:
        spoil(folder / "denoise.data")
        with pytest.raises(EngineSetError, match=r"denoise\.data: the set changed after"):
            draw(whole)
        (folder / "denoise.data").write_bytes(original)
        assert np.array_equal(draw(whole), draw(generator))

        def overwrite(g: Any, step: int, timestep: float | None, tensors: Any) -> None:
            if timestep is not None and step == 0:
                spoil(folder / "denoise.data")

        with pytest.raises(EngineSetError, match=r"denoise\.data: the set changed after"):
            draw(whole, callback_on_step_end=overwrite)


def test_files_that_were_only_touched_or_copied_are_the_same_set(
    folder: Path, generator: Generator
) -> None:
    with Generator(folder, memory_budget=half(folder)) as small:
        for path in folder.glob("*.data"):
            os.link(path, path.with_suffix(".link"))
            path.chmod(0o640)
            os.utime(path)
        assert np.array_equal(draw(small), draw(generator))
        replace(folder, folder)
        assert np.array_equal(draw(small), draw(generator))


def test_a_link_to_a_set_is_followed_once(
    alpha_set: Path, other_set: Path, tmp_path: Path, generator: Generator
) -> None:
    current = tmp_path / "current"
    current.symlink_to(alpha_set)
    with Generator(current, memory_budget=half(alpha_set)) as small:
        current.unlink()
        current.symlink_to(other_set)
        assert np.array_equal(draw(small), draw(generator))


def test_another_current_folder_is_no_other_set(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    monkeypatch.chdir(alpha_set.parent)
    with Generator(alpha_set.name, memory_budget=half(alpha_set)) as small:
        monkeypatch.chdir(tmp_path)
        assert np.array_equal(draw(small), draw(generator))


class Swaps(OnnxRuntime):
    """onnxruntime on a machine where somebody else writes while it opens an engine."""

    def __init__(self, victim: Path, other: Path, *, fails: bool) -> None:
        super().__init__()
        self.victim, self.other, self.fails = victim, other, fails

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeEngine:
        if spec.name == "denoise":
            if self.fails:
                self.victim.unlink()
            else:
                shutil.copy(self.other / self.victim.name, self.victim.with_suffix(".new"))
                self.victim.with_suffix(".new").replace(self.victim)
        return super().open(folder, spec, dimensions)


@pytest.mark.parametrize("fails", [False, True], ids=["replaced", "deleted"])
@pytest.mark.parametrize("name", ["denoise.onnx", "denoise.data"])
def test_a_file_that_changes_between_its_check_and_its_library(
    folder: Path, other_set: Path, name: str, fails: bool
) -> None:
    backend = Swaps(folder / name, other_set, fails=fails)
    with pytest.raises(EngineSetError, match=rf"{name}: the set changed after it was opened"):
        Generator(folder, backend=backend)


def test_a_set_that_is_replaced_before_its_files_are_hashed(folder: Path, other_set: Path) -> None:
    facts = manifest.read(folder)
    files = OpenedFiles(folder, facts)
    replace(folder, other_set)
    with pytest.raises(IntegrityError, match="damaged"):
        files.verify(facts)


def test_a_set_that_is_replaced_while_its_files_are_hashed(
    folder: Path, other_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = opened.verify
    spoils = (
        (lambda: shutil.copy(other_set / "t5_text.data", folder), r"t5_text\.data"),
        (lambda: (folder / "t5_text.onnx").unlink(), r"t5_text\.onnx"),
    )
    for change, name in spoils:

        def slowly(*arguments: Any, change: Any = change) -> None:
            hashed(*arguments)
            change()

        monkeypatch.setattr(opened, "verify", slowly)
        with pytest.raises(EngineSetError, match=f"{name}: the set changed while it was opened"):
            Generator(folder)
        shutil.rmtree(folder)
        shutil.copytree(other_set, folder)


def test_a_manifest_that_is_replaced_while_files_are_hashed(folder: Path) -> None:
    facts = manifest.read(folder)
    files = OpenedFiles(folder, facts)
    renamed = dataclasses.replace(facts, name="another")
    (folder / manifest.FILENAME).write_bytes(renamed.dumps())
    with pytest.raises(EngineSetError, match=r"manifest\.json: the set changed while"):
        files.verify(facts)


def test_weights_that_are_bound_by_address_are_files_of_their_engine(alpha_set: Path) -> None:
    spec = manifest.read(alpha_set).engine("denoise")
    weight = BoundWeight("w", "float16", (2,), "shared.weights", 0, 4)
    compiled = Compiled("tensorrt-rtx", "1", ("sm89",), (), "0" * 64, (weight,))
    assert opened.files_of(dataclasses.replace(spec, compiled=compiled)) == [
        *("denoise.onnx", "denoise.data", "shared.weights")
    ]


def test_every_file_of_every_engine_is_known(alpha_set: Path) -> None:
    facts: Manifest = manifest.read(alpha_set)
    for spec in facts.engines:
        assert set(opened.files_of(spec)) <= facts.files.keys()
