"""Draw GenEval's or DPG-Bench's prompts into the folders that their own scorers read.

    python -m benchmarks.geneval --engines DIR --prompts evaluation_metadata.jsonl --output DIR
    python -m benchmarks.geneval --engines DIR --prompts dpg_bench/prompts --output DIR

The prompts are the user's: GenEval's file has a JSON object with a "prompt" on every line, and
DPG-Bench's folder a text file for every prompt. Each prompt is drawn with the seeds 0 to 3:

    GenEval     OUTPUT/00000/metadata.jsonl and OUTPUT/00000/samples/0000.png … 0003.png
    DPG-Bench   OUTPUT/NAME.png, the four side by side in two rows

A run that was cut off continues: what is there is not drawn again. `run.json` beside the images
says what they were drawn of and with, and a folder never mixes two of those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.arguments import count
from benchmarks.candidates import set_digest
from bifrost_rt import Generator, RequestError, command, request
from bifrost_rt.cli.options import add_option
from bifrost_rt.errors import TextFileError
from bifrost_rt.files import atomic_write, read_text
from bifrost_rt.params import OPTIONS

SEEDS = (0, 1, 2, 3)
RUN = "run.json"
SCORED = ("tag", "include")  # of a line, what GenEval's scorer reads beside the prompt
ITS_OWN = ("seed", "num_images_per_prompt", "extend")  # options that the images' places decide

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the name of what is drawn of it; `line` is GenEval's, as it stands."""

    name: str
    text: str
    line: str = ""


class Layout(Protocol):
    """Where a benchmark's scorer looks for images."""

    def read(self, path: Path) -> list[Prompt]:
        """Read the user's prompts.

        Raises:
            RequestError: naming the file and the line that holds none.
        """

    def done(self, output: Path, prompt: Prompt) -> bool:
        """Say whether all images of a prompt are there."""

    def write(self, output: Path, prompt: Prompt, images: Sequence[Pixels]) -> None:
        """Write the images of all seeds, each file whole or not at all."""


class GenEval:
    """A file of JSON lines; a folder for each, with its line and its samples."""

    def read(self, path: Path) -> list[Prompt]:
        """Read `evaluation_metadata.jsonl`."""
        found: list[Prompt] = []
        for number, line in enumerate(_text(path).split("\n"), 1):  # texts may have other breaks
            if not line.strip():
                continue
            try:
                about = json.loads(line)
            except ValueError as error:
                raise RequestError(f"{path}: line {number}: not JSON: {error}") from None
            about = about if isinstance(about, dict) else {}
            text = about.get("prompt")
            if not isinstance(text, str) or not text.strip():
                raise RequestError(f'{path}: line {number}: has no "prompt" with a text')
            if lacks := [name for name in SCORED if name not in about]:
                raise RequestError(
                    f"{path}: line {number}: has no {' and no '.join(lacks)}, which GenEval's "
                    "scorer reads",
                    hint="take the benchmark's own evaluation_metadata.jsonl",
                )
            found.append(Prompt(f"{len(found):05d}", text, line))
        return found

    def done(self, output: Path, prompt: Prompt) -> bool:
        """Say whether its line and all samples are there."""
        about, samples = self._files(output, prompt)
        return about.is_file() and all(sample.is_file() for sample in samples)

    def write(self, output: Path, prompt: Prompt, images: Sequence[Pixels]) -> None:
        """Write the samples, and at last the line, which the scorer looks for first."""
        about, samples = self._files(output, prompt)
        samples[0].parent.mkdir(parents=True, exist_ok=True)
        for sample, image in zip(samples, images, strict=True):
            _save(image, sample)
        with atomic_write(about) as aside:
            aside.write_text(prompt.line + "\n", encoding="utf-8")

    def _files(self, output: Path, prompt: Prompt) -> tuple[Path, list[Path]]:
        folder = output / prompt.name
        samples = [folder / "samples" / f"{i:04d}.png" for i in range(len(SEEDS))]
        return folder / "metadata.jsonl", samples


class Dpg:
    """A folder of text files; an image for each, of all seeds in a grid."""

    def read(self, path: Path) -> list[Prompt]:
        """Read every `.txt` of a folder."""
        found = [Prompt(file.stem, _text(file).strip()) for file in sorted(path.glob("*.txt"))]
        for prompt in found:
            if not prompt.text:
                raise RequestError(f"{path / prompt.name}.txt: holds no prompt")
        return found

    def done(self, output: Path, prompt: Prompt) -> bool:
        """Say whether its image is there."""
        return (output / f"{prompt.name}.png").is_file()

    def write(self, output: Path, prompt: Prompt, images: Sequence[Pixels]) -> None:
        """Write the four images in two rows."""
        rows = [np.concatenate(images[i : i + 2], axis=1) for i in range(0, len(images), 2)]
        _save(np.concatenate(rows), output / f"{prompt.name}.png")


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except TextFileError as error:
        raise RequestError(f"{path}: {error.message}", hint=error.hint) from None


