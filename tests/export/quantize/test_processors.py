"""int8 layers on processors that differ: exact on every kind, or refused.

Older kinds are played. OpenVINO heeds a setting of the library below it, so it is one process for
each value; onnxruntime is run by qemu, where that is installed. What has VNNI cannot be played.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bifrost_rt import backends
from bifrost_rt import processor as processors
from bifrost_rt.backends.onnxruntime import OnnxRuntime, session_options
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Range
from bifrost_rt.processor import Processor
from tests.export.quantize.test_graphs import WIDTH, built, exact
from tests.processors import AVX2, AVX512_VNNI, KINDS, WITHOUT_VNNI, named

EXACT, WRONG = 2e-5, 1e-2  # of the largest value: what a layer may differ by, and saturated sums do
QEMU = shutil.which("qemu-x86_64")
ROOT = Path(__file__).parents[3]
UNTOLD = Processor("of another make")  # which gets no precise mode and is refused nothing
PRECISE = "session.x64quantprecision"


class Layer:
    """Two layers as a build writes them, the first in a format; what torch computes."""

    def __init__(self, folder: Path, fmt: str = "int8") -> None:
        self.folder = folder
        stage, spec = built(folder, fmt)
        self.spec = dataclasses.replace(
            spec, precision=dataclasses.replace(spec.precision, weights=fmt)
        )
        torch.manual_seed(1)
        x = torch.randn(2, 7, WIDTH) * 1.5
        self.x, self.wanted = x.numpy(), exact(stage, x).numpy()

    def errors(
        self, backend: str, *taken_for: Processor, play: str = "", **environment: str
    ) -> list[float]:
        """Of another process, over the largest value, for each processor that the backend takes the
        one below for.

        Args:
            play: the model that qemu plays.
        """
        asked = (backend, taken_for, self.spec, self.x)
        (self.folder / "asked.pickle").write_bytes(pickle.dumps(asked))
        done = subprocess.run(
            [
                *((str(QEMU), "-cpu", play) if play else ()),
                *(sys.executable, "-m", "tests.export.quantize.one_layer", str(self.folder)),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        assert done.returncode == 0, done.stderr
        return [self._error(found) for found in np.load(self.folder / "found.npy")]

    def here(self, taken_for: Processor) -> float:
        """The same of onnxruntime in this process."""
        found = np.empty_like(self.wanted)
        engine = OnnxRuntime(taken_for).open(self.folder, self.spec, {"images": Range(1, None)})
        engine.bind({"x": self.x}, {"y": found})()
        engine.close()
        return self._error(found)

    def _error(self, found: NDArray[np.float32]) -> float:
        return float(np.abs(found - self.wanted).max() / np.abs(self.wanted).max())


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    return Layer(tmp_path_factory.mktemp("layer"))


@named(*KINDS)
def test_the_precise_mode_is_for_int8_where_sums_saturate(
    layer: Layer, processor: Processor
) -> None:
    def precise(fmt: str) -> bool:
        precision = dataclasses.replace(layer.spec.precision, layers={fmt: 1})
        spec = dataclasses.replace(layer.spec, precision=precision)
        options, _ = session_options(spec, processor)
        try:
            return bool(options.get_session_config_entry(PRECISE) == "1")
        except RuntimeError:  # not set
            return False

    assert precise("int8") == processor.saturates
    assert not precise("fp32")


def test_the_precise_mode_is_exact_wherever_it_is_set(layer: Layer) -> None:
    assert layer.here(AVX2) < EXACT


def test_this_processor_is_taken_for_what_it_is(layer: Layer) -> None:
    """Without the precise mode, onnxruntime is wrong here if and only if we say so."""
    here = processors.here()
    if not here.known:
        pytest.skip("this system does not tell what the processor has")
    found = layer.here(UNTOLD)
    assert (found > WRONG) == here.saturates
    assert (found < EXACT) != here.saturates


@named(*WITHOUT_VNNI)
def test_the_memory_plan_knows_what_the_precise_mode_takes(
    layer: Layer, processor: Processor
) -> None:
    plain = OnnxRuntime(UNTOLD).weights_in_memory(layer.spec, 1 << 30)
    assert OnnxRuntime(processor).weights_in_memory(layer.spec, 1 << 30) > 1.8 * plain


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")
def test_onnxruntime_is_exact_on_an_older_processor(layer: Layer) -> None:
    """Which is one: taken for a processor with VNNI, it computes wrong values without a word."""
    precise, plain = layer.errors("onnxruntime", AVX2, AVX512_VNNI, play="Haswell")
    assert precise < EXACT
    assert plain > WRONG


needs_openvino = pytest.mark.skipif(
    backends.BACKENDS["openvino"].unavailable() is not None, reason="openvino is not installed"
)


@needs_openvino
@pytest.mark.parametrize(
    ("backend", "value", "rounded"),
    [
        *(("openvino", value, EXACT) for value in ("DEFAULT", "AVX2", "AVX2_VNNI")),
        *(("openvino", value, EXACT) for value in ("AVX512_CORE", "AVX512_CORE_VNNI")),
        ("openvino-bf16", "DEFAULT", 2e-2),  # the second layer is not in int8
    ],
)
def test_openvino_is_wrong_where_it_is_refused_and_nowhere_else(
    layer: Layer, backend: str, value: str, rounded: float
) -> None:
    """Played by a setting of oneDNN; what this processor has decides what is left of it."""
    setting = {"ONEDNN_MAX_CPU_ISA": value}
    limited = processors.here().under_onednn(setting)
    if not limited.known:
        pytest.skip("this system does not tell what the processor has")
    [found] = layer.errors(backend, UNTOLD, **setting)
    assert (found > max(WRONG, 2 * rounded)) == limited.saturates
    assert (found < rounded) != limited.saturates


@needs_openvino
@named(*WITHOUT_VNNI)
@pytest.mark.parametrize("name", ["OpenVino", "OpenVinoBf16"])
def test_openvino_refuses_int8_where_it_would_be_wrong(
    layer: Layer, name: str, processor: Processor
) -> None:
    backend = getattr(importlib.import_module("bifrost_rt.backends.openvino"), name)(processor)
    with pytest.raises(BackendError, match="two.onnx: OpenVINO would compute wrong int8") as raised:
        backend.open(layer.folder, layer.spec, {"images": Range(1, None)})
    assert raised.value.hint is not None
    assert "backend='onnxruntime'" in raised.value.hint


@needs_openvino
def test_weights_of_four_bits_run_on_openvino_on_every_kind(tmp_path: Path) -> None:
    [found] = Layer(tmp_path, "int4").errors("openvino", AVX2, ONEDNN_MAX_CPU_ISA="AVX2")
    assert found < EXACT
