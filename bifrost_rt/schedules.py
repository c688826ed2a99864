"""Which tokens are revealed when, which noise level follows which, and where randomness comes from.

Pure functions of numpy, pinned by recorded values of the reference.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.manifest import Scheduler

# Denoising steps that are always computed: the first ones set the layout, and a line takes two.
WARM_UP = 3
# Streams of one seed: the reveal order and the noise never share random numbers.
_ORDER, _NOISE = 0, 1


def kept_counts(num_tokens: int, decoding_steps: int) -> list[int]:
    """Say how many places are still masked after each decoding step (cosine schedule of MaskGIT).

    In float64: float32 rounds cos(pi/3) to the wrong side. The last step reveals all that is left;
    with more steps than tokens some steps reveal none.
    """
    if not num_tokens:
        return [0] * decoding_steps
    kept, masked = [], num_tokens
    for step in range(decoding_steps - 1):
        ratio = math.cos(math.pi / 2 * (step + 1) / decoding_steps)
        masked = max(1, min(masked - 1, math.floor(num_tokens * ratio)))
        kept.append(masked)
    return [*kept, 0]


def reveal_counts(num_tokens: int, decoding_steps: int) -> list[int]:
    """Say how many places each decoding step reveals."""
    kept = [num_tokens, *kept_counts(num_tokens, decoding_steps)]
    return [before - after for before, after in itertools.pairwise(kept)]


def active_steps(num_tokens: int, decoding_steps: int) -> int:
    """Say how many decoding steps reveal anything; the others change nothing and are not run."""
    return sum(count > 0 for count in reveal_counts(num_tokens, decoding_steps))


def most_revealed(num_tokens: int, decoding_steps: int) -> int:
    """Return the most places that one step reveals."""
    return max(reveal_counts(num_tokens, decoding_steps))


def reveal_masks(
    order: NDArray[np.integer], decoding_steps: int, masked: NDArray[np.bool_] | None = None
) -> NDArray[np.bool_]:
    """Return the places that leave the mask in each step.

    Args:
        order: [n, N], per image a permutation of its places; the last of it are revealed first.
        masked: [n, N], the places that begin in the mask; None: all. The order of the others says
            nothing, and the schedule is that of as many places as are masked.

    Returns:
        bool [decoding_steps, n, N]; every masked place is true in exactly one step.
    """
    if masked is None:
        masked = np.ones(order.shape, bool)
    wanted = np.take_along_axis(masked, order, axis=1)
    ranks = np.where(wanted, np.cumsum(wanted, axis=1) - 1, order.shape[1])
    rank = np.empty_like(ranks)  # rank[i, place]: where the place stands among those masked
    np.put_along_axis(rank, order, ranks, axis=1)
    counts = [int(count) for count in masked.sum(axis=1)]
    before = np.array([[count, *kept_counts(count, decoding_steps)] for count in counts])
    left = before.T[:, :, None]  # [decoding_steps + 1, n, 1]
    return np.stack([(rank < a) & (rank >= b) for a, b in itertools.pairwise(left)])


def reveal_rows(masks: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Masks [steps, images, N] as the row numbers that a decoding step gathers by.

    Returns:
        places: [steps, images, K], the places that a step predicts: those that it reveals, in
            order, then others up to the largest step's number.
        sources: [steps, images, N], where each place's token comes from, as a row of
            [tokens of all images; predictions of all images]: [images*N + images*K].
    """
    _, images, num_tokens = masks.shape
    most = int(masks.sum(axis=-1).max())
    places = np.argsort(~masks, axis=-1, kind="stable")[..., :most]
    kept = np.arange(images * num_tokens).reshape(images, num_tokens)
    first = images * num_tokens + most * np.arange(images)[:, None]
    predicted = first + np.cumsum(masks, axis=-1) - 1
    return np.ascontiguousarray(places), np.where(masks, predicted, kept)


