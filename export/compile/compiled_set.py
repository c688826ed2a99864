"""An ONNX set -> a set of compiled engines. The ONNX set is only read, and stays the source."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bifrost_rt import dims, memory_plan, opened, pipeline
from bifrost_rt import manifest as manifests
from bifrost_rt.backends import gpu
from bifrost_rt.backends.tensorrt_log import logger
from bifrost_rt.manifest import BoundWeight, Compiled, Deviation, EngineSpec
from bifrost_rt.serialization import nearest
from export import extras
from export.compile import (
    bound,
    capabilities,
    graphs,
    messages,
    plan_report,
    plan_text,
    quantized,
)
from export.compile import builder as builders
from export.compile.builder import Builder
from export.compile.capabilities import ARCHITECTURES
from export.compile.network import Arithmetic
from export.compile.options import COMPUTE
from export.compile.profiles import Sizes, sizes
from export.compile.rewriting import rewrite
from export.engine_set import atomic_output, describe_files
from export.errors import CompileError
from export.exercise import draw_look_answer
from export.formats import HALF, OLDEST_HALF
from export.stages import Definition
from export.stages.catalog import DEFINITIONS

# Most memory while compiling over the bytes of the graph's weights, and what the library takes
# beside them: benchmarks/results/compile.md.
PEAK, FIXED = 3.3, 1 << 30
# Weights of this many bytes are not compiled into the engine: docs/decisions/0033.
BOUND_FROM = 1 << 30
ON_CPU = "onnxruntime"  # what runs the engines that stay on the CPU
CURRENT = "current"  # the target that is this machine's own GPU


def compile_set(
    source: Path,
    output: Path,
    *,
    backend: str = "tensorrt-rtx",
    targets: Sequence[str] = (),
    max_images: int | None = None,
    max_steps: int | None = None,
    compute: str | None = None,
    weights: str | None = None,
    measure: bool = False,
    progress: Callable[[str], None] | None = None,
    on_cpu: Sequence[str] = (),
    definitions: Mapping[str, Definition] = DEFINITIONS,
    generate: pipeline.Generate = draw_look_answer,
) -> Path:
    """Compile every engine of a set, and return the new set's folder.

    Args:
        source: a set as `python -m export.build` writes it for onnxruntime.
        targets: architectures or cards' names; none means this machine's own GPU, and "current"
            that the library shall compile for that very card, not for its architecture.
        max_images, max_steps: see `profiles.sizes`.
        compute: "fp32", "fp16" or "bf16"; None follows the set's precision.
        weights: "baked" into the engines or "bound" at run time; None bakes those of engines that
            hold less than `BOUND_FROM`. Those of 4 bits are always baked: see `bound`.
        measure: whether to compute the 16-bit graphs here, beside the float32 ones, and to refuse
            what differs by more than the engine's `half_tolerance`; the set keeps how far its
            self-test's image may then be from the builder's. Not for sets with quantized layers.
        on_cpu: engines that stay ONNX graphs and run on the CPU, so that the GPU's memory has room
            for the others. Their inputs and outputs are copied at every call.
        definitions: of the set's engines, by name.
        generate: what runs the engines, to measure them.

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
    for spec in manifest.engines:
        if spec.name not in definitions:
            raise CompileError(
                f"{source}: has an engine `{spec.name}`, which this version does not know",
                hint="compile with the version that built the set, or rebuild it",
            )
    check_on_cpu(on_cpu, [spec.name for spec in manifest.engines])
    elsewhere = [spec for spec in manifest.engines if spec.name in on_cpu]
    given = [spec for spec in manifest.engines if spec.name not in on_cpu]
    _check_apart(source.resolve(), output.resolve())
    # sets of earlier versions may name the type of their tables
    stored = {spec.precision.weights for spec in given} - manifests.INDICES
    architectures = check_targets(builder, targets, sorted(stored))
    types = {spec.name: compute_type(spec, compute, architectures) for spec in given}
    check_targets(builder, architectures, sorted({*types.values(), "float32"}))
    bounds = sizes(manifest.dimensions, manifest.defaults, max_images, max_steps)
    stay = {name for spec in elsewhere for name in (*spec.files, *spec.shared)}
    used = {name for spec in given for name in spec.files} - stay
    with atomic_output(output) as folder:
        say("checking the set's files")
        opened.verify(source, manifest)
        jobs = [
            _prepare(
                *(builder, source, spec, definitions[spec.name], types[spec.name]),
                *(architectures, weights, measure),
            )
            for spec in given
        ]
        errors: dict[str, dict[str, Any]] = {}
        deviation: Deviation | None = None
        if measure:
            with extras.needed("export"):  # torch, which compiling does not need
                from export.compile import error

            say("computing the 16-bit graphs beside the float32 ones")
            errors, deviation = error.measure(source, manifest, types, definitions, generate)
        for name in manifest.files.keys() - used:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        at = memory_plan.sizes(dataclasses.replace(manifest, dimensions=bounds.ranges()))
        compiled = {spec.name: dataclasses.replace(spec, backend=ON_CPU) for spec in elsewhere}
        record: dict[str, dict[str, Any]] = {}
        known: dict[str, BoundWeight] | None = {} if any(s.shared for s in given) else None
        for job in jobs:
            name = job.spec.name
            say(f"compiling {name} for {', '.join(architectures)}")
            start = time.perf_counter()
            spec, arithmetic = job.run(
                *(builder, source, folder, bounds, architectures, known),
                current=CURRENT in targets,
            )
            compiled[name] = spec
            planned = read_plan(folder, spec, at(name), arithmetic)
            record[name] = {
                "seconds": round(time.perf_counter() - start, 3),
                "bytes": (folder / spec.graph).stat().st_size,
                "products": arithmetic.products,
                "weight_bytes": arithmetic.weights,
                "plan": planned,
                **({"sixteen_bit": errors[name]} if name in errors else {}),
            }
        _write_report(folder, record)
        new = dataclasses.replace(
            manifest,
            name=output.name,
            backend=backend,
            builder={**manifest.builder, backend: builder.version},
            dimensions=bounds.ranges(),
            engines=tuple(compiled[spec.name] for spec in manifest.engines),
            files=describe_files(folder),
            selftest=deviation,
        )
        (folder / manifests.FILENAME).write_bytes(new.dumps())
        assert manifests.read(folder) == new
    return output


