"""A memory budget changes when engines come and go, and nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from bifrost_rt import (
    BackendError,
    BudgetError,
    Generator,
    dims,
    manifest,
    memory_plan,
    pipeline,
    schedules,
)
from bifrost_rt.backends.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from bifrost_rt.cli import main
from bifrost_rt.manifest import EngineSpec, Manifest, Range

FEW: dict[str, Any] = {"num_inference_steps": 2, "decoding_steps": 4, "output_type": "np"}


class Watched(OnnxRuntime):
    """onnxruntime, with a record of every engine that is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.sessions: dict[str, weakref.ref[Any]] = {}

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeEngine:
        engine = super().open(folder, spec, dimensions)
        self.opened.append(spec.name)
        self.sessions[spec.name] = weakref.ref(engine._session)
        return engine

    def alive(self) -> set[str]:
        gc.collect()
        return {name for name, session in self.sessions.items() if session() is not None}


@pytest.fixture(scope="module")
def facts(alpha_set: Path) -> Manifest:
    return manifest.read(alpha_set)


def needs(facts: Manifest, **sizes: Any) -> list[memory_plan.Requirement]:
    order = dims.drawing(facts.engines)
    return memory_plan.needs(
        facts, order, memory_plan.sizes(facts, **sizes), OnnxRuntime().weights_in_memory
    )


def half(facts: Manifest) -> int:
    return sum(need.resident for need in needs(facts)) // 2


def test_half_the_memory_gives_the_same_bits(
    generator: Generator, alpha_set: Path, facts: Manifest
) -> None:
    backend = Watched()
    expected = [generator.run(p, seed=5, cfg_weight=2.0, **FEW) for p in ("a cow", "a blue van")]
    with Generator(alpha_set, backend=backend, memory_budget=half(facts)) as small:
        assert backend.opened == []
        found = [small.run(p, seed=5, cfg_weight=2.0, **FEW) for p in ("a cow", "a blue van")]
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.images, b.images)
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.latents, b.latents)
    # the second image found some engines where the first had left them
    assert (
        len(dims.drawing(facts.engines))
        < len(backend.opened)
        < 2 * len(dims.drawing(facts.engines))
    )


def test_an_engine_that_left_is_gone(alpha_set: Path, facts: Manifest) -> None:
    """Its session is freed: nothing of the loops or of the run holds on to it."""
    backend, most = Watched(), 0
    weight = {need.engine: need.resident for need in needs(facts)}

    def count(*_: Any) -> None:
        nonlocal most
        alive = backend.alive()
        resident, arriving = set(small._engines.resident), set(small._engines.arriving)
        assert resident <= alive <= resident | arriving
        most = max(most, sum(weight[name] for name in resident | arriving))

    with Generator(alpha_set, backend=backend, memory_budget=half(facts)) as small:
        for _ in range(2):
            small.run("a cow", seed=1, callback_on_step_end=count, **FEW)
        assert backend.alive() == set(small._engines.resident)
    assert 0 < most <= half(facts)
    assert backend.alive() == set()


def test_modulation_leaves_before_the_loop(alpha_set: Path, facts: Manifest) -> None:
    need = {n.engine: n for n in needs(facts)}
    budget = max(n.total for n in need.values()) + need["conditioning"].resident // 2
    with Generator(alpha_set, memory_budget=budget) as small:
        seen: list[tuple[str, ...]] = []
        small.run(
            "a cow",
            **FEW,
            callback_on_step_end=lambda g, *_: seen.append(g._engines.resident),
        )
    assert "denoise" in seen[-1]
    assert "conditioning" not in seen[-1]


