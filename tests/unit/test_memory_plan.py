"""Which engines are in memory when: the policy, on numbers alone."""

from __future__ import annotations

import random

import pytest

from bifrost_rt import memory_plan
from bifrost_rt.errors import BudgetError, RequestError, RequestTypeError
from bifrost_rt.manifest import EngineSpec, Precision, TensorSpec
from bifrost_rt.memory_plan import Requirement, Step, schedule

GB = 10**9
# Bifrost-1 of 7B at 8 bit: GB of weights, in the order of use.
RELEASE = {
    "mllm_text": 7.1,
    "visual_decode": 6.5,
    "clip_text": 0.1,
    "t5_text": 4.8,
    "conditioning": 3.6,
    "denoise": 9.4,
    "vae_decode": 0.1,
}


def release(scratch: float = 0.0) -> list[Requirement]:
    return [Requirement(name, int(w * GB), int(scratch * GB)) for name, w in RELEASE.items()]


def follow(
    steps: tuple[Step, ...], needs: list[Requirement], resident: dict[str, int]
) -> list[int]:
    """Bytes in memory at each stage, as an executor that obeys has them."""
    taken = []
    for step, need in zip(steps, needs, strict=True):
        for engine in step.evict:
            del resident[engine]
        assert step.load == (need.engine not in resident)
        resident[need.engine] = max(need.resident, resident.get(need.engine, 0))
        resident.update((n.engine, n.resident) for n in needs if n.engine in step.prefetch)
        taken.append(sum(resident.values()) + need.tensors)
    return taken


def test_where_everything_fits_nothing_leaves() -> None:
    steps = schedule(release(), 32 * GB)
    assert memory_plan.everything_fits(steps)
    assert all(step.load for step in steps)
    again = schedule(release(), 32 * GB, {n.engine: n.resident for n in release()})
    assert not any(step.load or step.evict for step in again)


def test_the_next_engine_is_loaded_ahead_where_there_is_room() -> None:
    steps = schedule(release(), 12 * GB, prefetch=True)
    coming = {step.engine: step.prefetch for step in steps if step.prefetch}
    # 6.5 beside 7.1, 3.6 beside 6.5 + 0.1 + 4.8, or 9.4 beside 3.6 + 4.8 is more than 12
    assert coming == {
        "visual_decode": ("clip_text",),
        "clip_text": ("t5_text",),
        "denoise": ("vae_decode",),
    }
    assert [step.load for step in steps] == [True, True, False, False, True, True, False]
    assert max(step.peak for step in steps) <= 12 * GB


def test_nothing_is_loaded_ahead_unless_asked() -> None:
    assert not any(step.prefetch for step in schedule(release(), 32 * GB))


def test_modulation_leaves_before_the_loop() -> None:
    denoise = schedule(release(), 12 * GB)[5]
    assert denoise.engine == "denoise"
    assert "conditioning" in denoise.evict


def test_8_bit_runs_in_12_gb() -> None:
    assert max(step.peak for step in schedule(release(), 12 * GB)) <= 12 * GB


def test_what_fits_stays_for_the_next_image() -> None:
    """At 14 GB the small engines never have to leave."""
    needs, resident = release(), {}
    follow(schedule(needs, 14 * GB), needs, resident)
    second = schedule(needs, 14 * GB, dict(resident))
    loaded = {step.engine for step in second if step.load}
    assert not loaded & {"clip_text", "vae_decode"}


@pytest.mark.parametrize("prefetch", [False, True])
def test_images_after_the_first_find_what_it_has_left(prefetch: bool) -> None:
    needs, resident = release(), {}
    first, later = memory_plan.schedules_of(needs, 14 * GB, prefetch=prefetch)
    assert first == schedule(needs, 14 * GB, prefetch=prefetch)
    follow(first, needs, resident)
    assert later == schedule(needs, 14 * GB, dict(resident), prefetch=prefetch)
    loads = [sum(step.load + len(step.prefetch) for step in steps) for steps in (first, later)]
    assert loads[1] < loads[0] == len(needs)


def test_the_stage_that_just_ended_leaves_first() -> None:
    needs = [Requirement(name, 10) for name in "abcd"]
    steps = schedule(needs, 30, {"a": 10, "b": 10, "c": 10})
    assert [step.evict for step in steps] == [(), (), (), ("c",)]


