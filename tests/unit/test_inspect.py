"""What a set says of itself: where its number formats are only simulated, it says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bifrost_rt import inspect, manifest
from bifrost_rt.manifest import EngineSpec, Manifest, Precision
from export import build
from tests.unit.test_request import FACTS


def a_set(*formats: str, backend: str = "onnxruntime") -> Manifest:
    """An engine for each format."""
    engines = tuple(
        EngineSpec(f"stage_{fmt}", "", (), (), (), (), Precision(fmt, fmt, "float32", {fmt: 1}))
        for fmt in formats
    )
    return dataclasses.replace(FACTS, format=manifest.FORMAT, backend=backend, engines=engines)


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        (("fp8",), "fp8 is simulated here: slower than float32"),
        (("bf16", "nvfp4"), "nvfp4 is simulated here: slower than float32"),
        (("nvfp4", "fp8", "int8"), "fp8 and nvfp4 are simulated here: slower than float32"),
    ],
)
def test_a_set_that_is_simulated_says_so(formats: tuple[str, ...], said: str) -> None:
    facts = a_set(*formats)
    note = inspect.simulation(facts)
    assert note is not None
    assert note.startswith(said)
    assert f"\n  simulated  {note}\n" in inspect.describe(facts)


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16", "int8", "int4"])
def test_a_set_that_is_computed_as_it_is_says_nothing(fmt: str) -> None:
    assert inspect.simulation(a_set(fmt)) is None
    assert "simulated" not in inspect.describe(a_set(fmt))


def test_a_compiled_set_is_not_simulated() -> None:
    assert inspect.simulation(a_set("fp8", backend="tensorrt-rtx")) is None


def test_the_build_says_it_beside_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where nobody watches: on stderr, while the last line on stdout stays the folder."""
    folders = {"fp8": tmp_path / "default-fp8", "fp32": tmp_path / "default"}
    for fmt, folder in folders.items():
        folder.mkdir()
        (folder / manifest.FILENAME).write_bytes(a_set(fmt).dumps())
    monkeypatch.setattr(build, "build", lambda recipe, *_: folders[recipe.precision])
    assert build.main(["--precision", "fp8"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{folders['fp8']}\n"
    assert captured.err.startswith("fp8 is simulated here: slower than float32")
    assert captured.err.count("\n") == 1
    assert build.main([]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{folders['fp32']}\n", "")
