"""An ONNX set -> a set of compiled engines. The ONNX set is only read, and stays the source."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bifrost_rt import engines, residency
from bifrost_rt import manifest as manifests
from bifrost_rt.backends import gpu
from bifrost_rt.manifest import Compiled, EngineSpec, Manifest
from export.compile import builder as builders
from export.compile import capabilities
from export.compile.builder import Builder
from export.compile.profiles import Sizes, sizes
from export.engine_set import describe_files, written_aside
from export.errors import CompileError

# Most memory while compiling, over the bytes of a graph with its weights: measured on a layer of
# the 7B model at 3.1 in float32 and 5.2 in 16 bit, which the builder unpacks to float32.
PEAK, PEAK_16_BIT = 3.3, 5.5


def compile_set(
    source: Path,
    output: Path,
    *,
    backend: str = "tensorrt-rtx",
    targets: Sequence[str] = (),
    max_images: int | None = None,
    max_steps: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Compile every engine of a set, and return the new set's folder.

    Args:
        source: a set as `python -m export.build` writes it for onnxruntime.
        targets: architectures or cards' names; none means this machine's own GPU.
        max_images, max_steps: see `profiles.sizes`.

    Raises:
        BifrostError: what is refused is refused before the first engine is compiled; nothing is
            left behind.
    """
    say = progress or (lambda message: None)
    builder = builders.find(backend)
    manifest = manifests.read(source)
    if manifest.backend != "onnxruntime":
        raise CompileError(
            f"{source}: was built for {manifest.backend}; engines are compiled from ONNX graphs",
            hint="pass the onnxruntime set that it was compiled from",
        )
    if source.resolve() == output.resolve():
        raise CompileError(f"{output}: would replace the set that it is compiled from")
    dtypes = {d for e in manifest.engines for d in (e.precision.weights, e.precision.compute)}
    architectures = check_targets(builder, targets, sorted(dtypes))
    bounds = sizes(manifest.dimensions, manifest.defaults, max_images, max_steps)
    for spec in manifest.engines:
        _check_memory(spec, manifest)
    say("checking the set's files")
    engines.verify(source, manifest)
    graphs = {name for spec in manifest.engines for name in spec.files}
    with written_aside(output) as folder:
        for name in manifest.files.keys() - graphs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        compiled: list[EngineSpec] = []
        record: dict[str, dict[str, Any]] = {}
        for spec in manifest.engines:
            say(f"compiling {spec.name} for {', '.join(architectures)}")
            start = time.perf_counter()
            compiled.append(_compile(builder, source, folder, spec, bounds, architectures))
            record[spec.name] = {
                "seconds": round(time.perf_counter() - start, 3),
                "bytes": (folder / compiled[-1].graph).stat().st_size,
            }
        _write_report(folder, record)
        new = dataclasses.replace(
            manifest,
            name=output.name,
            backend=backend,
            builder={**manifest.builder, backend: builder.version},
            dimensions=bounds.ranges(),
            engines=tuple(compiled),
            files=describe_files(folder),
        )
        (folder / manifests.FILENAME).write_bytes(new.dumps())
        assert manifests.read(folder) == new
    return output


def check_targets(
    builder: Builder, targets: Sequence[str], dtypes: Sequence[str]
) -> tuple[str, ...]:
    """The architectures to compile for; needs no set, so it can be asked before one is built.

    Raises:
        CompileError: none named and no GPU here, or one that lacks the builder or a dtype.
    """
    here = gpu.find()
    if not targets:
        if isinstance(here, str):
            raise CompileError(
                f"for which GPU? None was named, and {here}",
                hint="name one or several: --target rtx-4090,rtx-5090"
                if builder.ahead_of_time
                else f"{builder.title} compiles on the device itself",
            )
        targets = (here.architecture,)
    found = capabilities.check(builder.name, targets, dtypes)
    if not builder.ahead_of_time and (isinstance(here, str) or found != (here.architecture,)):
        reason = here if isinstance(here, str) else f"this is {here.name} ({here.architecture})"
        raise CompileError(
            f"{builder.title} compiles only for the GPU that it runs on, not for "
            f"{', '.join(found)}: {reason}",
            hint="run this command on the device, or use --backend tensorrt-rtx",
        )
    return found


def _check_memory(spec: EngineSpec, manifest: Manifest) -> None:
    """Refuse what the system would kill the process for."""
    stored = sum(manifest.files[name].size for name in spec.files)
    peak = PEAK_16_BIT if spec.precision.weights in ("float16", "bfloat16") else PEAK
    needed, available = int(peak * stored), residency.available()
    if available is not None and needed > available:
        raise CompileError(
            f"stage `{spec.name}`: compiling needs about {residency.size_text(needed, up=True)} of "
            f"memory, this machine has {residency.size_text(available)} available",
            hint="free memory, or compile on a larger machine: it needs no GPU",
        )


def _compile(
    builder: Builder,
    source: Path,
    folder: Path,
    spec: EngineSpec,
    bounds: Sizes,
    architectures: tuple[str, ...],
) -> EngineSpec:
    graph = source / spec.graph
    engine, flags = builders.compile_graph(builder, graph, spec, bounds, architectures)
    name = f"{spec.name}.engine"
    (folder / name).write_bytes(engine)
    return dataclasses.replace(
        spec,
        graph=name,
        files=(name,),
        # a 16-bit weight behind a Cast is a constant of the type that it is cast to
        precision=dataclasses.replace(spec.precision, weights=spec.precision.compute),
        compiled=Compiled(
            builder=builder.name,
            version=builder.version,
            targets=architectures,
            flags=flags,
            source_sha256=manifests.sha256(graph),
        ),
    )


def _write_report(folder: Path, record: dict[str, dict[str, Any]]) -> None:
    """Beside the figures of the ONNX graphs, which the source's report has."""
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report["compiled"] = {
        "note": "the parity figures are of the ONNX graphs; compiling does not run an engine",
        "engines": record,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
