"""Sizes are declared once; everything that needs one derives it."""

from __future__ import annotations

import numpy as np
import pytest

from bifrost_rt import dims
from bifrost_rt.backends.base import check_bindings, output_shape, symbol_sizes
from bifrost_rt.dims import DIMS, evaluate, shape_at, symbols
from bifrost_rt.errors import EngineInputError
from bifrost_rt.manifest import EngineSpec, Precision, Range, TensorSpec

GROWING = EngineSpec(
    name="grow",
    graph="grow.onnx",
    files=("grow.onnx",),
    inputs=(
        TensorSpec("cache", "float32", ("past", 4)),
        TensorSpec("mask", "float32", ("past + 1",)),
        TensorSpec("grid", "float32", ("4*height*width",)),
        TensorSpec("shape", "float32", ("height", "width")),
    ),
    outputs=(TensorSpec("next_cache", "float32", ("past + 1", 4)),),
    state=(),
    precision=Precision("fp32", "float32", "float32"),
)
ANY = {name: Range(1, 8) for name in ("past", "height", "width")}


def given(past: int = 3, mask: int = 4, grid: int = 24) -> dict[str, np.ndarray]:
    shapes = {"cache": (past, 4), "mask": (mask,), "grid": (grid,), "shape": (2, 3)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def test_examples_cannot_be_mistaken_for_each_other_or_for_a_constant() -> None:
    examples = [dim.example for dim in DIMS.values()]
    assert len(set(examples)) == len(examples)
    assert not {0, 1} & set(examples)


def test_a_runs_sizes_lie_in_the_ranges_of_a_set_that_was_built_for_it() -> None:
    sizes = dims.of_run(text_tokens=48, steps=16, images=3, prompts=3, guided=True, revealed=7)
    limits = {"max_images": 3, "mllm_max_length": 48, "max_steps": 16, "num_visual_tokens": 16}
    limits |= {"chunk": 48, "context": 64, "max_windows": 9, "max_vision_tokens": 99}
    ranges = dims.ranges(**limits)
    assert ranges.keys() == sizes.keys()
    assert sizes["texts"] == 4  # the empty one too
    for name, bounds in ranges.items():
        assert bounds.max is not None
        assert bounds.min <= sizes[name] <= bounds.max, name


def test_a_limit_that_is_not_given_is_none() -> None:
    ranges = dims.ranges(mllm_max_length=48, num_visual_tokens=16)
    assert ranges["texts"] == Range(1, None)
    assert ranges["steps"] == Range(1, None)
    assert ranges["branches"] == Range(1, 2)


def test_a_dimension_is_a_number_a_symbol_or_an_expression() -> None:
    sizes = {"past": 7, "h": 2, "w": 3}
    assert shape_at((5, "past", "past + 1", "4*h*w", "(h - 1)*w // 2"), sizes) == (5, 7, 8, 24, 1)
    assert symbols("4*h*w") == {"h", "w"}
    assert symbols(4) == frozenset()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("past + 1", "the size 'past [+] 1' needs `past`, which is not known"),
        ("abs(h)", "the size 'abs.h.' is not made of names, numbers"),
        ("h h", "the size 'h h' is not an expression"),
    ],
)
def test_what_cannot_be_evaluated_is_named(size: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(size, {"h": 1})


def test_an_engine_may_have_expressions_at_its_inputs_and_outputs() -> None:
    assert dims.used_by(GROWING) == {"past", "height", "width"}
    sizes = symbol_sizes(GROWING, given())
    assert sizes == {"past": 3, "height": 2, "width": 3}
    outputs = {"next_cache": np.zeros(output_shape(GROWING.outputs[0], sizes), np.float32)}
    assert outputs["next_cache"].shape == (4, 4)
    check_bindings(GROWING, ANY, given(), outputs)


@pytest.mark.parametrize(("mask", "grid", "axis"), [(3, 24, "mask"), (4, 25, "grid")])
def test_a_tensor_that_breaks_an_expression_is_refused(mask: int, grid: int, axis: str) -> None:
    outputs = {"next_cache": np.zeros((4, 4), np.float32)}
    with pytest.raises(EngineInputError, match=f"input `{axis}`: expected .* must be"):
        check_bindings(GROWING, ANY, given(mask=mask, grid=grid), outputs)


def test_an_expressions_symbols_keep_to_their_ranges() -> None:
    outputs = {"next_cache": np.zeros((10, 4), np.float32)}
    with pytest.raises(EngineInputError, match="1 <= past <= 8"):
        check_bindings(GROWING, ANY, given(past=9, mask=10), outputs)
