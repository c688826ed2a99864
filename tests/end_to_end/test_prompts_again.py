"""Nothing is computed or loaded twice: prompts that come again, and requests that wait together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import (
    Generator,
    NumericsError,
    RequestError,
    dims,
    manifest,
    memory_plan,
    pipeline,
    request,
)
from bifrost_rt.backends.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from bifrost_rt.cli import main
from bifrost_rt.manifest import EngineSpec, Manifest, Range
from bifrost_rt.pipeline import Output

TEXT = {"mllm_text", "clip_text", "t5_text", "conditioning"}
FEW: dict[str, Any] = {"num_inference_steps": 2, "decoding_steps": 4, "output_type": "np"}


class Watched(OnnxRuntime):
    """onnxruntime, with a record of every engine that is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeEngine:
        self.opened.append(spec.name)
        return super().open(folder, spec, dimensions)


@pytest.fixture(scope="module")
def facts(alpha_set: Path) -> Manifest:
    return manifest.read(alpha_set)


def small_budget(facts: Manifest) -> int:
    """Half of what the open engines hold."""
    order = dims.drawing(facts.engines)
    in_memory = OnnxRuntime().weights_in_memory
    needs = memory_plan.needs(facts, order, memory_plan.sizes(facts), in_memory)
    return sum(need.resident for need in needs) // 2


def same(found: Any, expected: Any) -> bool:
    return all(
        np.array_equal(getattr(found, name), getattr(expected, name))
        for name in ("images", "tokens", "latents")
    )


@pytest.fixture(scope="module")
def uncached(alpha_set: Path) -> Any:
    with Generator(alpha_set, prompt_cache=0) as opened:
        yield opened


def test_a_prompt_that_comes_again_runs_no_text_engine(alpha_set: Path, uncached: Any) -> None:
    with Generator(alpha_set) as generator:
        for options in ({"cfg_weight": 2.0}, {}):
            first = generator.run("a cow", seed=1, **options, **FEW)
            again = generator.run("a cow", seed=1, **options, **FEW)
            other = generator.run("a cow", seed=2, **options, **FEW)
            assert not TEXT & again.timings.keys()
            assert not TEXT & other.timings.keys()
            assert TEXT - {"mllm_text"} <= first.timings.keys() or options == {}
            assert same(again, first)
            for seed, found in ((1, first), (2, other)):
                assert same(found, uncached.run("a cow", seed=seed, **options, **FEW))


@pytest.mark.parametrize(
    ("changed", "computed"),
    [
        ({"num_inference_steps": 3}, {"conditioning"}),
        ({"guidance_scale": 2.0}, {"conditioning"}),
        ({"cfg_weight": 2.0}, {"mllm_text"}),
        ({"num_images_per_prompt": 2}, {"conditioning"}),
        ({"decoding_steps": 2, "controlnet_conditioning_scale": 0.5}, set()),
        ({"prompt": "a dog"}, TEXT),
    ],
)
def test_what_follows_from_an_option_is_computed_and_no_more(
    alpha_set: Path, uncached: Any, changed: dict[str, Any], computed: set[str]
) -> None:
    with Generator(alpha_set) as generator:
        generator.run("a cow", seed=1, **FEW)
        options = {"prompt": "a cow", "seed": 1, **FEW, **changed}
        found = generator.run(**options)
        assert TEXT & found.timings.keys() == computed
        assert same(found, uncached.run(**options))


def test_tokens_that_are_given_find_what_the_prompt_left(alpha_set: Path, uncached: Any) -> None:
    with Generator(alpha_set) as generator:
        first = generator.run("a cow", seed=1, **FEW)
        found = generator.run("a cow", seed=3, tokens=first.tokens, **FEW)
        assert set(found.timings) == {"control_embed", "denoise", "vae_decode", "total"}
        assert same(found, uncached.run("a cow", seed=3, tokens=first.tokens, **FEW))


