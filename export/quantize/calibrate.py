"""The real chain, run on real prompts, with every candidate layer watched.

Statistics cover all decoding steps and all denoising steps at the set's defaults, because a layer's
inputs at the first step, where everything is masked or noise, are not those at the last. One batch
is guided, so that the empty text of the unconditional branch is seen too.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bifrost_rt import files, pipeline
from bifrost_rt.dims import IMAGES
from bifrost_rt.errors import TextFileError
from bifrost_rt.manifest import Lora, SetSpec
from export import foreign, torch_pipeline
from export.errors import CalibrationError
from export.exercise import draw_look_answer
from export.quantize.policy import linears
from export.quantize.statistics import Observer, Statistics
from export.stages import Stage

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.txt")
BATCH = 8
GUIDED = 2.0
STEPS = ("decoding_steps", "num_inference_steps")
SAMPLE = 1 << 16


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file, one per line; empty lines and lines that begin with # do not
    count.

    Raises:
        CalibrationError: it cannot be read, or there is none in it.
    """
    try:
        lines = files.read_text(path).splitlines()
    except (OSError, TextFileError) as error:
        raise CalibrationError(f"{path}: calibration prompts cannot be read: {error}") from None
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not prompts:
        raise CalibrationError(
            f"{path}: holds no prompt",
            hint="write one prompt per line, of the kind that the model will be asked for",
        )
    return prompts


def fingerprint(folders: Sequence[Path], loras: Sequence[Lora] = ()) -> str:
    """Return what tells one checkpoint from another: names, headers and samples of all weight
    files; and what is added to the weights.

    Not a proof against tampering, which would mean to read everything.
    """
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        found = [p for p in folder.rglob("*") if p.suffix in foreign.SINGLE_FILE_ENDINGS]
        for path in [folder] if folder.is_file() else sorted(found):
            size = path.stat().st_size
            digest.update(f"{number}/{path.relative_to(folder).as_posix()}/{size}".encode())
            with path.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                for at in (0, min(8 + header, size), size // 2, max(0, size - SAMPLE)):
                    stream.seek(at)
                    digest.update(stream.read(SAMPLE))
    for lora in loras:
        digest.update(f"{lora.sha256}*{lora.scale!r}".encode())
    return digest.hexdigest()


def calibrate(
    folder: Path,
    manifest: SetSpec,
    stages: Mapping[str, Stage],
    found: Statistics,
    progress: Callable[[str], None],
    steps: int | None = None,
    kept: int | None = None,
    keep: Callable[[Statistics], None] = lambda found: None,
    generate: pipeline.Generate = draw_look_answer,
) -> Statistics:
    """Run the chain on every prompt and record what every linear layer of every stage sees.

    Args:
        found: of these prompts; its runs are not repeated.
        keep: called with what was seen so far after every run.
        steps: of both loops; None: the set's defaults.
        kept: bytes of weights that may stay in memory between calls; None: all.
        generate: what runs the engines.
    """
    with watching(stages.values(), found.layers):
        limits = {} if steps is None else dict.fromkeys(STEPS, steps)
        runs = list(_runs(manifest, found.prompts))
        for at, batch, options in runs[found.runs :]:
            last = at + len(batch)
            progress(f"calibrating on prompts {at + 1} to {last} of {len(found.prompts)}")
            given = {"seed": at, "kept": kept, "generate": generate, **limits, **options}
            torch_pipeline.run(folder, manifest, stages, batch, **given)
            found.runs += 1
            found.complete = found.runs == len(runs)
            keep(found)
    return found


def _runs(
    manifest: SetSpec, prompts: Sequence[str]
) -> Iterator[tuple[int, Sequence[str], dict[str, Any]]]:
    most = manifest.dimensions[IMAGES].max or BATCH
    size = min(BATCH, most)
    for at in range(0, len(prompts), size):
        yield at, prompts[at : at + size], {}
    yield 0, prompts[:1], {"cfg_weight": GUIDED}


@contextlib.contextmanager
def watching(stages: Iterable[Stage], into: dict[str, Observer]) -> Iterator[None]:
    """Record what the linear layers of stages get and give, for as long as the context lasts.

    Raises:
        CalibrationError: when one is called with what is not finite.
    """
    with contextlib.ExitStack() as watched:
        for stage in stages:
            for path, linear in linears(stage):
                watched.enter_context(watch(linear, f"{stage.name}:{path}", into))
        yield


@contextlib.contextmanager
def watch(linear: nn.Linear, name: str, into: dict[str, Observer]) -> Iterator[None]:
    """Record what a layer gets and gives, for as long as the context lasts.

    Raises:
        CalibrationError: when it is called with what is not finite.
    """

    def look(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        try:
            into.setdefault(name, Observer.nothing(linear.in_features)).add(given[0], result)
        except ValueError as error:
            raise CalibrationError(
                f"calibration: layer {name} got {error}",
                hint="the checkpoint does not run in float32: check what comes before this layer",
            ) from None

    handle = linear.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
