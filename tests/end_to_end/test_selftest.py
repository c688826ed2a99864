"""The self-test's image: what rounding does to it passes, another image is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bifrost_rt import Generator, manifest, selftest
from bifrost_rt.errors import EngineSetError
from bifrost_rt.manifest import Deviation
from export.compile import error
from export.engine_set import describe_files
from export.stages.catalog import DEFINITIONS

TYPES = [dtype for dtype in selftest.BOUNDS if dtype != "float32"]


def claimed(source: Path, folder: Path, compute: str, measured: Deviation | None = None) -> Path:
    """A copy of a set whose engines are said to compute in `compute`."""
    shutil.copytree(source, folder)
    facts = manifest.read(folder)
    engines = tuple(
        dataclasses.replace(spec, precision=dataclasses.replace(spec.precision, compute=compute))
        for spec in facts.engines
    )
    facts = dataclasses.replace(facts, engines=engines, selftest=measured)
    (folder / manifest.FILENAME).write_bytes(facts.dumps())
    return folder


def drawing(image: NDArray[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "draw", lambda generator: image.astype(np.uint8))


@pytest.mark.parametrize("compute", ["float16", "bfloat16"])
def test_engines_in_16_bit_pass(alpha_set: Path, tmp_path: Path, compute: str) -> None:
    """As they would be compiled, simulated on a CPU."""
    facts = manifest.read(alpha_set)
    shutil.copytree(alpha_set / "tokenizers", tmp_path / "tokenizers")
    shutil.copyfile(alpha_set / selftest.IMAGE, tmp_path / selftest.IMAGE)
    engines = []
    for spec in facts.engines:
        error.simulated(alpha_set, tmp_path, spec, DEFINITIONS[spec.name], compute)
        precision = dataclasses.replace(spec.precision, compute=compute)
        files = (spec.graph, f"{spec.name}.simulated")
        engines.append(dataclasses.replace(spec, files=files, precision=precision))
    facts = dataclasses.replace(facts, engines=tuple(engines), files=describe_files(tmp_path))
    (tmp_path / manifest.FILENAME).write_bytes(facts.dumps())
    with Generator(tmp_path) as generator:
        outcome = selftest.check(generator)
    assert outcome.found.psnr < 80  # it was rounded
    assert f"the bound for {compute}" in str(outcome)


@pytest.mark.parametrize("compute", TYPES)
def test_another_image_is_refused_in_every_precision(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: str
) -> None:
    with Generator(claimed(alpha_set, tmp_path / "set", compute)) as generator:
        assert selftest.check(generator).largest <= 2
        other = {**selftest.REQUEST, "seed": 1}
        wanted = selftest.expected(generator)
        pixels = np.random.default_rng(0).permutation(wanted.reshape(-1, 3))
        wrong = {
            "seed": generator.run(**other, output_type="np").images[0],
            "shuffled": pixels.reshape(wanted.shape),
            "mirrored": wanted[:, ::-1],
            "grey": np.full_like(wanted, 128),
        }
        for image in wrong.values():
            drawing(image, monkeypatch)
            with pytest.raises(
                EngineSetError, match=r"differs from selftest\.png by .* dB"
            ) as told:
                selftest.check(generator)
            assert f"the bound for {compute}" in told.value.message


def test_float32_is_held_to_two_levels(alpha_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator(alpha_set) as generator:
        wanted = selftest.expected(generator).astype(int)
        drawing(np.abs(wanted - 2), monkeypatch)
        assert selftest.check(generator).largest == 2
        wanted[0, 0] = (wanted[0, 0] + 9) % 256  # one pixel, and 70 dB
        drawing(wanted, monkeypatch)
        with pytest.raises(EngineSetError, match=r"by 9 of 255 \(.* allowed 2\)"):
            selftest.check(generator)


def test_what_was_simulated_for_the_set_counts_more_than_the_table(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Deviation(62.0, 0.02)
    folder = claimed(alpha_set, tmp_path / "set", "bfloat16", measured)
    assert manifest.read(folder).selftest == measured
    with Generator(folder) as generator:
        bound, why = selftest.allowed(generator.manifest)
        assert bound.psnr == pytest.approx(62 - 12.04, abs=0.01)
        assert bound.mean == pytest.approx(0.08)
        assert "simulated when the set was compiled" in why
        noisy = selftest.expected(generator).astype(int)
        flat = noisy.reshape(-1)
        flat[::60] = np.where(flat[::60] > 128, flat[::60] - 8, flat[::60] + 8)
        found = selftest.deviation(noisy.astype(np.uint8), selftest.expected(generator))
        assert found.psnr > selftest.BOUNDS["bfloat16"].psnr  # which would let it pass
        drawing(noisy, monkeypatch)
        with pytest.raises(EngineSetError, match=r"4 times what was simulated"):
            selftest.check(generator)


def test_a_set_without_the_figure_has_the_bytes_that_it_had(alpha_set: Path) -> None:
    assert b'"selftest":' not in (alpha_set / manifest.FILENAME).read_bytes()