@pytest.mark.parametrize("seed", range(200))
def test_memory_never_exceeds_the_budget(seed: int) -> None:
    """Any sizes, run after run, with runs that skip stages and runs of other sizes between."""
    rng = random.Random(seed)
    resident: dict[str, int] = {}
    weights = {name: rng.randrange(1, 100) for name in "abcdefg"}
    budget = rng.randrange(160, 400)
    for _ in range(6):
        needs = [
            Requirement(name, size, rng.randrange(40), rng.randrange(20))
            for name, size in weights.items()
            if rng.random() < 0.8
        ]
        steps = schedule(needs, budget, resident, prefetch=rng.random() < 0.5)
        taken = follow(steps, needs, resident)
        assert taken == [step.peak for step in steps]
        assert max(taken, default=0) <= budget


def test_a_few_stay_where_that_loads_less() -> None:
    """The release in 4 bits on 12 GB: two stay, and the three largest come for each image."""
    sizes = {"text": 5.9, "decode": 3.7, "t5": 2.9, "modulation": 2.1, "denoise": 5.4}
    needs = [Requirement(name, int(size * GB)) for name, size in sizes.items()]
    budget = 11 * GB
    here: dict[str, int] = {}
    loaded = []
    for _ in range(5):
        steps = schedule(needs, budget, here)
        follow(steps, needs, here)
        loaded.append(sum(int(sizes[step.engine] * GB) for step in steps if step.load))
    assert loaded[0] == sum(need.weights for need in needs)
    assert loaded[1:] == [int(5.9 * GB) + int(3.7 * GB) + int(5.4 * GB)] * 4
    # where all are of one size, taking turns loads less than letting some stay
    needs = [Requirement(name, 10) for name in "abcd"]
    here = {}
    turns = [schedule(needs, 30, here)]
    follow(turns[0], needs, here)
    for _ in range(3):
        turns.append(schedule(needs, 30, here))
        follow(turns[-1], needs, here)
    assert sum(step.load for steps in turns[1:] for step in steps) == 4


def test_a_stage_that_cannot_fit_is_refused_by_name() -> None:
    with pytest.raises(BudgetError) as caught:
        schedule(release(scratch=1.0), 8 * GB)
    message = str(caught.value)
    assert "memory budget 7.5 GiB: engine `denoise` needs 9.7 GiB by itself" in message
    assert "too large are `mllm_text`, `denoise`" in message
    assert "hint: give it at least 9.7 GiB" in message


def spec(*shapes: tuple[int | str, ...], outputs: tuple[int | str, ...] = (1,)) -> EngineSpec:
    return EngineSpec(
        name="x",
        graph="x.onnx",
        files=(),
        inputs=tuple(TensorSpec(f"i{n}", "float32", shape) for n, shape in enumerate(shapes)),
        outputs=(TensorSpec("o", "int64", outputs),),
        state=(),
        precision=Precision("fp32", "float32", "float32"),
        scratch_bytes=1000,
    )


SIZES = {"images": 3, "prompts": 2, "texts": 3, "branches": 2, "text_tokens": 7, "steps": 56}


def test_tensors_are_counted_at_the_runs_sizes() -> None:
    door = spec(("images", 5), ("branches", "text_tokens"), outputs=("steps",))
    assert memory_plan.tensor_bytes(door, SIZES) == 4 * 15 + 4 * 14 + 8 * 56


@pytest.mark.parametrize(
    ("door", "factor"),
    [
        (spec(("images", 5)), 3),
        (spec(("prompts", 5)), 2),
        (spec(("branches", "images", 5)), 6),
        (spec(("steps", 2), ("images", 5)), 3),
        (spec(("images", 5), outputs=("steps", "images")), 6),
        (spec((1,)), 1),
    ],
)
def test_scratch_memory_grows_with_what_is_computed_at_once(
    door: EngineSpec, factor: float
) -> None:
    assert memory_plan.growth(door, SIZES) == factor


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (12, 12),
        ("12", 12),
        ("8GiB", 8 << 30),
        ("7.5 GB", 7_500_000_000),
        ("900m", 900 << 20),
        (" 1 kb ", 1000),
    ],
)
def test_budgets_are_bytes_or_text(text: int | str, size: int) -> None:
    assert memory_plan.parse(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 gibi", "-1GB", "1e9", 0])
def test_what_is_no_size_is_named(text: int | str) -> None:
    with pytest.raises(RequestError, match="memory_budget"):
        memory_plan.parse(text)


@pytest.mark.parametrize("value", [1.5, True, None])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(RequestTypeError, match="like '8GiB'"):
        memory_plan.parse(value)  # type: ignore[arg-type]
