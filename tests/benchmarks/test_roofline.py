"""Percent of the roofline: of the right device, in the right arithmetic, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ceilings, roofline
from benchmarks.candidates import Spec, parse
from benchmarks.ceilings import Ceilings
from bifrost_rt import dims, manifest
from bifrost_rt.manifest import Compiled, EngineSpec
from export.planning import devices, work
from export.planning.devices import Device, Figure

GIB = 1 << 30
ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
CPU = Ceilings(
    Device(
        "cpu",
        "this",
        0,
        {n: Figure(v, "", "") for n, v in {"fp32": 0.1, "bandwidth": 1e-3}.items()},
    ),
    1000,
)
REQUEST = {"prompt": "a red circle", "decoding_steps": 5, "num_inference_steps": 3}


@pytest.mark.parametrize(
    ("title", "memory", "found"),
    [
        ("NVIDIA GeForce RTX 4090", 24564 << 20, "rtx-4090"),
        ("NVIDIA GeForce RTX 4070", 12282 << 20, "rtx-4070-12gb"),
        ("NVIDIA GeForce RTX 4070 SUPER", 12282 << 20, None),
        ("NVIDIA GeForce RTX 3060", 8192 << 20, None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 24 * GIB, None),
        (ORIN_NANO, 7620 << 20, "jetson-orin-nano-8gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 62841 << 20, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 30697 << 20, "jetson-agx-orin-32gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 125772 << 20, "jetson-agx-thor"),
        ("", 0, None),
    ],
)
def test_a_machine_is_the_device_of_its_name(title: str, memory: int, found: str | None) -> None:
    device = devices.of_machine(title, memory)
    assert (device.name if device else None) == found


def test_ceilings_of_a_gpu_are_the_tables() -> None:
    card = {"gpu": {"name": "NVIDIA GeForce RTX 4080", "memory.total": "16376 MiB"}}
    known = ceilings.of_gpu(card)
    assert known is not None
    assert known.record()["fp16"] == {
        **{"value": 97.5, "source": "76 SMs at 2.505 GHz", "certainty": "derived"}
    }
    board = {"model": "NVIDIA Jetson AGX Thor Developer Kit", "memory_bytes": 125772 << 20}
    assert ceilings.of_gpu(board) is not None
    assert ceilings.of_gpu({"gpu": {"name": "NVIDIA H100 PCIe"}}) is None
    assert ceilings.of_gpu({}) is None


def test_ceilings_of_this_cpu_are_measured() -> None:
    first = ceilings.of_cpu()
    assert first.device.figures["fp32"].value > 0
    assert "measured" in first.device.figures["bandwidth"].source
    high = Figure(1e9, "earlier", "measured")
    best = Ceilings(dataclasses.replace(first.device, figures={"fp32": high}), None)
    again = ceilings.of_cpu(best)
    assert again.device.figures["fp32"] == high
    assert 0 < again.device.figures["bandwidth"].value < 1e9


def test_caches_that_cores_share_count_once(tmp_path: Path) -> None:
    for core, shared in enumerate(("0-1", "0-1", "2")):
        for level, size, cores in ((2, "1024K", str(core)), (3, "32768K", shared)):
            index = tmp_path / f"cpu{core}" / "cache" / f"index{level}"
            index.mkdir(parents=True)
            texts = {"level": str(level), "size": size, "shared_cpu_list": cores}
            for name, text in texts.items():
                (index / name).write_text(text + "\n")
    assert ceilings.last_level_cache(tmp_path) == 2 * (32 << 20)
    assert ceilings.last_level_cache(tmp_path / "nowhere") is None


def seconds(facts: manifest.Manifest, each: float) -> dict[str, dict[str, float]]:
    names = (*dims.drawing(facts.engines), "total")
    return {name: {"p50": each} for name in names}


def test_percent_is_least_time_over_measured(alpha_set: Path) -> None:
    facts = manifest.read(alpha_set)
    spec = parse("bare", str(alpha_set))
    found = roofline.of_contender(spec, REQUEST, seconds(facts, 2.0), {"cpu": CPU})
    assert found.keys() == {*dims.drawing(facts.engines), "total"}
    works = {one.engine: one for one in work.of_set(alpha_set, facts, 3, 5)}
    one = works["denoise"]
    assert one.calls == 3
    compute = one.flops / 0.1e12
    memory = (one.weights(None) + one.tensors - 1000) / 1e6
    assert found["denoise"]["least_seconds"] == pytest.approx(3 * max(compute, memory))
    assert found["denoise"]["percent"] == pytest.approx(50 * found["denoise"]["least_seconds"])
    assert found["denoise"]["limit"] == "bandwidth"
    # the prompt is as long as it is, not as it could be
    longest = work.of_set(alpha_set, facts, 3, 5)[0]
    assert longest.engine == "mllm_text"
    longest_bytes = longest.weights(None) + longest.tensors - 1000
    assert found["mllm_text"]["least_seconds"] < longest_bytes / 1e6
    parts = [part["least_seconds"] for name, part in found.items() if name != "total"]
    assert found["total"]["least_seconds"] == pytest.approx(sum(parts))


def test_without_a_ceiling_there_is_no_percent(alpha_set: Path) -> None:
    facts = manifest.read(alpha_set)
    timed = seconds(facts, 1.0)
    plain = parse(str(alpha_set), str(alpha_set))
    assert roofline.of_contender(plain, REQUEST, timed, {}) == {}
    inexact = dataclasses.replace(plain, backend="openvino-bf16")
    assert roofline.of_contender(inexact, REQUEST, timed, {"cpu": CPU}) == {}
    official = parse("reference", str(alpha_set))
    assert roofline.of_contender(official, REQUEST, timed, {"cpu": CPU}) == {}
    assert roofline.ceilings_of([official], {}) == {}


def engine(layers: dict[str, int], compute: str, compiled: bool) -> EngineSpec:
    about = Compiled("tensorrt-rtx", "1", ("sm89",), (), "") if compiled else None
    precision = manifest.Precision("", "", compute, layers)
    return EngineSpec("denoise", "", (), (), (), (), precision, 0, about)


@pytest.mark.parametrize(
    ("layers", "compute", "compiled", "backend", "device", "rate"),
    [
        ({"fp32": 9}, "float32", False, "onnxruntime", "cpu", 0.1),
        ({"bf16": 9}, "float32", False, "openvino", "cpu", 0.1),
        ({"int8": 8, "bf16": 1}, "int8", False, "onnxruntime", "cpu", None),
        ({"fp8": 8}, "float32, fp8 simulated", False, "onnxruntime", "cpu", 0.1),
        ({"fp32": 9}, "float32", True, "tensorrt-rtx", "rtx-4090", 82.6),
        ({"fp32": 9}, "bfloat16", True, "tensorrt-rtx", "rtx-4090", 165.2),
        # most products in 16 bit, some in 8: the faster of both bounds them
        ({"fp8": 2, "bf16": 9}, "bfloat16", True, "tensorrt-rtx", "rtx-4090", 330.3),
        ({"nvfp4": 9}, "float4_e2m1fn", True, "tensorrt-rtx", "rtx-4090", None),
        ({"int4": 9}, "float16", True, "tensorrt-rtx", "rtx-4090", 165.2),
        ({"fp32": 9}, "float32", False, "onnxruntime-cuda", "rtx-4090", 82.6),
    ],
)
def test_the_rate_is_that_of_the_fastest_arithmetic(
    layers: dict[str, int], compute: str, compiled: bool, backend: str, device: str, rate: Any
) -> None:
    known = CPU if device == "cpu" else Ceilings(devices.find(device), 0)
    assert roofline.rate_of(engine(layers, compute, compiled), backend, known) == rate


def test_graphs_of_a_compiled_set_are_found_beside_it(alpha_set: Path, tmp_path: Path) -> None:
    facts = manifest.read(alpha_set)
    assert roofline.graphs_of(alpha_set, facts) == alpha_set
    made = tuple(
        dataclasses.replace(
            spec,
            compiled=Compiled("tensorrt-rtx", "1", ("sm89",), (), facts.files[spec.graph].sha256),
        )
        for spec in facts.engines
    )
    compiled = dataclasses.replace(facts, engines=made)
    folder = tmp_path / "sets" / "compiled"
    folder.mkdir(parents=True)
    (folder.parent / "a file").write_text("")
    spec = Spec("compiled", str(folder), "tensorrt-rtx")
    (folder / manifest.FILENAME).write_bytes(compiled.dumps())
    (folder / "tokenizers").symlink_to(alpha_set / "tokenizers")
    known = {"gpu": Ceilings(devices.find("rtx-4090"), 0)}
    assert roofline.graphs_of(folder, compiled) is None
    unknown = roofline.of_contender(spec, REQUEST, seconds(facts, 1.0), known)
    assert unknown["unknown"].startswith("the ONNX set that it was compiled from")
    (folder.parent / "graphs").symlink_to(alpha_set)
    assert roofline.graphs_of(folder, compiled) == folder.parent / "graphs"
    found = roofline.of_contender(spec, REQUEST, seconds(facts, 1.0), known)
    assert found["total"]["percent"] > 0
