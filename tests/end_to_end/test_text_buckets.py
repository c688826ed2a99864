"""Prompts padded to a few lengths for compiled engines: exact, and only there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from bifrost_rt import Generator, manifest, prompt_inputs
from bifrost_rt.manifest import Compiled, Manifest, Range
from tests.conftest import difference, load_case

COMPILED = Compiled("tensorrt-rtx", "1.7.1.116", ("sm89",), (), "0" * 64)


def compiled(facts: Manifest, most: int | None) -> Manifest:
    engines = tuple(dataclasses.replace(spec, compiled=COMPILED) for spec in facts.engines)
    dimensions = {**facts.dimensions, "text_tokens": Range(1, most)}
    return dataclasses.replace(facts, engines=engines, dimensions=dimensions)


def test_lengths_of_compiled_sets_are_few(alpha_set: Path) -> None:
    graphs = manifest.read(alpha_set)
    assert [prompt_inputs.text_width(graphs, n) for n in (1, 9, 33)] == [1, 9, 33]
    engines = compiled(graphs, 300)
    found = {prompt_inputs.text_width(engines, n) for n in range(1, 301)}
    assert found == {32, 64, 128, 256, 300}
    assert all(prompt_inputs.text_width(engines, n) >= n for n in range(1, 301))
    assert prompt_inputs.text_width(compiled(graphs, 20), 7) == 20


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_padding_changes_no_token(
    alpha_set: Path, backend: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short and a long prompt, so that rows are padded anyway; and one alone."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    case = load_case("case_04").request()
    found = []
    with Generator(alpha_set, backend=backend) as generator:
        for padded in (False, True):
            if padded:
                monkeypatch.setattr(prompt_inputs, "text_width", lambda facts, longest: 48)
            for prompt in ("a", ["a red cat", "two green birds on a blue box over there"]):
                options = {**case, "prompt": prompt, "cfg_weight": 2.0 if guided else 1.0}
                for name in ("order", "latents", "num_images_per_prompt"):
                    options.pop(name, None)
                options |= {"seed": 0, "num_inference_steps": 1, "decoding_steps": 4}
                found.append(generator.run(**options, output_type="latent").tokens)
    for plain, wide in zip(found[:2], found[2:], strict=True):
        assert difference(wide, plain) <= 1e-5
        assert np.isfinite(wide).all()
