"""One MLLM's text branch with random weights, in the files that every candidate reads.

All are made from the same bfloat16 numbers, once, in the cache folder.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks import truncated_models
from benchmarks.peers import model_files
from benchmarks.peers.tensor_files import ORDINARY
from bifrost_rt import text_inputs
from bifrost_rt.manifest import EngineSpec
from export.formats import FORMATS
from export.synthetic.shapes import PRESETS, Layout, Shapes

if TYPE_CHECKING:
    from export.quantize.statistics import Statistics
    from export.stages import Stage

PROMPT_SEED, CALIBRATION_SEED = 1, 2
CALIBRATION = (12, 32)  # texts and tokens of each; of a text's last layer, one row is computed


def shapes(like: str, layers: int) -> Shapes:
    """Return a decoder of a preset's widths. Its vocabulary is cut as its depth is, so that the
    head keeps its share of a token's work; what does not read text is tiny."""
    decoder = PRESETS[like].decoder
    share = decoder.vocab_size * layers / decoder.num_hidden_layers
    vocabulary = max(640, 64 * round(share / 64))
    return dataclasses.replace(
        PRESETS["tiny"],
        decoder=dataclasses.replace(decoder, num_hidden_layers=layers, vocab_size=vocabulary),
        layout=Layout(left_out=("embed_tokens.", "layers.", "norm.")),
    )


def prompt(tokens: int, seed: int = PROMPT_SEED) -> NDArray[np.int64]:
    """Return ids of a prompt that means nothing."""
    return np.random.default_rng(seed).integers(0, ORDINARY, tokens)


def made(of: Shapes, forms: tuple[str, ...], gguf_types: tuple[str, ...]) -> Path:
    """Return the folder with our graphs and the GGUF files, after making what is not there yet."""

    def write(folder: Path) -> dict[str, EngineSpec]:
        with tempfile.TemporaryDirectory(dir=folder) as checkpoint:
            return _write(of, forms, gguf_types, folder, Path(checkpoint) / "checkpoint")

    return model_files.made("text", of, (*forms, *gguf_types), write)


def _write(
    of: Shapes,
    forms: tuple[str, ...],
    gguf_types: tuple[str, ...],
    folder: Path,
    checkpoint: Path,
) -> dict[str, EngineSpec]:
    from benchmarks.peers import gguf_files
    from export.synthesize import synthesize

    synthesize(of, checkpoint)
    for kind in gguf_types:
        folders = (checkpoint / "mllm", checkpoint / "bifrost")
        gguf_files.write(folder / f"{kind}.gguf", folders, of.decoder, kind)
    specs = {}
    for fmt in forms:
        made = model_files.stages(checkpoint, text_inputs.NAME, text_tokens=512, read=False)
        stage = made[text_inputs.NAME]
        seen = _calibrated(stage) if FORMATS[fmt].quantized else None
        specs[fmt] = truncated_models.write(stage, fmt, folder, holes=False, statistics=seen)
    return specs


def _calibrated(stage: Stage) -> Statistics:
    """Return what the layers see of other prompts."""
    texts, tokens = CALIBRATION
    ids = prompt(texts * tokens, CALIBRATION_SEED).reshape(texts, tokens).tolist()
    return model_files.calibrated(stage, text_inputs.prompts(stage.outline(), ids, tokens))
