"""The reference loop is the official one: it repeats the official recordings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.reference import Reference
from tests.conftest import ALPHA, Case, load_case

# rounding scale of the recordings: tokens 8e-6, latents 3e-6 (float32 against float64)
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    # networks this small lose more to threads than they gain
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Reference(ALPHA / "mllm", ALPHA / "bifrost", ALPHA / "flux", 48, 32)
    torch.set_num_threads(before)


def test_every_step_and_the_image_are_the_official_ones(case: Case, reference: Reference) -> None:
    arguments = case.request()
    found = reference.run(arguments.pop("prompt"), **arguments)

    expected = {name: torch.from_numpy(value) for name, value in case.tensors.items()}
    assert difference(found.tokens_steps, expected["mllm.tokens_steps"]) < TOLERANCE
    assert difference(found.tokens, expected["mllm.tokens_final"]) < TOLERANCE
    assert difference(found.latents_steps, expected["flux.latents_steps"]) < TOLERANCE
    if case.facts["has_float_image"]:
        assert difference(found.image, expected["flux.image"]) < TOLERANCE
    assert found.image_u8.dtype == torch.uint8
    assert difference(found.image_u8, expected["flux.image_u8"]) <= 1


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (found.double() - expected.double()).abs().max().item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_it_draws_the_same() -> None:
    compiled = Reference(ALPHA / "mllm", ALPHA / "bifrost", ALPHA / "flux", 48, 32)
    compiled.compile()
    case = load_case("case_00")
    arguments = case.request()
    found = compiled.run(arguments.pop("prompt"), **arguments)
    expected = {name: torch.from_numpy(value) for name, value in case.tensors.items()}
    assert difference(found.tokens, expected["mllm.tokens_final"]) < TOLERANCE
    assert difference(found.latents_steps, expected["flux.latents_steps"]) < TOLERANCE
    assert difference(found.image_u8, expected["flux.image_u8"]) <= 1
