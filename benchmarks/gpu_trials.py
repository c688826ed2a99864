"""What is tried of one engine set on one backend. Each trial opens the set itself and returns
figures; `benchmarks.gpu_check` runs them one after another and keeps the record.

Memory is what the backend of the GPU says that nobody has taken, before and after; other programs
on the card would show in it. Times are this process's own, of one run where no number is given.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import golden
from bifrost_rt import Generator, dims, manifest, memory_plan, selftest
from bifrost_rt.backends import gpu
from bifrost_rt.backends.base import Backend
from bifrost_rt.chat import ChatResult
from bifrost_rt.errors import BifrostError
from bifrost_rt.result import Result

IMAGES = 5  # timed, after one that is not
REQUEST = {**selftest.REQUEST, "output_type": "np"}
LONGER = ("a red circle", "a red circle above a blue square and a green cross")
UPLOAD = 256 << 20
ANSWER = 48  # tokens, at most
KERNELS = 25  # of an image, the longest; their names are shortened
# Longer than any of these takes; a process that hangs at its end is what is looked for.
EXIT_SECONDS = 300
LEAVES = """
import sys
from bifrost_rt import Generator
generator = Generator(sys.argv[1], backend=sys.argv[2], prompt_cache=0)
generator.run("a", seed=0, decoding_steps=2, num_inference_steps=2)
print("drawn", flush=True)
"""


@dataclass(frozen=True)
class Subject:
    """A set, and how its backend is started.

    Attributes:
        start: makes a backend; every trial takes a new one.
        recordings: a folder of golden cases, for a set of their checkpoint.
    """

    folder: Path
    backend: str
    start: Callable[[], Backend]
    recordings: Path | None = None

    def backends(self) -> Iterator[tuple[str, Any]]:
        """Yield new drivers, one for each way to run a loop: with CUDA graphs and without, where
        there is the choice."""
        if not hasattr(self.start(), "graphs"):
            yield "plain", self.start()
            return
        for name, graphs in (("without_graphs", False), ("with_graphs", True)):
            backend: Any = self.start()
            backend.graphs = graphs
            yield name, backend

    def opened(self, backend: Backend | None = None, **options: Any) -> Generator:
        """Return a generator on a new backend, or on the given one."""
        return Generator(self.folder, backend=backend or self.start(), prompt_cache=0, **options)


def opening(subject: Subject) -> dict[str, Any]:
    """Every engine opened alone, twice: seconds, and bytes beside those of its files and those that
    the memory schedule counts for it."""
    facts, backend = manifest.read(subject.folder), subject.start()
    rows: dict[str, Any] = {}
    for spec in facts.engines:
        stored = manifest.stored_bytes(facts, spec)
        row: dict[str, Any] = {
            "file_bytes": stored,
            "counted_bytes": backend.weights_in_memory(spec, stored),
        }
        for which in ("first", "second"):
            with _memory(row, f"{which}_"):
                start = time.perf_counter()
                engine = backend.open(subject.folder, spec, facts.dimensions)
                row[f"{which}_open_s"] = _seconds(start)
            engine.close()
            del engine
            gc.collect()
        rows[spec.name] = row
    return rows


def generate(subject: Subject) -> dict[str, Any]:
    """Return the self-test's image against the builder's, and the memory of a generator's
    life."""
    found: dict[str, Any] = {"free_bytes_before": gpu.free_bytes()}
    start = time.perf_counter()
    generator = subject.opened()
    found["open_s"] = _seconds(start)
    found["free_bytes_open"] = gpu.free_bytes()
    start = time.perf_counter()
    drawn = selftest.draw(generator)
    found["first_image_s"] = _seconds(start)
    found["free_bytes_drawn"] = gpu.free_bytes()
    generator.close()
    del generator
    gc.collect()
    found["free_bytes_closed"] = gpu.free_bytes()
    with Image.open(subject.folder / selftest.IMAGE) as image:
        found |= apart(drawn, np.asarray(image.convert("RGB")))
    return found


def recordings(subject: Subject) -> dict[str, Any]:
    """Every golden case: the largest difference of each recorded tensor."""
    if subject.recordings is None:
        return {"skipped": "no recordings were given"}
    rows: dict[str, Any] = {}
    with subject.opened() as generator:
        model = generator.manifest.model
        for name in golden.names(subject.recordings):
            case = golden.load(subject.recordings, name)
            latents = case.tensors["flux.latents_init"]
            if latents.shape[1:] != (model.num_image_tokens, model.latent_channels):
                return {"skipped": "the recordings are of a model with other shapes"}
            rows[name] = _against(generator, case)
    return rows


def _against(generator: Generator, case: golden.Case) -> dict[str, float]:
    """Return the largest differences to one case, after every step and in the image."""
    steps: dict[str, list[NDArray[Any]]] = {"tokens": [], "latents": []}

    def keep(generator: Generator, step: int, t: float | None, now: dict[str, Any]) -> None:
        for kind in steps.keys() & now.keys():
            steps[kind].append(now[kind])

    drawn = generator.run(**case.request(), output_type="np", callback_on_step_end=keep)
    return {
        "tokens": _largest(np.stack(steps["tokens"]), case.tensors["mllm.tokens_steps"]),
        "latents": _largest(np.stack(steps["latents"]), case.tensors["flux.latents_steps"]),
        "pixels": _largest(drawn.images, case.tensors["flux.image_u8"]),
    }


def repeats(subject: Subject) -> dict[str, Any]:
    """Return which other runs of one request give the same bits: again, from another thread, as a
    server draws, with CUDA graphs and without, and with too little memory for all engines."""
    with subject.opened() as generator:
        first = generator.run(**REQUEST)
        found: dict[str, Any] = {"again": _same(first, generator.run(**REQUEST))}
        drawn: list[Result] = []
        thread = threading.Thread(target=lambda: drawn.append(generator.run(**REQUEST)))
        thread.start()
        thread.join()
        found["other_thread"] = _same(first, drawn[0]) if drawn else "it failed"
    for name, backend in subject.backends():
        row: dict[str, Any] = {"opens_in_threads": backend.opens_in_threads}
        found[name] = row
        try:
            with subject.opened(backend) as generator:
                # the second and third image replay what the first one recorded
                row["same"] = [_same(first, generator.run(**REQUEST)) for _ in "123"]
            row["little_memory"] = _with_little_memory(subject, backend, first)
        except BifrostError as error:
            row["failed"] = error.message
        if eager := getattr(backend, "eager", None):
            row["eager"] = eager
    return found


def _with_little_memory(subject: Subject, backend: Any, first: Result) -> dict[str, Any]:
    """Return the engines come and go; where the backend opens them in threads, while another one
    works."""
    facts = manifest.read(subject.folder)
    order = dims.drawing(facts.engines)
    sizes = memory_plan.sizes(facts, guided=True)
    needs = memory_plan.needs(facts, order, sizes, backend.weights_in_memory, backend.scratch_share)
    # room for the next one, and not for all
    budget = (max(need.total for need in needs) + sum(need.resident for need in needs)) // 2
    with subject.opened(backend, memory_budget=budget) as generator:
        same = [_same(first, generator.run(**REQUEST)) for _ in "123"]
        comes_and_goes = generator.no_previews() is not None
    return {"budget_bytes": budget, "engines_come_and_go": comes_and_goes, "same": same}


def times(subject: Subject) -> dict[str, Any]:
    """Milliseconds of the stages at the set's own steps, and of single steps: the first, the second
    and the others as they are seen from outside, each waited for; and the host's share, in which it
    queues a step."""
    found: dict[str, Any] = {"images": IMAGES}
    request = {name: value for name, value in REQUEST.items() if not name.endswith("_steps")}
    for name, backend in subject.backends():
        with subject.opened(backend) as generator:
            cold, warm = (_stepped(generator, request) for _ in range(2))
            timings = [generator.run(**request).timings for _ in range(1 + IMAGES)][1:]
            defaults = generator.manifest.defaults
        found[name] = {
            "stage_ms": {
                stage: round(1e3 * float(np.median([t[stage] for t in timings])), 3)
                for stage in timings[0]
            },
            "loops_first_image": cold,
            "loops_second_image": warm,
        }
    steps = {"decoding": defaults.decoding_steps, "denoising": defaults.num_inference_steps}
    return {"steps": steps, **found}


def _stepped(generator: Generator, request: dict[str, Any]) -> dict[str, Any]:
    """Return the steps of both loops of one image. Every step is waited for by its copy to the
    host."""
    marks: dict[str, list[tuple[float, float]]] = {"tokens": [], "latents": []}
    last = [time.perf_counter()]

    def mark(generator: Generator, step: int, t: float | None, now: dict[str, Any]) -> None:
        here = time.perf_counter()
        marks["tokens" if "tokens" in now else "latents"].append((last[0], here))
        last[0] = time.perf_counter()

    timings = generator.run(**request, callback_on_step_end=mark).timings
    found = {}
    for kind, engine, before in (
        ("tokens", "visual_decode", ("mllm_text",)),
        ("latents", "denoise", ("clip_text", "t5_text", "conditioning", "control_embed")),
    ):
        seconds = [end - start for start, end in marks[kind]]
        seconds[0] -= sum(timings[name] for name in before)
        found[engine] = {
            "first_step_ms": round(1e3 * seconds[0], 3),
            "second_step_ms": round(1e3 * seconds[1], 3) if len(seconds) > 1 else None,
            "step_ms": round(1e3 * float(np.median(seconds[2:] or seconds)), 3),
            "host_ms": round(1e3 * timings[engine] / len(seconds), 3),
        }
    return found


def prompt_lengths(subject: Subject) -> dict[str, Any]:
    """Return what an image costs whose prompt has a length that was not seen before, and then
    again."""
    found = {}
    for name, backend in subject.backends():
        with subject.opened(backend) as generator:
            generator.run(**REQUEST)
            found[name] = {prompt: _new_and_known(generator, prompt) for prompt in LONGER}
    return found


def _new_and_known(generator: Generator, prompt: str) -> dict[str, dict[str, float]]:
    request = {**REQUEST, "prompt": prompt}
    new, known = (generator.run(**request).timings for _ in range(2))
    return {
        name: {"new_ms": round(1e3 * new[name], 3), "known_ms": round(1e3 * known[name], 3)}
        for name in ("mllm_text", "visual_decode", "total")
    }


def answers(subject: Subject) -> dict[str, Any]:
    """Return what is said twice of the self-test's image: the likeliest tokens, and drawn ones.
    The second time a prefix is kept. Milliseconds, and whether the CPU says the same."""
    image = subject.folder / selftest.IMAGE
    requests: dict[str, dict[str, Any]] = {
        "likeliest": {"max_new_tokens": ANSWER},
        "drawn": {"max_new_tokens": ANSWER, "temperature": 1.0, "top_k": 8, "seed": 3},
    }
    with subject.opened() as generator:
        if generator.manifest.chat is None:
            return {"skipped": "the set has no words"}
    with Generator(subject.folder, backend="onnxruntime", prompt_cache=0) as generator:
        expected = {name: generator.describe(image, **r) for name, r in requests.items()}
    found: dict[str, Any] = {}
    for name, backend in subject.backends():
        with subject.opened(backend) as generator:
            found[name] = {
                kind: _answer(generator, image, request, expected[kind])
                for kind, request in requests.items()
            }
    return found


def _answer(
    generator: Generator, image: Path, request: dict[str, Any], expected: ChatResult
) -> dict[str, Any]:
    said = [generator.describe(image, **request) for _ in range(2)]
    return {
        "text": said[1].text,
        "tokens": len(said[1].token_ids),
        "as_on_the_cpu": [answer.token_ids == expected.token_ids for answer in said],
        "cached_tokens": [answer.usage.cached_tokens for answer in said],
        "first_ms": {name: round(1e3 * value, 3) for name, value in said[0].timings.items()},
        "second_ms": {name: round(1e3 * value, 3) for name, value in said[1].timings.items()},
    }


def transfers(subject: Subject, size: int = UPLOAD) -> dict[str, Any]:
    """GB/s between the backend's buffers and ordinary memory; the better of three."""
    backend, array = subject.start(), np.ones(size, np.uint8)
    buffer = backend.upload(array)
    found: dict[str, float] = {"bytes": size}
    for name, move in (
        ("write_gb_s", lambda: backend.write(buffer, array)),
        ("read_gb_s", lambda: backend.download(buffer)),
    ):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            move()
            seconds.append(time.perf_counter() - start)
        found[name] = round(size / min(seconds) / 1e9, 2)
    return found


