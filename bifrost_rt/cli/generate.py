"""`bifrost-rt generate`: from what was typed to arguments of `Generator.run`, and out to files."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bifrost_rt import cache, chat, images, latents_file, manifest, thinking, vision
from bifrost_rt import request as requests
from bifrost_rt.cli.options import long_flag
from bifrost_rt.cli.progress import Progress
from bifrost_rt.errors import NumericsError, RequestError, TextFileError
from bifrost_rt.files import MARK, check_writable, decode_text, read_text
from bifrost_rt.generator import Generator, default_set
from bifrost_rt.notes import Note
from bifrost_rt.params import OPTIONS
from bifrost_rt.pipeline import TOGETHER
from bifrost_rt.result import (
    THOUGHTS,
    Result,
    image_path,
    image_paths,
    numbered,
    read_parameters,
)

log = logging.getLogger("bifrost_rt")


@dataclasses.dataclass(frozen=True)
class Task:
    """One run, and where its images go. `image` is the one that is wanted; None wants all.
    `notes` are on options that do nothing in it, `thoughts` those of the image that it makes
    again."""

    request: dict[str, Any]
    output: Path
    tokens: Path | None
    image: int | None = None
    prefix: str = ""
    notes: tuple[Note, ...] = ()
    thoughts: tuple[requests.Thought, ...] = ()


def run(options: argparse.Namespace) -> int:
    """Draw what was asked for. Images appear as they are done."""
    image_paths(options.output, 1)
    tasks = list(_tasks(options))
    folder = default_set() if options.engines is None else Path(options.engines)
    _check(tasks, manifest.read(folder))
    with Generator(
        folder, backend=options.backend, memory_budget=options.memory_budget
    ) as generator:
        if sys.stderr.isatty():
            print(f"{generator.backend.name}: {generator.backend.reason}", file=sys.stderr)
        together = TOGETHER if generator.reloads() else 1
        for group in (tasks[i : i + together] for i in range(0, len(tasks), together)):
            _draw(generator, group, options.json)
    return 0


def _check(tasks: Sequence[Task], facts: manifest.Manifest) -> None:
    """Refuse what cannot be drawn or written, before minutes are spent on opening and drawing.

    Raises:
        RequestError: of the first task that cannot.
    """
    for task in tasks:
        asked = dict(task.request)
        asked.pop("mask", None)
        thinking.instruction(facts, asked.pop("think", None))
        if asked.pop("image", None) is not None:
            vision.facts(facts)
            if "prompt" not in asked:
                chat.facts(facts)
            asked["masked"] = np.zeros(facts.model.num_visual_tokens, bool)
        drawn = requests.check(facts, **{"prompt": "", **asked}).images
        if task.image is not None and task.image >= drawn:
            raise RequestError(
                f"--like: that image is number {task.image} of its run, which would have only "
                f"{drawn} now",
                hint="leave out --num-images-per-prompt",
            )
        paths, _ = image_paths(task.output, drawn if task.image is None else 1)
        if task.tokens is not None:
            check_writable(task.tokens)
            if os.path.realpath(task.tokens) in map(os.path.realpath, paths):
                raise RequestError(
                    f"{task.tokens}: is named for the image and for --save-tokens",
                    hint="name two files",
                )


def _draw(generator: Generator, tasks: Sequence[Task], as_json: bool) -> None:
    for note in (note for task in tasks for note in task.notes):
        log.warning("%s", note)
    bars: list[Progress | None] = [None] * len(tasks)
    if sys.stderr.isatty():
        facts = generator.manifest.defaults
        bars = [Progress(task.request, facts, task.prefix) for task in tasks]
    try:
        results = generator.run_several([task.request for task in tasks], bars)
    except NumericsError:
        if len(tasks) == 1:
            raise
        for task in tasks:  # one spoils the run of all: those before it are drawn
            _draw(generator, [task], as_json)
        return
    failed: list[RequestError] = []
    for task, bar, result in zip(tasks, bars, results, strict=True):
        if bar:
            bar.close(result.timings, result.seed)
        for thought in result.thoughts:
            print(f"thought: {thought.text}", file=sys.stderr)
        result = dataclasses.replace(
            result,
            notes=(*task.notes, *result.notes),
            thoughts=result.thoughts or task.thoughts,
        )
        try:
            _save(result, task, generator, as_json)
        except RequestError as error:  # the others are drawn, and may have another disk
            failed.append(error)
    for other in failed[1:]:
        log.error("%s", other)
    if failed:
        raise failed[0]


def _save(result: Result, task: Task, generator: Generator, as_json: bool) -> None:
    """Write what was drawn; where its place takes nothing any more, keep it in another.

    Raises:
        RequestError: its place took nothing; says where it is kept, or how to draw it again.
    """
    try:
        try:
            _write(result, task, generator.backend.name, as_json)
        finally:  # where a disk is full, one of the two may still have a place
            if task.tokens:
                result.save_tokens(task.tokens)
    except RequestError as error:
        kept = _keep(result, task)
        if kept is None:
            raise RequestError(
                f"{error.message}; the image could not be kept elsewhere either",
                hint=f"free some space and run it again with --seed {result.seed}, which draws the "
                "same image",
            ) from error
        raise RequestError(
            f"{error.message}; what was drawn is kept in {kept}", hint="move it from there"
        ) from error


def _keep(result: Result, task: Task) -> Path | None:
    """Write a run's files to the first other folder that takes them all: that of temporary files,
    the current one, the cache's. Returns the folder, or None where none does."""
    for place in (Path(tempfile.gettempdir()), Path.cwd(), cache.folder()):
        folder = None
        try:
            place.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="bifrost-rt-", dir=place))
            result.save(folder / task.output.name)
            if task.tokens:
                result.save_tokens(folder / task.tokens.name)
        except (OSError, RequestError):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            return folder
    return None


