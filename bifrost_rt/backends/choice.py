"""Which backend a set gets: the one that is named, or the fastest that is installed, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from bifrost_rt import backends, formats
from bifrost_rt import processor as processors
from bifrost_rt.backends import measured
from bifrost_rt.backends.base import Backend
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Manifest
from bifrost_rt.processor import Processor
from bifrost_rt.serialization import nearest


@dataclass(frozen=True)
class Choice:
    """A backend's name and the reason for it, as one phrase."""

    name: str
    reason: str


def choose(manifest: Manifest, processor: Processor | None = None) -> Choice:
    """Return the backend for a set.

    Args:
        processor: None takes this machine's.
    """
    if manifest.backend != "onnxruntime":
        return Choice(manifest.backend, "the set was built for it")
    seconds = measured.recall(manifest) if processor is None else None
    if seconds and (there := [name for name in candidates(manifest) if name in seconds]):
        fastest = min(there, key=lambda name: seconds[name])
        slower = [
            f"{name} took {seconds[name] / seconds[fastest]:.2f} times as long"
            for name in there
            if name != fastest
        ]
        return Choice(fastest, f"`bifrost-rt tune` found it the fastest here: {', '.join(slower)}")
    here = processors.here() if processor is None else processor
    names = {fmt for spec in manifest.engines for fmt in spec.precision.layers}
    if simulated := formats.simulated(names):
        return Choice("onnxruntime", f"the only one that simulates {' and '.join(simulated)}")
    bytewise = formats.multiplying_bytes(names)
    if openvino_refuses(names, here):
        reason = f"the only one that computes {bytewise} exactly on this processor"
        return Choice("onnxruntime", reason)
    order, reason = ("onnxruntime", "openvino"), _reason(names, here)
    if bytewise and here.under_onednn().amx:
        # OpenVINO ran such layers at twice onnxruntime's speed on a matrix unit
        order, reason = order[::-1], f"the faster one for {bytewise} on a processor with AMX"
    missing = backends.BACKENDS[order[0]].unavailable()
    if missing is None:
        return Choice(order[0], reason)
    if backends.BACKENDS[order[1]].unavailable() is None:
        return Choice(order[1], f"{order[0]} would be the choice, but {missing}")
    return Choice(order[0], reason)  # neither is there: opening it says what to do


def candidates(manifest: Manifest) -> tuple[str, ...]:
    """Return the backends that can run a set here exactly as it states, of those that run graphs
    on a CPU; of a compiled set, its own."""
    if manifest.backend != "onnxruntime":
        return (manifest.backend,)
    names = {fmt for spec in manifest.engines for fmt in spec.precision.layers}
    refused = formats.simulated(names) or openvino_refuses(names)
    every = ("onnxruntime",) if refused else ("onnxruntime", "openvino")
    return tuple(name for name in every if backends.BACKENDS[name].unavailable() is None)


def start(manifest: Manifest, asked: str | Backend | None) -> tuple[Choice, Backend]:
    """Start what the engines of a set run on: the set's backend, and those of engines with their
    own.

    Args:
        asked: as `backends.parse` reads it, or a backend that is started. What it names comes
            before what the set names.

    Raises:
        BackendError: a backend is not available here, or an engine is unknown.
    """
    main, named = backends.parse(asked) if isinstance(asked, str) else (None, {})
    engines = [spec.name for spec in manifest.engines]
    for engine in named:
        if engine not in engines:
            raise BackendError(
                f"backend {asked!r}: the set {manifest.name!r} has no engine {engine!r}"
                f"{nearest(engine, engines)}; it has {', '.join(engines)}"
            )
    started = None if asked is None or isinstance(asked, str) else asked
    name = main if started is None else started.name
    choice = choose(manifest) if name is None else Choice(name, "it was asked for")
    own = {spec.name: spec.backend for spec in manifest.engines if spec.backend is not None} | named
    others = [f"{engine} runs on {name}" for engine, name in own.items() if name != choice.name]
    choice = Choice(choice.name, "; ".join([choice.reason, *others]))
    return choice, backends.beside(started or backends.load(choice.name), own)


def _reason(names: Collection[str], here: Processor) -> str:
    """For onnxruntime: what was measured on this kind of processor, and no more.

    Sets were compared on a processor with AVX-512 VNNI and no AMX: equal in float32, which 16-bit
    weights compute in, and onnxruntime a little ahead in 8-bit integers
    (benchmarks/results/latency-cpu.json). It opens faster and takes half of the memory
    (benchmarks/results/residency.md).
    """
    compared = {declared.name for declared in formats.of_layers(names) if declared.compared}
    on_such = "avx512_vnni" in here.features and here.vnni and not here.amx
    if on_such and compared.issuperset(names):
        return "as fast as openvino on a processor with VNNI, in half of the memory"
    return "the default; openvino was not compared with it on this kind of processor"


def openvino_refuses(
    names: Collection[str], processor: Processor | None = None
) -> tuple[str, str] | None:
    """Say why OpenVINO does not run layers of these formats, and what to do; None where it does.

    It refuses to simulate: it rounds a tenth of all values to the other neighbour in E4M3, and has
    no functions of a model.

    Args:
        processor: None takes this machine's.
    """
    if simulated := formats.simulated(names):
        return (
            f"OpenVINO does not simulate {' and '.join(simulated)} as it is defined",
            "run this set with backend='onnxruntime'",
        )
    limited = (processors.here() if processor is None else processor).under_onednn()
    bytewise = formats.multiplying_bytes(names)
    if bytewise and (wrong := processors.saturation(limited)):
        unset = f"unset {limited.limit.partition('=')[0]}, or " if limited.limit else ""
        return (
            f"OpenVINO would compute wrong {bytewise} values on "
            f"{limited.name or 'this processor'}: {wrong}",
            f"{unset}run this set with backend='onnxruntime', which has an exact mode for it",
        )
    return None