def kernels(subject: Subject) -> dict[str, Any]:
    """Return the kernels of one image by the time they take, and the calls to CUDA's runtime, as
    torch's profiler sees them: it watches the whole process, whoever calls."""
    if importlib.util.find_spec("torch") is None:
        return {"skipped": "torch, whose profiler names kernels, is not installed"}
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {"skipped": "the installed torch has no CUDA"}
    found = {}
    for name, backend in subject.backends():
        with subject.opened(backend) as generator:
            for _ in range(2):
                generator.run(**REQUEST)
            torch.zeros(1, device="cuda")
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                generator.run(**REQUEST)
                torch.cuda.synchronize()
        found[name] = _events(seen.events())
    return found


def _events(events: Any) -> dict[str, Any]:
    """Names, counts and microseconds out of a profile."""
    kernels: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for event in events:
        if str(event.device_type).endswith("CUDA"):
            row = kernels.setdefault(event.name, [0, 0.0])
            row[0] += 1
            row[1] += event.time_range.elapsed_us()
        elif event.name.startswith("cu"):
            calls[event.name] = calls.get(event.name, 0) + 1
    order = sorted(kernels.items(), key=lambda item: -item[1][1])
    return {
        "calls": dict(sorted(calls.items())),
        "kernel_us": round(sum(us for _, us in kernels.values()), 1),
        "launches": int(sum(count for count, _ in kernels.values())),
        "kernels": [
            {"name": name[:100], "count": int(count), "us": round(us, 1)}
            for name, (count, us) in order[:KERNELS]
        ],
    }


