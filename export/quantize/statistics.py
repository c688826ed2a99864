"""What calibration records of a layer's input, and the file that keeps it.

Per layer: the largest magnitude and the mean square of every channel, and a histogram of
magnitudes. That is enough for every scale and for the smoothing of outliers, and it takes a few
kilobytes per layer however many prompts and steps there were.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bifrost_rt.files import atomic_write
from export.errors import CalibrationError

VERSION = 2
BINS = 2048
AGAIN = "calibrate again: leave --statistics out"


@dataclass
class Observer:
    """Everything that was seen at one layer.

    Attributes:
        rows: vectors seen.
        channel_max: [K] largest magnitude.
        channel_square: [K] sum of squares.
        counts: [BINS] magnitudes, in equal bins from 0 to `top`.
        top: the histogram's end, a power of two, at least the largest magnitude.
        output_square: sum of squares of the layer's outputs.
    """

    rows: int
    channel_max: Tensor
    channel_square: Tensor
    counts: Tensor
    top: float
    output_square: float = 0.0

    @classmethod
    def nothing(cls, channels: int) -> Observer:
        """Before the first call."""
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(0, zeros.float(), zeros, torch.zeros(BINS, dtype=torch.float64), 2.0**-20)

    def add(self, x: Tensor, y: Tensor) -> None:
        """One call: inputs [..., K] and outputs [..., N].

        Raises:
            ValueError: an input is not finite.
        """
        x = x.detach().flatten(0, -2)
        channel_max = x.abs().amax(0)
        largest = channel_max.max().item()
        if not math.isfinite(largest):
            raise ValueError(f"{largest} in its inputs")
        while largest > self.top:  # two bins become one
            halves = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat((halves, torch.zeros_like(halves)))
            self.top *= 2
        self.rows += x.shape[0]
        self.channel_max = torch.maximum(self.channel_max, channel_max)
        self.channel_square += x.square().sum(0)
        self.output_square += torch.linalg.vector_norm(y.detach()).item() ** 2
        bins = (x.abs().flatten() * (BINS / self.top)).to(torch.int32).clamp(max=BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS)

    @property
    def largest(self) -> float:
        """The largest magnitude of all."""
        return float(self.channel_max.max())


@dataclass
class Statistics:
    """A calibration: where it came from, and what every layer saw.

    Attributes:
        checkpoint: fingerprint of the weights that the chain ran on.
        prompts: the prompts, in order.
        layers: "stage:path.of.the.layer" -> what it saw.
        key: of everything that decides what is seen; empty where nobody asks.
        runs: of the chain that are in it, and
        complete: whether that is all of them.
    """

    checkpoint: str
    prompts: tuple[str, ...]
    layers: dict[str, Observer] = field(default_factory=dict)
    key: str = ""
    runs: int = 0
    complete: bool = False

    def save(self, path: Path) -> None:
        """Write a safetensors file, aside and renamed; the same statistics give the same bytes."""
        tensors: dict[str, Tensor] = {}
        for name, seen in sorted(self.layers.items()):
            tensors[f"{name}/channel_max"] = seen.channel_max
            tensors[f"{name}/channel_square"] = seen.channel_square
            tensors[f"{name}/counts"] = seen.counts
            tensors[f"{name}/totals"] = torch.tensor(
                [seen.rows, seen.top, seen.output_square], dtype=torch.float64
            )
        about = {
            "version": VERSION,
            **{name: getattr(self, name) for name in ("checkpoint", "prompts", "key")},
            **{name: getattr(self, name) for name in ("runs", "complete")},
        }
        with atomic_write(path) as aside:
            save_file(tensors, aside, {"calibration": json.dumps(about, ensure_ascii=False)})

    @classmethod
    def load(cls, path: Path, checkpoint: str) -> Statistics:
        """Read a file that `save` wrote when a calibration had ended.

        Raises:
            CalibrationError: not such a file, cut off, or made with another checkpoint.
        """
        found = cls._read(path)
        if found.checkpoint != checkpoint:
            raise CalibrationError(
                f"{path}: statistics of another checkpoint: expected {checkpoint[:12]}…, found "
                f"{found.checkpoint[:12]}…",
                hint=AGAIN,
            )
        if not found.complete:
            raise CalibrationError(
                f"{path}: of a calibration that was cut off after {found.runs} runs", hint=AGAIN
            )
        return found

    @classmethod
    def unfinished(cls, path: Path, key: str) -> Statistics | None:
        """Return what an earlier build has seen so far, or all of it; None where there is nothing
        that was made from the same."""
        try:
            found = cls._read(path)
        except CalibrationError:
            return None
        return found if found.key == key else None

    @classmethod
    def _read(cls, path: Path) -> Statistics:
        try:
            with safe_open(path, framework="pt") as stream:
                about = json.loads((stream.metadata() or {})["calibration"])
                if about.get("version") != VERSION:
                    raise CalibrationError(
                        f"{path}: statistics of version {about.get('version')}, expected {VERSION}",
                        hint=AGAIN,
                    )
                names = {key.rpartition("/")[0] for key in stream.keys()}  # noqa: SIM118
                layers = {}
                for name in sorted(names):
                    read = {
                        part: stream.get_tensor(f"{name}/{part}")
                        for part in ("channel_max", "channel_square", "counts", "totals")
                    }
                    rows, top, output_square = read.pop("totals").tolist()
                    layers[name] = Observer(
                        rows=int(rows), top=top, output_square=output_square, **read
                    )
            prompts = tuple(about["prompts"])
            rest = {name: about[name] for name in ("key", "runs", "complete")}
            return cls(about["checkpoint"], prompts, layers, **rest)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CalibrationError(
                f"{path}: not a file of statistics: {error}", hint=AGAIN
            ) from None
