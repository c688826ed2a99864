"""A latency record as a person reads it on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MIB = 1 << 20


def text(record: Mapping[str, Any]) -> str:
    """Machine, request, every candidate, and how many times as long it takes as the first."""
    lines = [_machine(record), _request(record["request"])]
    lines += [_ceilings(name, known) for name, known in record["ceilings"].items()]
    for candidate in record["candidates"]:
        lines += ["", *_contender(candidate)]
    if others := record["ratio_by_contender"]:
        lines.append("")
    lines += [
        f"{name} over {record['candidates'][0]['name']}: "
        f"MLLM {ratio['mllm']:.2f}, whole image {ratio['image']:.2f}"
        for name, ratio in others.items()
    ]
    return "\n".join(lines)


def _contender(row: Mapping[str, Any]) -> Iterator[str]:
    memory = f"{row['peak_memory_bytes'] / MIB:.0f} MiB"
    if "peak_device_memory_bytes" in row:
        memory += f", {row['peak_device_memory_bytes'] / MIB:.0f} MiB on the device"
    yield (
        f"{row['name']}: loads in {row['load_seconds']:.2f} s, first image "
        f"{row['first_image_seconds']:.2f} s, peak memory {memory}, {row['images']} images"
    )
    for name, part in row["seconds"].items():
        yield _part(row, name, part)
    cold = row["cold_start"]
    yield _line(
        "cold start",
        f"{cold['seconds']:.2f} s, {cold['cpu_seconds']:.2f} s of processor"
        + (
            f": {cold['engines_cpu_seconds']:.2f} s in its engines, "
            f"{cold['beyond_engines_cpu_seconds']:.2f} s beyond them"
            if "engines_cpu_seconds" in cold
            else ""
        ),
    )
    if reason := row.get("roofline", {}).get("unknown"):
        yield _line("roofline", f"not known: {reason}")
    if "host_overhead" in row:
        yield _line("host overhead", f"{100 * row['host_overhead']:.2f} % of an image")
    for batch, rate in row.get("images_per_second", {}).items():
        yield _line(f"batch {batch}", f"{rate:.2f} images a second")
    yield from _telemetry(row.get("telemetry", {}))
    if row.get("image_difference"):
        yield _line("first image", f"differs by up to {row['image_difference']} of 255")


def _part(row: Mapping[str, Any], name: str, part: Mapping[str, float]) -> str:
    line = (
        f"p50 {_ms(part['p50'])}  p90 {_ms(part['p90'])}  p99 {_ms(part['p99'])}  "
        f"{_ms(part['min'])} … {_ms(part['max'])}"
    )
    if name in row["steps"]:
        line += f"   {1000 * part['p50'] / row['steps'][name]:.2f} ms a step"
    if bound := row.get("roofline", {}).get(name):
        line += f"   {bound['percent']:.0f} % of the roofline"
    return _line(name, line)


def _telemetry(told: Mapping[str, Any]) -> Iterator[str]:
    watts = told.get("watts", {})
    for rail, joules in told.get("joules_per_image", {}).items():
        yield _line("energy", f"{rail} {joules:.3g} J an image at {watts[rail]:.3g} W")
    for name, value in told.items():
        if isinstance(value, Mapping) and "mean" in value:
            yield _line(name, f"{value['min']:.0f} … {value['max']:.0f}, mean {value['mean']:.0f}")
        elif not isinstance(value, Mapping):
            yield _line(name, f"{value:.0f}")
    for name, share in told.get("limited_by", {}).items():
        yield _line("clocks held by", f"{name}, {100 * share:.0f} % of the time")


def _line(name: str, said: str) -> str:
    return f"  {name:15} {said}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:9.2f} ms"


def _machine(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    cpu = machine["cpu"]
    parts = [f"{cpu['name']}, {cpu['cores']} cores"]
    parts += [machine["gpu"]["name"]] if "gpu" in machine else []
    parts += [machine["model"]] if "model" in machine else []
    if heat := record.get("temperature_c"):
        parts.append(f"{heat['before']:.0f} °C before, {heat['after']:.0f} °C after")
    return ", ".join(parts)


def _request(request: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in request.items())


def _ceilings(name: str, known: Mapping[str, Any]) -> str:
    figures = [
        f"{figure} {value['value']:.3g} {'GB/s' if figure == 'bandwidth' else 'TFLOP/s'}"
        for figure, value in known.items()
        if isinstance(value, Mapping)
    ]
    return f"roofline of the {name} ({known['device']}): {', '.join(figures)}"