def _prepare(
    builder: Builder,
    source: Path,
    spec: EngineSpec,
    engine: Definition,
    compute: str,
    architectures: Sequence[str],
    weights: str | None,
    measure: bool,
) -> _Job:
    """One engine to compile.

    Raises:
        CompileError: a target lacks a format of its layers, they overflow in `compute`, or they
            cannot be measured.
    """
    graph = graphs.read(source / spec.graph, spec.name)
    formats = sorted(quantized.formats(graph))
    check_targets(builder, architectures, formats)
    capabilities.check_pair(builder.name, spec.name, formats, compute)
    if measure and formats:
        raise CompileError(
            f"engine `{spec.name}` has {', '.join(formats)} layers: beside them a value rounded "
            "to 16 bit moves others by whole steps, which is no measure of an error",
            hint="leave --measure out; `export.build --quality-budget` holds images to float32",
        )
    return _Job.prepare(graph, spec, engine, compute, weights)


def compute_type(spec: EngineSpec, compute: str | None, architectures: Sequence[str]) -> str:
    """Return what an engine's layers that are not quantized compute in.

    A set in 16 bit says it; beside 8 and 4 bit it is bfloat16, which has float32's range, where
    every target has it.
    """
    asked = compute or spec.precision.requested
    if asked in COMPUTE:
        return COMPUTE[asked]
    everywhere = all(HALF.name in ARCHITECTURES[name].precisions for name in architectures)
    return HALF.dtype if everywhere else OLDEST_HALF.dtype


