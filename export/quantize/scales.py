"""Statistics -> the numbers of a quantized layer: its input's scale, and its smoothing.

Errors are predicted, not measured, from what calibration recorded: a value rounded to steps of s
is off by s²/12 in the mean square, and such errors add up along a row of the weight. The sweep
measures what they do to the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from export.quantize.formats import FORMATS, activation_scale
from export.quantize.rounding import SMALLEST
from export.quantize.statistics import Observer

PERCENTILE = 0.9999
OUTPUTS = 512  # of a weight that are computed with at once
CLIPS = torch.linspace(0.02, 1.0, 99, dtype=torch.float64)
# Migration strengths that are tried (SmoothQuant, arXiv 2211.10438), and what one must gain to be
# worth a multiplication of its own: a quarter of the error, 6 dB.
STRENGTHS = (0.25, 0.5, 0.75)
GAIN = 4.0


@dataclass(frozen=True)
class Scales:
    """Attributes:
    input_scale: of the activations; None where they stay as they are.
    smoothing: [K] factors of the inputs, or None.
    signal_to_noise: predicted, of the layer's output, in dB; None where it is not predicted.
    note: why there is a smoothing; empty where there is none.
    """

    input_scale: float | None
    smoothing: Tensor | None = None
    signal_to_noise: float | None = None
    note: str = ""


def clip(seen: Observer, method: str, fmt: str) -> float:
    """Return the largest magnitude that the input's scale holds, by "mse", "percentile" or "max".

    Formats of floating point keep their relative precision however large their range is, so they
    take the maximum: clipping can only lose.
    """
    if method == "max" or not FORMATS[fmt].even:
        return seen.largest
    width = seen.top / len(seen.counts)
    ends = torch.arange(1, len(seen.counts) + 1, dtype=torch.float64) * width
    if method == "percentile":
        share = seen.counts.cumsum(0) / seen.counts.sum()
        return min(float(ends[int((share < PERCENTILE).sum())]), seen.largest)
    middles = ends - width / 2
    candidates = CLIPS * seen.largest
    beyond = (middles - candidates[:, None]).clamp(min=0).square()
    errors = (beyond * seen.counts).sum(1)
    inside = (middles <= candidates[:, None]).to(torch.float64) @ seen.counts
    errors += inside * (candidates / FORMATS[fmt].largest).square() / 12
    return float(candidates[errors.argmin()])


def choose(seen: Observer, weight: Tensor, fmt: str, method: str) -> Scales:
    """Return the scales of one layer.

    Args:
        weight: float32 [K, N].
    """
    if not FORMATS[fmt].calibrated:
        return Scales(None)
    largest = clip(seen, method, fmt)
    if not FORMATS[fmt].even:
        return Scales(activation_scale(largest, fmt))
    steps = FORMATS[fmt].largest
    squares = seen.channel_square / max(1, seen.rows)
    energy, magnitude = of_inputs(weight)
    lost = clipped(seen, largest) * float(energy.sum()) / weight.shape[0]
    plain = input_noise(energy, largest, steps) + weight_noise(weight, squares, steps) + lost
    best, smoothing, note = plain, None, ""
    for strength in STRENGTHS:
        factors = smoothing_factors(seen.channel_max, magnitude, strength)
        moved = seen.channel_max * factors
        wide = factors.double().square()
        noise = input_noise(energy / wide, float(moved.max()), steps)
        if noise * GAIN >= plain or noise >= best:
            continue  # the weight's own error comes on top, and costs a pass over the weight
        noise += weight_noise(weight, squares * wide, steps, factors)
        if noise * GAIN < plain and noise < best:
            best, smoothing, largest = noise, factors, float(moved.max())
            gained = 10 * math.log10(plain / noise)
            note = f"outliers migrate into the weights, strength {strength}: {gained:.0f} dB"
    power = seen.output_square / max(1, seen.rows)
    return Scales(
        activation_scale(largest, fmt),
        smoothing,
        10 * math.log10(max(power, SMALLEST) / max(best, SMALLEST)),
        note,
    )


def clipped(seen: Observer, largest: float) -> float:
    """Mean over the input's values of the squared part beyond `largest`, summed over a row."""
    width = seen.top / len(seen.counts)
    middles = (torch.arange(len(seen.counts), dtype=torch.float64) + 0.5) * width
    beyond = (middles - largest).clamp(min=0).square()
    return float((beyond * seen.counts).sum()) / max(1, seen.rows)


def of_inputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight [K, N], what each input meets: sum of squares and largest magnitude, [K] each."""
    energy = torch.zeros(weight.shape[0], dtype=torch.float64)
    magnitude = torch.zeros(weight.shape[0])
    for part in _parts(weight):
        energy += part.square().sum(1, dtype=torch.float64)
        magnitude = torch.maximum(magnitude, torch.maximum(part.amax(1), -part.amin(1)))
    return energy, magnitude


def input_noise(energy: Tensor, largest: float, levels: float) -> float:
    """Mean square error of a row of outputs, summed over its values, from rounded inputs.

    Args:
        energy: [K] sums of squares of the weights that the inputs meet.
        largest: what the inputs' scale holds.
        levels: evenly spaced steps up to it.
    """
    return (largest / levels) ** 2 * float(energy.sum()) / 12


def weight_noise(
    weight: Tensor, squares: Tensor, levels: float, factors: Tensor | None = None
) -> float:
    """Return the same from a rounded weight [K, N].

    Args:
        squares: [K] mean squares of the inputs; with `factors`, of the inputs times these.
        factors: [K] of the inputs, whose inverse the weight takes.
    """
    steps = 0.0
    for part in _parts(weight):
        moved = part if factors is None else part / factors[:, None]
        largest = torch.maximum(moved.amax(0), -moved.amin(0)).double()
        steps += float((largest / levels).square().sum())
    return float(squares.sum()) * steps / 12


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Of all inputs and some outputs each: whole copies would be the most memory of a build."""
    return weight.split(OUTPUTS, dim=1)


def smoothing_factors(channel_max: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """Factors [K] of the inputs; the weights take their inverse. Their geometric mean is 1, and
    channels that are always 0 keep theirs.

    Args:
        channel_max, magnitude: [K] the largest of each input, and of the weights that it meets.
    """
    inputs, weights = channel_max.clamp(min=1e-5), magnitude.clamp(min=1e-5)
    factors = weights ** (1 - strength) / inputs**strength
    factors = torch.where(channel_max > 0, factors, torch.ones_like(factors))
    return factors / factors.log().mean().exp()
