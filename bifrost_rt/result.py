"""What `Generator.run` returns."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from bifrost_rt import latents_file
from bifrost_rt.errors import RequestError
from bifrost_rt.files import atomic_output, check_writable
from bifrost_rt.notes import Note, Truncation
from bifrost_rt.request import Thought

# The text chunk of a PNG that holds its parameters, as JSON.
PNG_KEY = "bifrost-rt"
THOUGHTS = "thoughts"  # its field with what the MLLM thought
# What an image is called in a folder.
IMAGE = "out.png"
SEPARATORS = tuple(separator for separator in ("/", os.sep, os.altsep) if separator)


def image_path(path: str | Path) -> tuple[Path, str]:
    """Return the path with its suffix, and the format that the suffix names. In a folder, one that
    is there or one that is named with a slash at its end, the image is called `out.png`.

    Raises:
        RequestError: no image format, or not one for images in colour.
    """
    is_folder = str(path).endswith(SEPARATORS)
    path = Path(path)
    if is_folder or os.path.isdir(path):
        path /= IMAGE
    if path.suffix == "":
        path = path.with_name(f"{path.name}.png")
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format is None or not _writes_colour(file_format):
        raise RequestError(
            f"{path}: {path.suffix!r} is not an image format that Pillow writes",
            hint="use .png, .jpg or .webp",
        )
    return path, file_format


def _writes_colour(file_format: str) -> bool:
    """Say whether Pillow has a writer for it that takes RGB."""
    try:
        Image.new("RGB", (8, 8)).save(io.BytesIO(), format=file_format)
    except (KeyError, OSError, ValueError):
        return False
    return True


def image_paths(path: str | Path, images: int) -> tuple[list[Path], str]:
    """Say where `Result.save` writes so many images, and in which format; tries that they can be
    written, so that it can be asked before anything is drawn.

    Raises:
        RequestError: no image format, or a file cannot be written there.
    """
    path, file_format = image_path(path)
    paths = [path] if images == 1 else [numbered(path, i) for i in range(images)]
    for one in paths:
        check_writable(one)
    return paths, file_format


def numbered(path: Path, i: int) -> Path:
    """Return the path of the i-th of several files."""
    return path.with_stem(f"{path.stem}-{i}")


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Return the parameters that `Result.save` wrote into a PNG, and `image`, its place in the run.

    Raises:
        RequestError: not an image, or not one of this package.
    """
    try:
        with Image.open(path) as image:
            text = image.info.get(PNG_KEY)
        parameters = json.loads(text) if isinstance(text, str) else None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as an image: {error}") from None
    if not isinstance(parameters, dict):
        raise RequestError(f"{path}: does not say how it was made; only PNGs of bifrost-rt do")
    return parameters


@dataclass(frozen=True)
class Result:
    """n images of one run, prompt by prompt.

    Attributes:
        images: as `output_type` asked: n `PIL.Image`s, uint8 [n, H, W, 3], or the latents.
        tokens: float32 [n, N, D], the patch-level CLIP latents that the MLLM predicted.
        latents: float32 [n, S, C], final and packed, as the VAE engine takes them.
        timings: seconds per engine, and `total` for the whole run.
        seed: passed to `run` again, it gives the same images.
        parameters: the arguments of `run` that make these images again. Where order, latents or
            tokens were passed in, `injected` names them with the sha256 of their values: they are
            needed too.
        notes: what was asked for and not done: prompts that were cut, arguments without effect.
        thoughts: with `think`, what the MLLM said of every prompt, in their order. Its texts are
            what was drawn: they are the prompt of `parameters`, which draw them again without
            thinking anew.
    """

    images: Any
    tokens: NDArray[np.float32]
    latents: NDArray[np.float32]
    timings: dict[str, float]
    seed: int
    parameters: dict[str, Any]
    notes: tuple[Note, ...] = ()
    thoughts: tuple[Thought, ...] = ()

    @property
    def thought(self) -> str | None:
        """The text of the first thought; None where the MLLM did not think."""
        return self.thoughts[0].text if self.thoughts else None

    @property
    def about(self) -> dict[str, Any]:
        """What a PNG says of how it was made: the parameters, and `thoughts` where there are
        some."""
        if not self.thoughts:
            return self.parameters
        return {**self.parameters, THOUGHTS: [asdict(one) for one in self.thoughts]}

    @property
    def warnings(self) -> list[str]:
        """The notes in words, as they were logged."""
        return [str(note) for note in self.notes]

    @property
    def truncated(self) -> list[Truncation]:
        """The prompts that are longer than a text model reads: which, by how much, by whom."""
        return [note for note in self.notes if isinstance(note, Truncation)]

    @property
    def image(self) -> Any:
        """The first image."""
        return self.images[0]

    def save(self, path: str | Path) -> list[Path]:
        """Write the images; the suffix decides the format, PNG where there is none. In a folder
        they are called `out.png`.

        Several images get `-0`, `-1`, … before the suffix. A PNG carries its parameters, from which
        `bifrost-rt generate --like` makes it again. Each file is written aside and renamed,
        so that an older image is never half overwritten. The images stay in memory: where a disk
        is full, they can be saved to another place.

        Returns:
            The paths written.

        Raises:
            RequestError: the run ended at the latents, the suffix names no image format, or the
                file cannot be written.
        """
        self._needs_pixels()
        paths, file_format = image_paths(path, len(self.images))
        for i, target in enumerate(paths):
            with atomic_output(target) as aside:
                aside.write_bytes(self.encode(i, file_format))
        return paths

    def save_tokens(self, path: str | Path) -> Path:
        """Write the CLIP latents, to be drawn again without the MLLM:
        `generator.run(**latents_file.load(path).request())`.

        Raises:
            RequestError: the file cannot be written.
        """
        return latents_file.save(path, self.tokens, self.parameters)

    def encode(self, image: int, file_format: str = "PNG") -> bytes:
        """Return the bytes of one image's file, in a format that Pillow writes.

        Raises:
            RequestError: the run ended at the latents.
        """
        self._needs_pixels()
        drawn = self.images[image]
        if not isinstance(drawn, Image.Image):
            drawn = Image.fromarray(drawn)
        about = PngImagePlugin.PngInfo()
        about.add_itxt(PNG_KEY, json.dumps({"image": image, **self.about}))
        file = io.BytesIO()
        drawn.save(file, format=file_format, **({"pnginfo": about} if file_format == "PNG" else {}))
        return file.getvalue()

    def _needs_pixels(self) -> None:
        if not isinstance(self.images, list) and self.images.dtype != np.uint8:
            raise RequestError(
                "this result has no pixels to save",
                hint="run with output_type='pil', or keep `result.latents`",
            )