def leaving(subject: Subject) -> dict[str, Any]:
    """Return a process that draws and ends without closing anything: its status and what it
    printed."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", LEAVES, str(subject.folder), subject.backend],
            capture_output=True,
            text=True,
            timeout=EXIT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"the process still ran after {EXIT_SECONDS} s"}
    drawn = done.stdout.strip() == "drawn"
    found: dict[str, Any] = {"status": done.returncode, "drawn": drawn, "seconds": _seconds(start)}
    if said := done.stderr.strip():
        found["stderr"] = said[-2000:]
    return found


TRIALS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "opening": opening,
    "image": generate,
    "recordings": recordings,
    "repeats": repeats,
    "times": times,
    "prompt_lengths": prompt_lengths,
    "answers": answers,
    "transfers": transfers,
    "leaving": leaving,
    "kernels": kernels,
}


def apart(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> dict[str, float]:
    """Say how far two images are from each other: of 255, and in dB where they differ."""
    off = np.abs(found.astype(np.int16) - expected)
    told = {"largest": int(off.max()), "mean": round(float(off.mean()), 5)}
    squared = float(np.square(off, dtype=np.float64).mean())
    return told | ({"psnr_db": round(10 * math.log10(255**2 / squared), 2)} if squared else {})


def _same(one: Result, other: Result) -> bool:
    """Say whether two results have the same bits."""
    return all(
        np.array_equal(np.asarray(getattr(one, name)), np.asarray(getattr(other, name)))
        for name in ("tokens", "latents", "images")
    )


def _largest(found: Any, expected: NDArray[Any]) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max())


def _seconds(start: float) -> float:
    return round(time.perf_counter() - start, 4)


@contextmanager
def _memory(row: dict[str, Any], prefix: str) -> Iterator[None]:
    """Note what is taken of the GPU's memory meanwhile, where there is one."""
    before = gpu.free_bytes()
    yield
    after = gpu.free_bytes()
    if before is not None and after is not None:
        row[f"{prefix}memory_bytes"] = before - after