def _write(result: Result, task: Task, backend: str, as_json: bool) -> None:
    if task.image is not None:
        about = {**result.parameters, "image": task.image}
        images = [result.images[task.image]]
        result = dataclasses.replace(result, images=images, parameters=about)
    for i, path in enumerate(result.save(task.output)):
        line = _line(result, path, i, backend) if as_json else path
        print(line, flush=True)


def _line(result: Result, path: Path, image: int, backend: str) -> str:
    seconds = {name: round(value, 4) for name, value in result.timings.items()}
    return json.dumps(
        {
            "path": str(path),
            "image": image,
            **result.about,
            "backend": backend,
            "seconds": seconds,
            "warnings": result.warnings,
        },
        ensure_ascii=False,
    )


def _tasks(options: argparse.Namespace) -> Iterator[Task]:
    given = {name: getattr(options, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.size:
        given["width"], given["height"] = options.size
    if options.think is not None:
        given["think"] = options.think
    output, _ = image_path(options.output)
    tokens = Path(options.save_tokens) if options.save_tokens else None
    if options.prompts is not None:
        others = (options.prompt, options.like, options.tokens, options.image, options.mask)
        if any(others):
            raise RequestError(
                "--prompts does not go with a prompt, --image, --mask, --like or --tokens"
            )
        prompts = _lines(options.prompts)
        for i, prompt in enumerate(prompts):
            request = {"prompt": prompt, **given}
            prefix = f"{i + 1}/{len(prompts)} "
            yield Task(request, numbered(output, i), tokens and numbered(tokens, i), None, prefix)
        return
    request, image, thoughts = _base(options)
    if options.prompt:
        request["prompt"] = options.prompt[0] if len(options.prompt) == 1 else options.prompt
        image, thoughts = None, ()
    if options.think is not None and "prompt" not in request:
        raise RequestError(
            "--think needs a prompt to think of",
            hint='the prompt comes first: bifrost-rt generate "a red circle" --think',
        )
    idle = [long_flag(name) for name in given if name in OPTIONS and OPTIONS[name].mllm_only]
    source = "--image" if options.image else "--tokens"
    text = f"{' and '.join(idle)} has no effect: {source} brings the CLIP latents"
    read = (options.tokens or options.image) and not options.mask
    notes = (Note(text=text),) if read and idle else ()
    yield Task({**request, **given}, output, tokens, image, notes=notes, thoughts=thoughts)


def _base(
    options: argparse.Namespace,
) -> tuple[dict[str, Any], int | None, tuple[requests.Thought, ...]]:
    """Return what an earlier result, an image or a file of tokens asks for, which image of it is
    wanted, and what the MLLM had thought of it."""
    if options.image and options.tokens:
        raise RequestError("--image and --tokens are two sources of CLIP latents", hint="give one")
    if options.mask and not (options.image or options.tokens):
        raise RequestError(
            "--mask says what to draw anew of an image or of tokens",
            hint="--image FILE or --tokens FILE",
        )
    made = latents_file.load(options.tokens) if options.tokens else None
    read: dict[str, Image.Image] = {}
    if options.image:
        read["image"] = images.read(Path(options.image))
    if options.mask:
        read["mask"] = images.painted(Path(options.mask))
    if options.like is not None:
        return _like(options.like, made, read)
    if made is not None:
        return {**made.request(), **read}, None, ()
    if not options.prompt and not read and options.think is None:
        raise RequestError("no prompt", hint='bifrost-rt generate "a red circle" …')
    return read, None, ()


def _like(
    path: str, made: latents_file.LatentsFile | None, read: dict[str, Image.Image]
) -> tuple[dict[str, Any], int, tuple[requests.Thought, ...]]:
    """Return what an image's own parameters ask for, with the files that it was made from."""
    parameters = read_parameters(path)
    try:
        thoughts = tuple(requests.Thought(**one) for one in parameters.pop(THOUGHTS, ()))
    except TypeError:
        raise RequestError(f"{path}: its {THOUGHTS} are not those of bifrost-rt") from None
    injected = parameters.pop("injected", {})
    image = parameters.pop("image", None)
    if not isinstance(image, int) or set(parameters) != {"prompt", *OPTIONS}:
        raise RequestError(f"{path}: was made by a version of bifrost-rt with other parameters")
    if "compose" in injected:
        raise RequestError(f"{path}: was composed of parts, which an image does not hold")
    if not set(injected) <= {"tokens", "image", "mask"}:
        raise RequestError(
            f"{path}: was made with order or latents passed in, which an image does not hold"
        )
    given = {name: latents_file.digest(np.asarray(pixels)) for name, pixels in read.items()}
    if made is not None:
        given["tokens"] = latents_file.digest(made.tokens)
    for name, own, other, file in (
        ("tokens", "tokens", "other tokens than those", "a file of tokens"),
        ("image", "an image", "another image than that", "an image"),
        ("mask", "a mask", "another mask than that", "a mask"),
    ):
        if name in injected and name not in given:
            raise RequestError(
                f"{path}: was made from {own} of its own",
                hint=f"--{name} FILE, the file that it was made from",
            )
        if name in given and name not in injected:
            raise RequestError(f"{path}: was not made from {file}", hint=f"leave out --{name}")
        if given.get(name) != injected.get(name):
            raise RequestError(f"{path}: was made from {other} of --{name}")
    tokens = {} if made is None else {"tokens": made.tokens}
    return {**parameters, **tokens, **read}, image, thoughts


def _lines(name: str) -> list[str]:
    try:
        if name == "-":
            text = decode_text(sys.stdin.buffer.read(), "standard input")
        else:
            text = read_text(name)
    except OSError as error:
        raise RequestError(f"{name}: cannot be read as prompts: {error}") from None
    except TextFileError as error:
        raise RequestError(
            f"{name}: cannot be read as prompts: {error.message}", hint=error.hint
        ) from None
    # files that were put together have marks at their seams too
    stripped = (line.lstrip(MARK).strip() for line in text.splitlines())
    lines = [line for line in stripped if line]
    if not lines:
        raise RequestError(f"{name}: holds no prompt", hint="one prompt per line")
    return lines
