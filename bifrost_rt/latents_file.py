"""CLIP latents as a file: what the MLLM made, to be drawn again elsewhere, later or otherwise.

One tensor `tokens` in safetensors, with the arguments of the run that made it. Drawing it needs the
prompts too (CLIP and T5 read them) and no engine of the MLLM.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.errors import RequestError
from bifrost_rt.files import atomic_output

_KEY = "bifrost-rt"
_MADE_BY = "`bifrost-rt generate --save-tokens FILE` writes such a file"


@dataclass(frozen=True)
class LatentsFile:
    """Tokens, float32 [n, N, D], and the arguments of `Generator.run` that made them."""

    tokens: NDArray[np.float32]
    parameters: dict[str, Any]

    def request(self) -> dict[str, Any]:
        """Arguments of `run` that draw them: one prompt per image, and the seed of the noise."""
        prompt, per_prompt = self.parameters["prompt"], self.parameters["num_images_per_prompt"]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return {
            **self.parameters,
            "prompt": [text for text in prompts for _ in range(per_prompt)],
            "num_images_per_prompt": 1,
            "tokens": self.tokens,
        }


def digest(array: NDArray[Any]) -> str:
    """sha256 of an array's values: how an image names what was passed in to make it."""
    return hashlib.sha256(array.tobytes()).hexdigest()


def save(path: str | Path, tokens: NDArray[np.float32], parameters: dict[str, Any]) -> Path:
    """Write tokens; aside first, so that an older file is never half overwritten.

    Raises:
        RequestError: the file cannot be written.
    """
    from safetensors.numpy import save as dumps

    kept = {name: value for name, value in parameters.items() if name != "injected"}
    with atomic_output(Path(path)) as aside:
        aside.write_bytes(dumps({"tokens": tokens}, metadata={_KEY: json.dumps(kept)}))
    return Path(path)


def load(path: str | Path) -> LatentsFile:
    """Read what `save` wrote. Shapes are compared with a set when it draws them.

    Raises:
        RequestError: no such file, not safetensors, or not tokens of this package.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names, about = set(file.keys()), (file.metadata() or {}).get(_KEY)
            tokens = file.get_tensor("tokens") if names == {"tokens"} else None
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path}: cannot be read as tokens: {error}", hint=_MADE_BY) from None
    if tokens is None:
        raise RequestError(
            f"{path}: expected one tensor `tokens`, found {', '.join(sorted(names)) or 'none'}",
            hint=_MADE_BY,
        )
    if tokens.dtype != np.float32 or tokens.ndim != 3 or not np.isfinite(tokens).all():
        raise RequestError(
            f"{path}: expected tokens float32[images, places, width], all finite; "
            f"found {tokens.dtype}{list(tokens.shape)}"
        )
    return LatentsFile(tokens, _parameters(path, about, len(tokens)))


def _parameters(path: str | Path, about: str | None, images: int) -> dict[str, Any]:
    try:
        parameters = json.loads(about or "")
        prompt, per_prompt = parameters["prompt"], parameters["num_images_per_prompt"]
        prompts = 1 if isinstance(prompt, str) else len(prompt)
        fits = prompts * per_prompt == images
    except (ValueError, KeyError, TypeError):
        raise RequestError(
            f"{path}: does not say which prompts its tokens are of", hint=_MADE_BY
        ) from None
    if not fits:
        raise RequestError(
            f"{path}: {images} images of tokens, but {prompts} prompts times {per_prompt}"
        )
    assert isinstance(parameters, dict)
    return parameters