def test_the_next_engine_arrives_while_one_works(
    generator: Generator, alpha_set: Path, facts: Manifest
) -> None:
    seen: dict[str, set[str]] = {"tokens": set(), "latents": set()}

    def look(g: Generator, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
        here = {*g._engines.arriving, *g._engines.resident}
        seen["tokens" if timestep is None else "latents"] |= here

    with Generator(alpha_set, memory_budget=half(facts)) as small:
        found = small.run("a cow", seed=5, callback_on_step_end=look, **FEW)
    assert "clip_text" in seen["tokens"]  # the next stage's
    assert "t5_text" not in seen["tokens"]  # the one after it
    assert np.array_equal(found.images, generator.run("a cow", seed=5, **FEW).images)


def test_an_engine_that_fails_on_its_way_fails_at_its_stage(
    alpha_set: Path, facts: Manifest
) -> None:
    class Broken(Watched):
        broken = True

        def open(
            self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
        ) -> OnnxRuntimeEngine:
            if spec.name == "vae_decode" and self.broken:
                raise BackendError("engine `vae_decode`: no room")
            return super().open(folder, spec, dimensions)

    backend = Broken()
    with Generator(alpha_set, backend=backend, memory_budget=half(facts)) as small:
        with pytest.raises(BackendError, match="vae_decode"):
            small.run("a cow", seed=1, **FEW)
        backend.broken = False
        small.run("a cow", seed=1, **FEW)


def test_a_failed_run_leaves_a_generator_that_runs(alpha_set: Path, facts: Manifest) -> None:
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    with Generator(alpha_set, memory_budget=half(facts)) as small:
        with pytest.raises(Stop):
            small.run("a cow", seed=1, callback_on_step_end=stop, **FEW)
        first = small.run("a cow", seed=1, **FEW)
    with Generator(alpha_set) as whole:
        assert np.array_equal(whole.run("a cow", seed=1, **FEW).images, first.images)


class Counted(OnnxRuntime):
    """onnxruntime, with a count of what is allocated and bound."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated = self.bound = 0

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        self.allocated += 1
        return super().empty(shape, dtype)

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeEngine:
        engine = super().open(folder, spec, dimensions)
        bind = engine.bind

        def counted(*buffers: Any) -> Any:
            self.bound += 1
            return bind(*buffers)

        engine.bind = counted  # type: ignore[method-assign]
        return engine


def test_the_next_image_uses_the_same_buffers(alpha_set: Path) -> None:
    backend = Counted()
    with Generator(alpha_set, backend=backend) as whole:
        first = whole.run("a red cow", seed=1, **FEW)
        kept = first.images.copy(), first.tokens.copy(), first.latents.copy()
        before = backend.allocated, backend.bound
        assert min(before) > 0
        again = whole.run("a red cow", seed=2, **FEW)
        assert (backend.allocated, backend.bound) == before
        assert not np.array_equal(again.images, first.images)
        # what a result holds is its own
        assert np.array_equal(first.images, kept[0])
        assert np.array_equal(first.tokens, kept[1])
        assert np.array_equal(first.latents, kept[2])
        # other sizes get buffers of their own, and the first ones' images come back the same
        two = whole.run(["a red cow", "a cow by the sea"], seed=1, **FEW)
        assert backend.allocated > before[0]
        assert np.array_equal(whole.run("a red cow", seed=1, **FEW).images, kept[0])
    np.testing.assert_allclose(two.images[0].astype(int), kept[0][0], atol=1)


def test_within_a_budget_buffers_go_with_their_stage(alpha_set: Path, facts: Manifest) -> None:
    backend = Counted()
    options: dict[str, Any] = {"memory_budget": half(facts), "prompt_cache": 0}
    with Generator(alpha_set, backend=backend, **options) as small:
        small.run("a cow", seed=1, **FEW)
        before = backend.allocated
        small.run("a cow", seed=1, **FEW)
        assert backend.allocated == 2 * before


def test_without_a_budget_everything_stays(alpha_set: Path, facts: Manifest) -> None:
    backend = Watched()
    with Generator(alpha_set, backend=backend) as whole:
        assert set(backend.opened) == set(dims.drawing(facts.engines))
        whole.run("a cow", **FEW)
        whole.run("a cow", **FEW)
    assert len(backend.opened) == len(dims.drawing(facts.engines))


def test_what_cannot_fit_is_refused_before_anything_is_opened(alpha_set: Path) -> None:
    backend = Watched()
    with pytest.raises(BudgetError, match="memory budget 1 MiB: engine `.*` needs .* by itself"):
        Generator(alpha_set, backend=backend, memory_budget="1MiB")
    assert backend.opened == []


def test_too_many_images_are_refused_before_the_run(alpha_set: Path, facts: Manifest) -> None:
    backend = Watched()
    most = max(need.total for need in needs(facts, num_inference_steps=2))
    with Generator(alpha_set, backend=backend, memory_budget=max(most, half(facts))) as small:
        with pytest.raises(BudgetError, match="hint: draw one image at a time"):
            small.run("a cow", num_images_per_prompt=500, **FEW)
        assert backend.opened == []
        small.run("a cow", **FEW)


def test_a_driver_that_keeps_16_bit_is_told_to_build_it(alpha_set: Path, facts: Manifest) -> None:
    class Compact(Watched):
        def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
            return stored

    sized = memory_plan.needs(
        facts,
        dims.drawing(facts.engines),
        memory_plan.sizes(facts),
        Compact().weights_in_memory,
    )
    budget = max(need.total for need in sized) - 1000
    with pytest.raises(BudgetError, match="hint: rebuild the set with .* --precision bf16"):
        Generator(alpha_set, backend=Compact(), memory_budget=budget)


def test_too_many_images_are_refused_before_their_noise_is_drawn(
    alpha_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Generator(alpha_set, memory_budget="256MiB") as generator:
        for name in ("random_latents", "random_orders"):
            monkeypatch.setattr(schedules, name, None)  # would fail in another way
        seen = {"callback_on_step_end": lambda *step: None, "preview_every": 1}
        for options in ({}, seen):
            with pytest.raises(BudgetError, match="memory budget 256 MiB: engine ") as refused:
                generator.run("a cow", num_images_per_prompt=4000, **options)
            assert "draw one image at a time" in str(refused.value.hint)
        monkeypatch.undo()
        generator.run("a cow", **FEW)


def test_the_command_line_takes_a_budget(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.png"
    arguments = ["generate", "a", "--engines", str(alpha_set), "-o", str(out)]
    assert main([*arguments, "--memory-budget", "2kB"]) == 1
    assert capsys.readouterr().err.startswith("error: memory budget 2 KiB: engine `")
    assert main([*arguments, "--memory-budget", "2GB", "--num-inference-steps", "1"]) == 0
    assert out.exists()


def test_a_requests_stages_are_those_that_run(generator: Generator, facts: Manifest) -> None:
    assert dims.drawing(facts.engines) == list(
        pipeline.used_engines(_checked(generator, output_type="np"))
    )
    tokens = np.zeros((1, facts.model.num_visual_tokens, facts.model.hidden_size), np.float32)
    again = pipeline.used_engines(_checked(generator, tokens=tokens, output_type="latent"))
    assert again == ("clip_text", "t5_text", "conditioning", "control_embed", "denoise")


def _checked(generator: Generator, **changes: Any) -> Any:
    from bifrost_rt import request

    asked = {"prompt": "a cow", "seed": 1}
    return request.check(generator.manifest, **{**asked, **changes})


def test_the_default_is_what_the_device_has_free_less_a_tenth(
    alpha_set: Path, facts: Manifest
) -> None:
    class Small(Watched):
        def free_memory(self) -> int:
            return int(half(facts) / (1 - memory_plan.MARGIN)) + 1

    backend = Small()
    with Generator(alpha_set, backend=backend) as small:
        assert backend.opened == []
        small.run("a cow", **FEW)
        assert small._engines.budget == pytest.approx(half(facts), abs=2)


def test_where_a_device_does_not_say_everything_is_opened(alpha_set: Path, facts: Manifest) -> None:
    class Silent(Watched):
        def free_memory(self) -> None:
            return None

    backend = Silent()
    with Generator(alpha_set, backend=backend):
        assert len(backend.opened) == len(dims.drawing(facts.engines))
