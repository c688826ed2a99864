"""A build that is killed at any moment continues, and what it makes is what it would have made."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bifrost_rt import Generator, cache, manifest, opened
from bifrost_rt.errors import BifrostError
from export.build import build
from export.recipe import Recipe
from export.synthesize import synthesize
from export.synthetic.shapes import Flux, Shapes
from tests.patience import until

ROOT = Path(__file__).parents[2]
SMALL = Flux(double_blocks=1, single_blocks=1)
SHAPES = replace(
    Shapes(),
    decoder=replace(Shapes().decoder, num_hidden_layers=1),
    visual_tokens=4,
    transformer=SMALL,
    controlnet=SMALL,
)
KILLS = 20


def recipe(folder: Path, output: Path) -> Recipe:
    parts = {part: str(folder / part) for part in ("mllm", "bifrost", "flux")}
    return Recipe(**parts, output=str(output), precision="bf16", t5_max_length=14)


def start(wanted: Recipe) -> subprocess.Popen[bytes]:
    flags = [
        *("--mllm", wanted.mllm, "--bifrost", wanted.bifrost, "--flux", wanted.flux),
        *("--output", wanted.output, "--precision", wanted.precision, "--t5-max-length", "14"),
    ]
    # without what other builds have traced: a build is over in seconds with it
    environment = {**os.environ, cache.VARIABLE: tempfile.mkdtemp()}
    command = [sys.executable, "-m", "export.build", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def what_loads(output: Path) -> dict[str, str] | None:
    """Hashes of a set's engines, after every check that a user's run makes; None: it does not
    load."""
    try:
        with Generator(output):
            facts = manifest.read(output)
    except BifrostError:
        return None
    names = [name for spec in facts.engines for name in spec.files]
    return {name: facts.files[name].sha256 for name in names}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed") / "checkpoint"
    synthesize(SHAPES, folder)
    return folder


@pytest.mark.slow
def test_killed_at_20_moments(checkpoint: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(recipe(checkpoint, tmp_path / "whole"))
    assert process.wait() == 0
    duration = time.monotonic() - began
    expected = what_loads(tmp_path / "whole")
    assert expected is not None

    output = tmp_path / "set"
    wanted, rng, kept = recipe(checkpoint, output), random.Random(7), 0
    for i in range(KILLS):
        process = start(wanted)
        # late enough to have begun, and anywhere from there to the end and beyond
        time.sleep(rng.uniform(0.2, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        loads = what_loads(output) if output.exists() else None
        assert loads in (None, expected), f"kill {i} left a set that loads and is another"
        kept += bool(list(tmp_path.glob(".set.partial/report.json")))
        print(f"kill {i}: killed {killed}, loads {loads is not None}, engines kept {kept}")
        if loads is not None and rng.random() < 0.5:  # begin anew now and then
            for path in (output, *tmp_path.glob(".set.*")):
                subprocess.run(["rm", "-rf", str(path)], check=True)
    assert start(wanted).wait() == 0
    assert what_loads(output) == expected
    assert kept > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_killed_once(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    process = start(recipe(checkpoint, output))

    def one_engine_is_written() -> list[Path]:
        assert process.poll() is None
        return list(tmp_path.glob(".set.partial/report.json"))

    reports = until(one_engine_is_written)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    first = (reports[0].parent / "mllm_text.data").stat().st_ino
    said: list[str] = []
    build(recipe(checkpoint, output), said.append)
    assert "mllm_text is there already" in said
    assert "building vae_decode" in said
    assert (output / "mllm_text.data").stat().st_ino == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    opened.verify(output, manifest.read(output))

    said.clear()  # the longest prompt concerns the engines that read it
    build(replace(recipe(checkpoint, output), mllm_max_length=60), said.append)
    built = [line.removeprefix("building ") for line in said if line.startswith("building ")]
    assert built == ["mllm_text", "visual_decode"]