def check_targets(
    builder: Builder, targets: Sequence[str], dtypes: Sequence[str]
) -> tuple[str, ...]:
    """Return the architectures to compile for; needs no set, so it can be asked before one is
    built.

    Raises:
        CompileError: none named and no GPU here, or one that lacks the builder or a dtype.
    """
    here = gpu.find()
    if CURRENT in targets and len(targets) > 1:
        raise CompileError(
            "the target `current` is this machine's own GPU, and its engine is for no other: it "
            f"cannot be beside {', '.join(t for t in targets if t != CURRENT)}",
            hint="name it alone, or only architectures and cards",
        )
    if not targets or CURRENT in targets:
        if isinstance(here, str):
            named = "the target is this machine's own" if targets else "None was named"
            raise CompileError(
                f"for which GPU? {named}, and {here}",
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


def check_on_cpu(on_cpu: Sequence[str], engines: Sequence[str]) -> None:
    """Check the names of engines that stay on the CPU; needs no set.

    Raises:
        CompileError: one is unknown, or nothing is left to compile.
    """
    for name in on_cpu:
        if name not in engines:
            raise CompileError(
                f"on_cpu names {name!r}, which is no engine{nearest(name, engines)}",
                hint=f"engines are {', '.join(engines)}",
            )
    if set(on_cpu) >= set(engines):
        raise CompileError(
            "on_cpu names every engine: nothing is left to compile",
            hint="run the onnxruntime set as it is",
        )


def _check_apart(source: Path, output: Path) -> None:
    """Return the new set takes the place of `output`, with all that is in it, and must not be in
    the set that it is compiled from either."""
    if source == output:
        raise CompileError(f"{output}: would replace the set that it is compiled from")
    if source.is_relative_to(output) or output.is_relative_to(source):
        raise CompileError(
            f"{output}: lies around or inside of the set that it is compiled from, {source}",
            hint=f"choose a folder beside it, such as --output {source}-compiled",
        )


@dataclasses.dataclass(frozen=True)
class _Job:
    """One engine to compile: its graph as it will be compiled, and the weights that stay out."""

    spec: EngineSpec
    graph: ir.Model
    weights: tuple[bound.Tensor, ...]

    @classmethod
    def prepare(
        cls,
        graph: ir.Model,
        spec: EngineSpec,
        engine: Definition,
        compute: str,
        weights: str | None,
    ) -> _Job:
        """Rewrite the graph.

        Raises:
            CompileError: this machine's memory does not hold what compiling takes.
        """
        rewrite(graph, engine, compute)
        held = graphs.weight_bytes(graph)
        bind = weights == "bound" or (weights is None and held >= BOUND_FROM)
        tensors = tuple(bound.bind(graph)) if bind else ()
        stays = graphs.weight_bytes(graph)
        if not bind or stays >= BOUND_FROM:  # weights of 4 bits stay in any case
            _check_memory(spec.name, stays, can_bind=not bind)
        return cls(spec, graph, tensors)

    def run(
        self,
        builder: Builder,
        source: Path,
        folder: Path,
        bounds: Sizes,
        architectures: tuple[str, ...],
        known: dict[str, BoundWeight] | None,
        *,
        current: bool,
    ) -> tuple[EngineSpec, Arithmetic]:
        """Compile, and write the engine and its weights into `folder`.

        Args:
            known: see `bound.store`.
        """
        spec, names = self.spec, {str(tensor.name) for tensor in self.weights}
        built = builders.compile_graph(
            builder, self.graph, spec, bounds, architectures, names, current=current
        )
        engine = f"{spec.name}.engine"
        (folder / engine).write_bytes(built.engine)
        weights = folder / f"{spec.name}.weights"
        with messages.explained(spec.name, builder.title, logger(builder.module)):
            stored = bound.store(self.weights, weights, known) if self.weights else ()
        precision = dataclasses.replace(
            spec.precision, weights=built.arithmetic.stored, compute=built.arithmetic.compute
        )
        about = Compiled(
            builder=builder.name,
            version=builder.version,
            targets=architectures,
            flags=(
                *built.flags,
                *(("bound_weights",) if stored else ()),
                *(("current_gpu",) if current else ()),
            ),
            source_sha256=manifests.sha256(source / spec.graph),
            weights=stored,
            activation_bytes=built.activation_bytes,
            weight_bytes=built.weight_bytes,
        )
        shared: dict[str, int] = {}
        for weight in (w for w in stored if w.file != weights.name):
            shared[weight.file] = shared.get(weight.file, 0) + weight.size
        made = dataclasses.replace(
            spec,
            graph=engine,
            files=(engine, weights.name) if weights.exists() else (engine,),
            shared=shared,
            precision=precision,
            compiled=about,
        )
        return made, built.arithmetic


def read_plan(
    folder: Path, spec: EngineSpec, sizes: Mapping[str, int], asked: Arithmetic
) -> dict[str, Any]:
    """Return what a compiled engine will do in one call: see `plan_report`.

    Args:
        sizes: a number for every symbol of the engine's inputs and outputs; bytes are counted for
            them.
        asked: what its network computes in.

    Raises:
        CompileError: the plan does something else.
    """
    assert spec.compiled is not None
    weights = [weight.name for weight in spec.compiled.weights]
    plan = plan_text.read(folder / spec.graph)
    if plan is None:
        return plan_report.describe(None)
    if found := plan_report.contradictions(plan, asked, weights):
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise CompileError(
            f"engine `{spec.name}`: the engine's plan contradicts its network: "
            f"{'; '.join(found[:3])}{more}",
            hint="compile for other targets or with another --compute, and please report this",
        )
    doors = (*spec.inputs, *spec.outputs)
    shapes = {tensor.name: dims.shape_at(tensor.shape, sizes) for tensor in doors}
    return plan_report.describe(plan.at(shapes), weights)


def _check_memory(stage: str, weights: int, *, can_bind: bool) -> None:
    """Refuse what the system would kill the process for."""
    needed, available = int(PEAK * weights) + FIXED, memory_plan.available()
    if available is not None and needed > available:
        raise CompileError(
            f"engine `{stage}`: compiling its weights into the engine needs about "
            f"{memory_plan.size_text(needed, up=True)} of memory, this machine has "
            f"{memory_plan.size_text(available)} available",
            hint=("leave them out with --weights bound, " if can_bind else "")
            + "free memory, or compile on a larger machine: it needs no GPU",
        )


def _write_report(folder: Path, record: dict[str, dict[str, Any]]) -> None:
    """Beside the figures of the ONNX graphs, which the source's report has."""
    path = folder / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report["compiled"] = {
        "note": "the parity figures are of the ONNX graphs, those of 16 bit of a simulation on the "
        "CPU; compiling does not run an engine",
        "engines": record,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
