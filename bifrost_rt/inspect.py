"""A manifest as a person wants to read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bifrost_rt import formats
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.choice import choose
from bifrost_rt.errors import EngineSetError
from bifrost_rt.files import read_text
from bifrost_rt.manifest import EngineSpec, Manifest, Range, TensorSpec

REPORT = "report.json"


def describe(manifest: Manifest) -> str:
    """Several lines of text: the model, the defaults, the engines and their tensors."""
    m, d = manifest.model, manifest.defaults
    chosen = choose(manifest)
    total = sum(file.size for file in manifest.files.values())
    lines = [
        f"{manifest.name}: Bifrost-1 engine set for {manifest.backend}, {_bytes(total)}",
        "",
        f"  image    {m.image_width}x{m.image_height} px, {m.num_image_tokens} image tokens",
        f"  latents    {m.num_visual_tokens} visual tokens of width {m.hidden_size}",
        f"  prompt     up to {manifest.text.mllm.max_length} tokens (MLLM), "
        f"{manifest.text.t5.max_length} (T5), {manifest.text.clip.max_length} (CLIP)",
        f"  defaults   {d.decoding_steps} decoding steps, {d.num_inference_steps} denoising steps, "
        f"cfg {d.cfg_weight:g}, ControlNet {d.controlnet_conditioning_scale:g}, "
        + (f"guidance {d.guidance_scale:g}" if m.guidance_embeds else "no guidance embedding"),
        "  built by   " + ", ".join(f"{k} {v}" for k, v in manifest.builder.items()),
        *_compiled(manifest),
        *(
            f"  LoRA       {lora.file}, times {lora.scale:g}, sha256 {lora.sha256[:12]}"
            for lora in manifest.loras
        ),
        f"  runs on    {chosen.name}: {chosen.reason}",
        *(f"             {e.name} on {e.backend}" for e in manifest.engines if e.backend),
        *([f"  simulated  {note}"] if (note := simulation(manifest)) else []),
        "  sizes      " + ", ".join(f"{n} {_range(r)}" for n, r in manifest.dimensions.items()),
        "",
    ]
    rows = [("engine", "size", "asked", "weights", "computes in")]
    rows += [
        (
            e.name,
            _bytes(_size(manifest, e)),
            e.precision.requested,
            e.precision.weights,
            e.precision.compute,
        )
        for e in manifest.engines
    ]
    lines += _table(rows)
    for engine in manifest.engines:
        lines += ["", engine.name]
        for arrow, tensors in (("<-", engine.inputs), ("->", engine.outputs)):
            lines += [f"  {arrow} {text}" for text in _tensors(tensors)]
    return "\n".join(lines)


def simulation(manifest: Manifest) -> str | None:
    """Return what a set's number formats mean for its speed where its graphs run as they are; None
    where they are computed in."""
    simulated = formats.simulated(fmt for spec in manifest.engines for fmt in spec.precision.layers)
    if manifest.backend != "onnxruntime" or not simulated:
        return None
    return (
        f"{' and '.join(simulated)} {'are' if len(simulated) > 1 else 'is'} simulated here: slower "
        "than float32; `python -m export.compile` makes engines for GPUs that have it"
    )


def precision(folder: Path, manifest: Manifest) -> str:
    """Return what every layer is, as read back from the built files, and why where it is an
    exception.

    Raises:
        EngineSetError: the set's report does not say.
        IntegrityError: the report was changed after the build.
    """
    try:
        report = _report(folder, manifest)
        found = {name: engine["precision"] for name, engine in report["engines"].items()}
        decided = report["layers"]
    except (OSError, ValueError, KeyError, TypeError):
        raise EngineSetError(
            f"{folder / REPORT}: does not say what the layers are",
            hint=manifests.REBUILD,
        ) from None
    lines = [f"{manifest.name}: precision of every layer with a weight, read back from its files"]
    if manifest.calibration is not None:
        c = manifest.calibration
        lines.append(f"calibrated on {c.prompts} prompts, ranges by {c.scales}: {c.file}")
    for name, engine in found.items():
        lines += ["", f"{name}{_kernels(engine['kernels'])}"]
        groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for path, layer in engine["layers"].items():
            reason = decided.get(f"{name}:{path}", {}).get("reason", "")
            groups.setdefault((layer["format"], reason), []).append((path, layer["bytes"]))
        rows = []
        for (fmt, reason), layers in groups.items():
            size = sum(size for _, size in layers)
            rows.append((fmt, str(len(layers)), _bytes(size), _alike([p for p, _ in layers])))
            if reason:
                rows.append(("", "", "", f"({reason})"))
        lines += _table(rows)
        if engine["unused"]:
            lines.append(f"  nothing reads {', '.join(engine['unused'])}")
    return "\n".join(lines)


def plan(folder: Path, manifest: Manifest) -> str:
    """Return what every compiled engine does in one call, as read from the plan inside it.

    Raises:
        EngineSetError: the set's report does not say.
        IntegrityError: the report was changed after the build.
    """
    try:
        found = _report(folder, manifest)["compiled"]["engines"]
        compiled = [spec.name for spec in manifest.engines if spec.backend is None]
        plans = {name: found[name]["plan"] for name in compiled}
    except (OSError, ValueError, KeyError, TypeError):
        raise EngineSetError(
            f"{folder / REPORT}: does not say what the engines' plans are",
            hint="sets of `python -m export.compile` have plans; compile older ones again",
        ) from None
    lines = [f"{manifest.name}: one call of every engine, read from the plan inside it"]
    for name, said in plans.items():
        lines.append("")
        if said["plan"] != "read":
            lines.append(f"{name}: unknown: the engine holds no plan that can be read")
            continue
        lines.append(
            f"{name}: {said['kernels']} kernels, {_figure(said['bytes'], 1e6, 'MB')}, "
            f"{_figure(said['operations'], 1e9, 'GFLOP')}"
        )
        rows = [(f"{count} products", kind) for kind, count in said["products"].items()]
        attention = [f"{n} {how}" for how, n in said["attention"].items() if n]
        rows.append(("attention", ", ".join(attention) or "none"))
        capturable = {True: "yes", False: "no"}.get(said["capturable"], "unknown")
        rows.append(("CUDA graph", capturable))
        rows.append(("auxiliary streams", str(said["auxiliary_streams"])))
        moved = [f"{n} x {kernel}" for kernel, n in said["weights_moved"].items()]
        rows.append(("weights moved", ", ".join(moved) or "none"))
        lines += _table(rows)
    return "\n".join(lines)


def _report(folder: Path, manifest: Manifest) -> Any:
    """Return what the build said of itself.

    Raises:
        IntegrityError: it was changed after the build.
        OSError, ValueError: it cannot be read, or is no JSON.
    """
    if REPORT in manifest.files:
        manifests.verify_file(folder, REPORT, manifest.files[REPORT])
    return json.loads(read_text(folder / REPORT))


def _figure(number: int | str, scale: float, unit: str) -> str:
    return f"unknown {unit}" if isinstance(number, str) else f"{number / scale:.4g} {unit}"


def _kernels(counts: Mapping[str, int] | None) -> str:
    """Return what onnxruntime computes quantized layers with, where it has kernels for them."""
    of = {k: n for k, n in (counts or {}).items() if k in ("MatMulIntegerToFloat", "MatMulNBits")}
    return "".join(f", {n} x {kernel} in onnxruntime" for kernel, n in of.items())


def _alike(paths: Sequence[str]) -> str:
    """Names that differ only in their numbers, as one with stars; one or two as they are."""
    if len(paths) <= 2:
        return ", ".join(paths)
    starred = list(dict.fromkeys(re.sub(r"\d+", "*", path) for path in paths))
    shown = ", ".join(starred[:4])
    return shown if len(starred) <= 4 else f"{shown} … {len(starred) - 4} more kinds"


def _compiled(manifest: Manifest) -> list[str]:
    """One line per way in which engines were compiled; none where all are ONNX graphs."""
    ways = dict.fromkeys(e.compiled for e in manifest.engines if e.compiled is not None)
    said = (f"{c.builder} {c.version} for {', '.join(c.targets)}" for c in ways)
    return [f"  compiled   {way}" for way in dict.fromkeys(said)]


def _tensors(tensors: Sequence[TensorSpec]) -> list[str]:
    """One line per tensor; a numbered family (the K/V cache) is one line."""
    families: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        stem, _, number = tensor.name.rpartition(".")
        key = (stem, str(tensor)) if number.isdigit() else (tensor.name, str(tensor))
        families.setdefault(key, []).append(tensor.name)
    return [
        f"{names[0] if len(names) == 1 else f'{stem}.0 … {names[-1]}'}: {spec}"
        for (stem, spec), names in families.items()
    ]


def _size(manifest: Manifest, engine: EngineSpec) -> int:
    return manifests.stored_bytes(manifest, engine)


def _range(bounds: Range) -> str:
    return f"{bounds.min}…{'any' if bounds.max is None else bounds.max}"


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [("  " + "  ".join(map(str.ljust, row, widths))).rstrip() for row in rows]
