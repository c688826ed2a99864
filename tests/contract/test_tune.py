"""`bifrost-rt tune`: what was measured decides, on this machine and for this set alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bifrost_rt import BackendError, Generator, backends, cache, manifest
from bifrost_rt.backends import measured
from bifrost_rt.backends.choice import candidates, choose
from bifrost_rt.cli import main
from bifrost_rt.manifest import Manifest


@pytest.fixture
def facts(alpha_set: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Manifest:
    """The set's, with nothing measured yet."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    found = manifest.read(alpha_set)
    if len(candidates(found)) < 2:
        pytest.skip("openvino is not installed")
    return found


def test_every_backend_is_measured_and_the_fastest_is_taken(
    facts: Manifest, alpha_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", str(alpha_set), "--rounds", "1", "--steps", "1"]) == 0
    said = capsys.readouterr().out
    seconds = measured.recall(facts)
    assert seconds is not None
    assert seconds.keys() == {"onnxruntime", "openvino"}
    fastest = min(seconds, key=lambda name: seconds[name])
    assert f"{fastest} from now on" in said
    assert choose(facts).name == fastest
    with Generator(alpha_set) as generator:
        assert generator.backend.name == fastest
        assert "`bifrost-rt tune` found it the fastest here" in generator.backend.reason


@pytest.mark.parametrize("fastest", ["onnxruntime", "openvino"])
def test_what_was_measured_decides(facts: Manifest, fastest: str) -> None:
    before = choose(facts)
    slower = "openvino" if fastest == "onnxruntime" else "onnxruntime"
    assert measured.keep(facts, {fastest: 2.0, slower: 3.0}) is None
    found = choose(facts)
    assert (found.name, f"{slower} took 1.50 times as long" in found.reason) == (fastest, True)
    with cache.switched_off():
        assert choose(facts) == before


def test_another_set_library_or_processor_was_not_measured(
    facts: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = choose(facts)
    measured.keep(facts, {"onnxruntime": 2.0, "openvino": 1.0})
    assert choose(dataclasses.replace(facts, name="another")) == before
    with monkeypatch.context() as patched:
        patched.setattr(measured, "_version", lambda library: "0.0")
        assert choose(facts) == before
    with monkeypatch.context() as patched:
        one: Any = dataclasses.replace(measured.processors.here(), name="another")
        patched.setattr(measured.processors, "here", lambda: one)
        assert choose(facts).reason == choose(facts, one).reason
    assert choose(facts).name == "openvino"


def test_a_backend_that_is_gone_is_not_taken(
    facts: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured.keep(facts, {"onnxruntime": 2.0, "openvino": 1.0})
    gone = dataclasses.replace(backends.BACKENDS["openvino"], library="a_package_that_is_not_there")
    monkeypatch.setitem(backends.BACKENDS, "openvino", gone)
    assert choose(facts).name == "onnxruntime"


def test_one_that_fails_the_self_test_is_left_out(
    facts: Manifest,
    alpha_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from bifrost_rt import selftest

    def fails(generator: Generator) -> None:
        if generator.backend.name == "openvino":
            raise BackendError("draws another image")

    monkeypatch.setattr(selftest, "check", fails)
    assert main(["tune", str(alpha_set), "--rounds", "1", "--steps", "1"]) == 0
    assert "openvino is left out: draws another image" in capsys.readouterr().err
    found = measured.recall(facts)
    assert found is not None
    assert found.keys() == {"onnxruntime"}


def test_a_damaged_record_counts_as_none(facts: Manifest) -> None:
    before = choose(facts)
    measured.keep(facts, {"onnxruntime": 2.0, "openvino": 1.0})
    (path,) = (cache.folder() / measured.KIND).iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert choose(facts) == before


def test_where_nothing_can_be_compared_nothing_is_measured(
    facts: Manifest,
    alpha_set: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = dataclasses.replace(backends.BACKENDS["openvino"], library="a_package_that_is_not_there")
    monkeypatch.setitem(backends.BACKENDS, "openvino", gone)
    assert main(["tune", str(alpha_set)]) == 0
    assert "there is no other to compare it with" in capsys.readouterr().out
    assert measured.recall(facts) is None
    with pytest.raises(SystemExit):
        main(["tune", str(alpha_set), "--rounds", "0"])