def test_what_a_callback_or_a_run_does_never_reaches_what_is_kept(
    alpha_set: Path, uncached: Any
) -> None:
    def shift(g: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> Any:
        return {name: array + 1 for name, array in tensors.items()}

    budgets = (None, small_budget(manifest.read(alpha_set)))
    for budget in budgets:  # buffers that stay, and buffers of one run
        with Generator(alpha_set, memory_budget=budget) as generator:
            expected = uncached.run("a cow", seed=1, **FEW)
            for _ in range(2):
                generator.run("a cow", seed=1, callback_on_step_end=shift, **FEW)
                assert same(generator.run("a cow", seed=1, **FEW), expected)


def test_values_that_are_not_finite_are_not_kept(alpha_set: Path, uncached: Any) -> None:
    with Generator(alpha_set) as generator:
        with pytest.raises(NumericsError):
            generator.run("a cow", seed=1, guidance_scale=3e38, **FEW)
        assert same(generator.run("a cow", seed=1, **FEW), uncached.run("a cow", seed=1, **FEW))


def test_within_a_budget_a_prompt_that_comes_again_loads_no_text_engine(
    alpha_set: Path, facts: Manifest, uncached: Any
) -> None:
    backend = Watched()
    with Generator(alpha_set, backend=backend, memory_budget=small_budget(facts)) as generator:
        first = generator.run("a cow", seed=1, **FEW)
        backend.opened.clear()
        again = generator.run("a cow", seed=2, **FEW)
    assert not TEXT & set(backend.opened)
    assert same(first, uncached.run("a cow", seed=1, **FEW))
    assert same(again, uncached.run("a cow", seed=2, **FEW))


def test_no_engine_leaves_for_what_is_kept(alpha_set: Path, facts: Manifest) -> None:
    """At the budget at which all engines just stay, they stay, and nothing is kept."""
    backend = Watched()
    order = dims.drawing(facts.engines)
    at = memory_plan.sizes(facts)
    needs = memory_plan.needs(facts, order, at, OnnxRuntime().weights_in_memory)
    budget = sum(need.resident for need in needs) + max(need.tensors for need in needs)
    with Generator(alpha_set, backend=backend, memory_budget=budget) as generator:
        assert not generator.reloads()
        generator.run("a cow", seed=1, **FEW)
        again = generator.run("a cow", seed=1, **FEW)
        assert again.timings.keys() >= TEXT
    assert len(backend.opened) == len(dims.drawing(facts.engines))


def queue(facts: Manifest, **common: Any) -> list[request.Request]:
    """Eight requests whose settings differ; two share their prompt."""
    texts = ("a cow", "a dog", "a red bus", "a cow", "three cats", "a car", "a tree", "a boat")
    return [
        request.check(
            facts,
            prompt=text,
            **{
                "seed": i,
                "cfg_weight": 1.0 + (i % 3),
                "num_inference_steps": 2 + (i % 2),
                "decoding_steps": 3 + i % 4,
                "num_images_per_prompt": 1 + i % 2,
                "output_type": "latent" if i == 5 else "np",
                **common,
            },
        )
        for i, text in enumerate(texts)
    ]


def test_a_queue_under_half_of_the_memory_opens_every_engine_once(
    alpha_set: Path, facts: Manifest, uncached: Any
) -> None:
    backend, asked = Watched(), queue(facts)
    with Generator(alpha_set, backend=backend, memory_budget=small_budget(facts)) as generator:
        assert generator.reloads()
        found = generator.draw_several(asked)
    assert sorted(backend.opened) == sorted(dims.drawing(facts.engines))
    for one, of in zip(found, asked, strict=True):
        alone: Output = uncached.draw(of)
        assert np.array_equal(one.tokens, alone.tokens)
        assert np.array_equal(one.latents, alone.latents)
        assert (one.images is None) == (alone.images is None)
        assert one.images is None or np.array_equal(one.images, alone.images)


def test_where_everything_stays_one_follows_the_other(alpha_set: Path, facts: Manifest) -> None:
    seen: list[int] = []
    asked = queue(facts)[:3]
    with Generator(alpha_set) as generator:
        generator.draw_several(asked, [lambda *step, i=i: seen.append(i) for i in range(3)])
    assert seen == sorted(seen)


def test_steps_are_told_to_whom_they_belong(alpha_set: Path, facts: Manifest) -> None:
    seen: list[tuple[int, str, int]] = []

    def watch(i: int) -> Any:
        def call(g: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
            ((name, array),) = tensors.items()
            seen.append((i, name, step))
            assert len(array) == asked[i].images

        return call

    asked = queue(facts)[:3]
    with Generator(alpha_set, memory_budget=small_budget(facts)) as generator:
        generator.draw_several(asked, [watch(i) for i in range(3)])
    for i, of in enumerate(asked):
        options = of.parameters
        steps = {"tokens": options.decoding_steps, "latents": options.num_inference_steps}
        assert [one[1:] for one in seen if one[0] == i] == [
            (name, step) for name, count in steps.items() for step in range(count)
        ]
    assert [name for _, name, _ in seen] == sorted((n for _, n, _ in seen), reverse=True)


class Thrifty(Watched):
    """One whose arithmetic takes no memory, so that the tensors decide."""

    scratch_share = 0.0


def test_what_memory_does_not_hold_together_is_drawn_in_parts(
    alpha_set: Path, facts: Manifest, uncached: Any
) -> None:
    """As many side by side as their tensors allow; never refused for being together."""
    backend, images = Thrifty(), 60
    few = {"num_images_per_prompt": images, "num_inference_steps": 1, "output_type": "latent"}
    asked = queue(facts, **few, cfg_weight=2.0, decoding_steps=1)[:4]
    sizes = memory_plan.largest([pipeline.sizes(facts, one) for one in asked])
    order = pipeline.used_engines(asked[0])

    def largest(waiting: int) -> int:
        in_memory = backend.weights_in_memory
        needs = memory_plan.needs(facts, order, sizes, in_memory, backend.scratch_share, waiting)
        return max(need.total for need in needs)

    budget = (largest(2) + largest(4)) // 2
    with Generator(alpha_set, backend=backend, memory_budget=budget, prompt_cache=0) as generator:
        backend.opened.clear()
        found = generator.draw_several(asked)
    assert backend.opened.count("denoise") == 2
    for one, of in zip(found, asked, strict=True):
        assert np.array_equal(one.latents, uncached.draw(of).latents)


def test_one_error_ends_all_and_leaves_the_generator_usable(
    alpha_set: Path, facts: Manifest
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    asked = queue(facts)[:2]
    with Generator(alpha_set, memory_budget=small_budget(facts)) as generator:
        with pytest.raises(ZeroDivisionError):
            generator.draw_several(asked, [None, fail])
        with pytest.raises(RequestError, match="preview_every without callback"):
            generator.draw_several(asked, [None, fail], preview_every=1)
        first, second = generator.draw_several(asked)
        assert first.images is not None
        assert second.images is not None


def test_several_runs_give_what_each_gives(alpha_set: Path, facts: Manifest, uncached: Any) -> None:
    tokens = uncached.run("a cow", seed=1, **FEW).tokens
    runs: list[dict[str, Any]] = [
        {"prompt": ["a dog", "a cow"], "seed": 3, **FEW},
        {"prompt": "a cow", "seed": 4, "tokens": tokens, **FEW, "output_type": "pil"},
        {"prompt": "a cat " * 60, "seed": 5, **FEW},
    ]
    with Generator(alpha_set, memory_budget=small_budget(facts)) as generator:
        found = generator.run_several(runs)
        assert generator.run_several([]) == []
        with pytest.raises(RequestError, match="num_inference_steps"):
            generator.run_several([*runs, {"prompt": "a", "num_inference_steps": 0}])
    for one, given in zip(found, runs, strict=True):
        alone = uncached.run(**given)
        assert same(one, alone)
        assert one.parameters == alone.parameters
        assert one.warnings == alone.warnings
    assert found[2].truncated
    assert set(found[1].parameters["injected"]) == {"tokens"}


def test_a_file_of_prompts_under_half_of_the_memory_opens_every_engine_once(
    alpha_set: Path, facts: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    whole = OnnxRuntime.open

    def watch(self: OnnxRuntime, folder: Path, spec: EngineSpec, sizes: Any) -> OnnxRuntimeEngine:
        opened.append(spec.name)
        return whole(self, folder, spec, sizes)

    monkeypatch.setattr(OnnxRuntime, "open", watch)
    (tmp_path / "prompts.txt").write_text("a cow\na dog\n")
    for name, budget in (("whole", []), ("half", ["--memory-budget", str(small_budget(facts))])):
        opened.clear()
        command = ["generate", "--engines", str(alpha_set), "--backend", "onnxruntime", *budget]
        command += ["--prompts", str(tmp_path / "prompts.txt"), "--num-inference-steps", "1"]
        command += ["--decoding-steps", "2", "--seed", "1", "-o", str(tmp_path / f"{name}.png")]
        assert main(command) == 0
        assert sorted(opened) == sorted(dims.drawing(facts.engines))
    for i in range(2):
        images = [Image.open(tmp_path / f"{name}-{i}.png") for name in ("whole", "half")]
        assert images[0].tobytes() == images[1].tobytes()


def test_nothing_is_nothing(generator: Generator) -> None:
    assert generator.draw_several([]) == []