def joined_regions(
    sources: NDArray[np.int64], masks: NDArray[np.bool_], regions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Let the rows that decode one image take each position from the row of its region, so that all
    of them hold the same tokens.

    Args:
        sources, masks: [steps, images * rows, N], as `reveal_rows` gives and takes them; the rows
            of an image reveal the same.
        regions: [images, N], the row of its image that predicts a position.
    """
    steps, _, num_tokens = sources.shape
    of_image = sources.reshape(steps, len(regions), -1, num_tokens)
    at = np.broadcast_to(regions[None, :, None, :], (steps, len(regions), 1, num_tokens))
    chosen = np.take_along_axis(of_image, at, axis=2)
    return np.where(masks.reshape(of_image.shape), chosen, of_image).reshape(sources.shape)


def sigmas(steps: int, image_seq_len: int, scheduler: Scheduler) -> NDArray[np.float32]:
    """Noise levels of a FLUX denoising run, [steps + 1], from 1 to 0.

    Source: diffusers' FluxPipeline (linspace, `calculate_shift`) and
    FlowMatchEulerDiscreteScheduler (`time_shift`), in float32 as there.
    """
    levels = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if scheduler.use_dynamic_shifting:
        slope = (scheduler.max_shift - scheduler.base_shift) / (
            scheduler.max_image_seq_len - scheduler.base_image_seq_len
        )
        mu = image_seq_len * slope + (scheduler.base_shift - slope * scheduler.base_image_seq_len)
        shifted = math.exp(mu) / (math.exp(mu) + (1 / levels - 1))
    else:
        shifted = scheduler.shift * levels / (1 + (scheduler.shift - 1) * levels)
    return np.append(shifted.astype(np.float32), np.float32(0))


def timesteps(levels: NDArray[np.float32], scheduler: Scheduler) -> NDArray[np.float32]:
    """Return what the networks' timestep embedding sees, [steps], for `levels` [steps + 1].

    The scheduler multiplies, the pipeline divides and the network multiplies again; each rounds in
    float32, so each is done here.
    """
    scheduled = levels[:-1] * np.float32(scheduler.num_train_timesteps)
    return (scheduled / np.float32(1000)) * np.float32(1000)


@dataclass(frozen=True)
class DenoisingPlan:
    """Which denoising steps are computed, and how each moves the latents.

    Attributes:
        computed: [steps], false where a step's velocity is extrapolated.
        reached: [steps], the noise level of the latents after each step. What is extrapolated
            after a computed step is part of that step.
        weights: [computed steps, 2], of the step's velocity and of that of the computed step before
            it, in what is added to the latents.
    """

    computed: tuple[bool, ...]
    reached: NDArray[np.float32]
    weights: NDArray[np.float32]


def computed_steps(steps: int, interval: int) -> list[bool]:
    """Return which denoising steps are computed: the first ones, then every `interval`-th."""
    return [i < WARM_UP or (i - WARM_UP + 1) % interval == 0 for i in range(steps)]


def denoising_plan(levels: NDArray[np.float32], interval: int) -> DenoisingPlan:
    """Euler steps over `levels` [steps + 1], of which every `interval`-th is computed.

    The others take their velocity on the straight line, in the noise level, through the two
    velocities computed last: TaylorSeer's forecast of first order (arXiv 2503.06923), applied to
    what the network puts out. The schedule is fixed and linear in the velocities, so it comes down
    to two weights for each computed step. With an interval of 1 these are the Euler step's and 0.
    """
    steps = len(levels) - 1
    computed = computed_steps(steps, interval)
    at = [i for i in range(steps) if computed[i]]
    weights = np.zeros((len(at), 2), np.float32)
    reached = np.empty(steps, np.float32)
    for k, (now, after) in enumerate(itertools.pairwise([*at, steps])):
        reached[now:after] = levels[after]
        weights[k, 0] = levels[after] - levels[now]
        if k and after > now + 1:
            x = levels.astype(np.float64)
            slope = (x[now + 1 : after] - x[now]) / (x[now] - x[at[k - 1]])
            forecast = float(np.sum((x[now + 2 : after + 1] - x[now + 1 : after]) * slope))
            weights[k] += np.float32(forecast), np.float32(-forecast)
    return DenoisingPlan(tuple(computed), reached, weights)


def random_orders(seed: int, images: int, num_tokens: int) -> NDArray[np.int64]:
    """Reveal orders [images, N]. Image i depends on (seed, i) alone, not on the batch."""
    rows = [_generator(seed, i, _ORDER).permutation(num_tokens) for i in range(images)]
    return np.stack(rows).astype(np.int64)


def random_latents(seed: int, images: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return starting noise [images, *shape], standard normal. Image i depends on (seed, i)
    alone."""
    rows = [_generator(seed, i, _NOISE).standard_normal(shape) for i in range(images)]
    return np.stack(rows).astype(np.float32)


def _generator(seed: int, image: int, stream: int) -> np.random.Generator:
    # Philox is counter-based: the same numbers on every platform, independent by key.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, image, stream))))