def _save(image: Pixels, path: Path) -> None:
    with atomic_write(path) as aside:
        Image.fromarray(image).save(aside, "PNG")


def read(path: Path) -> tuple[Layout, list[Prompt]]:
    """Read the user's prompts: a folder is DPG-Bench's, a file GenEval's.

    Raises:
        RequestError: naming the file, and the line that holds none.
    """
    layout: Layout = Dpg() if path.is_dir() else GenEval()
    prompts = layout.read(path)
    if not prompts:
        raise RequestError(
            f"{path}: holds no prompt",
            hint="GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt files",
        )
    return layout, prompts


def digest(layout: Layout, prompts: Sequence[Prompt]) -> str:
    """Tell prompts from others: their benchmark, names, texts and lines."""
    said = [type(layout).__name__, *((one.name, one.text, one.line) for one in prompts)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def claim(output: Path, about: Mapping[str, Any]) -> None:
    """Make the folder one for images that are drawn so, or find that it is.

    Args:
        about: what images were drawn with.

    Raises:
        RequestError: it holds images of something else, or cannot be written.
    """
    place = output / RUN
    try:
        output.mkdir(parents=True, exist_ok=True)
        foreign = [path for path in output.iterdir() if not path.name.startswith(".")]
        if not foreign:
            with atomic_write(place) as aside:
                aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{output}: cannot be written: {error.strerror}") from None
    if foreign and place not in foreign:
        raise RequestError(
            f"{output}: holds files and no {RUN}, so nobody knows what drew them",
            hint="name an empty or a new folder",
        )
    try:
        found = json.loads(_text(place))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RequestError(
            f"{place}: does not say what drew the images beside it", hint="name a new folder"
        )
    other = [name for name in {**found, **about} if found.get(name) != about.get(name)]
    if other:
        raise RequestError(
            f"{output}: its images were drawn with other {' and '.join(other)}",
            hint="name another folder, or draw with the same again",
        )


def draw(
    generator: Generator,
    prompts: Sequence[Prompt],
    together: int,
    options: Mapping[str, Any],
) -> Iterator[tuple[Prompt, list[Pixels]]]:
    """Draw every prompt with every seed, several prompts in one run.

    Args:
        together: how many.
        options: of `Generator.run`.
    """
    for start in range(0, len(prompts), together):
        group = prompts[start : start + together]
        asked = [
            generator.ask(prompt=prompt.text, seed=seed, output_type="np", **options)
            for prompt in group
            for seed in SEEDS
        ]
        images = generator.draw(request.merge(asked)).images
        assert images is not None
        for i, prompt in enumerate(group):
            yield prompt, list(images[i * len(SEEDS) : (i + 1) * len(SEEDS)])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.geneval", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--engines", type=Path, required=True, help="the set that draws")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="GenEval's file, or DPG-Bench's folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="a folder for the images")
    parser.add_argument("--together", type=count, default=1, help="prompts in one run (1)")
    parser.add_argument("--backend", help="default: the one that the set was built for")
    for name, option in OPTIONS.items():
        if name not in ITS_OWN:
            add_option(parser, option)
    given = parser.parse_args(arguments)
    layout, prompts = read(given.prompts)
    options = {n: v for n in OPTIONS if (v := getattr(given, n, None)) is not None}
    with Generator(given.engines, backend=given.backend) as generator:
        generator.ask(prompt="", **options)  # refused before anything is written
        about = {
            "prompts": digest(layout, prompts),
            "set": set_digest(str(given.engines)),
            "backend": generator.backend.name,
            "options": options,
            "seeds": list(SEEDS),
        }
        claim(given.output, about)
        left = [prompt for prompt in prompts if not layout.done(given.output, prompt)]
        print(f"{len(prompts)} prompts, {len(prompts) - len(left)} of them drawn already")
        for i, (prompt, images) in enumerate(draw(generator, left, given.together, options), 1):
            layout.write(given.output, prompt, images)
            if sys.stderr.isatty():
                print(f"\r{i}/{len(left)}", end="", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
