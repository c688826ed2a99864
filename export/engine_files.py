"""One stage -> its engine: the files, and what the manifest says of them."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bifrost_rt import dims
from bifrost_rt.image_processor import Limits
from bifrost_rt.manifest import EngineSpec, Precision
from export import graph, memory, precision
from export.quantize import audit
from export.shared_weights import SharedWeights
from export.stages import Stage


def write(
    stage: Stage,
    folder: Path,
    fallback: str,
    counted: Mapping[str, int],
    largest: Limits | None = None,
    shared: SharedWeights | None = None,
) -> tuple[list[Path], dict[str, Any]]:
    """Trace a stage and write its graph and weights.

    Args:
        fallback: the precision of what is not quantized.
        counted: the sizes for which scratch memory is stated.
        largest: image to look at.
        shared: what earlier engines of the set have stored.

    Returns:
        The files, the graph first; and bytes by type (`weight_bytes`, the most first), memory of
        its arithmetic (`scratch_bytes`, `piece_scratch_bytes`) and `seconds`. Where engines share
        weights, also `stored` as `SharedWeights.add` takes it, and `reads`: other engines' files
        and the bytes of them that it reads.

    Raises:
        ExportError: torch cannot trace it, or ONNX's checker refuses the graph.
    """
    start = time.perf_counter()
    traced = graph.to_graph(stage)
    precision.store(traced, fallback)
    facts: dict[str, Any] = {
        "weight_bytes": precision.weight_bytes(traced),
        "scratch_bytes": memory.scratch_bytes(traced, counted),
        "piece_scratch_bytes": 0,
        "square_bytes": 0,
    }
    if dims.reads_pieces(stage.outline()):
        facts["piece_scratch_bytes"] = memory.scratch_bytes(traced, memory.one_piece())
    if largest is not None and dims.looks(stage.outline()):
        facts["square_bytes"] = memory.square_bytes(traced, largest)
    names = {} if shared is None else shared.names(stage, traced)
    places = {n: shared.place(name) for n, name in names.items()} if shared else {}
    elsewhere = {name: place for name, place in places.items() if place is not None}
    files, stored = graph.save(traced, folder / f"{stage.name}.onnx", elsewhere)
    if names:
        facts["stored"] = {name: stored[n] for n, name in names.items() if n not in elsewhere}
        facts["reads"] = dict(
            sum((Counter({p.file: p.length}) for p in set(elsewhere.values())), Counter())
        )
    facts["seconds"] = round(time.perf_counter() - start, 3)
    return files, facts


def describe(
    stage: Stage, folder: Path, files: Sequence[str], facts: dict[str, Any], asked: str
) -> EngineSpec:
    """Return the engine, with the precision that is read back from its file.

    Args:
        files: names, the graph's first, as `write` has written them.
        facts: as `write` has given them.
        asked: the precision that was asked for.
    """
    layers = audit.read(folder / files[0])
    found = Precision(
        requested=asked,
        weights=next(iter(facts["weight_bytes"])),
        compute=audit.compute(layers),
        layers=audit.formats(layers),
    )
    return dataclasses.replace(
        stage.outline(found),
        graph=files[0],
        files=tuple(files),
        shared=facts.get("reads", {}),
        scratch_bytes=facts["scratch_bytes"],
        square_bytes=facts["square_bytes"],
        piece_scratch_bytes=facts["piece_scratch_bytes"],
    )
