"""Which layer gets which format."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from export import assemble, preprocessor
from export.checkpoint import Checkpoint
from export.errors import RecipeError
from export.quantize import policy
from export.stages import Stage
from export.stages.catalog import DEFINITIONS
from tests.conftest import ALPHA


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    checkpoint = Checkpoint(*(ALPHA / part for part in ("mllm", "bifrost", "flux")), read=False)
    return list(
        assemble.stages(
            *(checkpoint, assemble.facts(checkpoint), 48, 77, 32), preprocessor.read(checkpoint)
        )
    )


def test_every_exception_fits_a_layer(stages: list[Stage]) -> None:
    assert [stage.definition for stage in stages] == list(DEFINITIONS.values())
    for stage in stages:
        paths = [path for path, _ in stage.module.named_modules()]
        for pattern, reason in stage.definition.not_quantized.items():
            assert any(fnmatchcase(path, pattern) for path in paths), pattern
            assert reason


def test_everything_that_a_definition_names_is_there(stages: list[Stage]) -> None:
    for stage in stages:
        parameters = [name for name, _ in stage.module.named_parameters()]
        for prefix in stage.definition.float32_layers:
            assert any(name.startswith(prefix) for name in parameters), prefix
        for name in stage.definition.residuals:
            assert len(stage.module.get_submodule(name)) > 0
        assert set(stage.compared) <= {spec.name for spec in stage.outputs}


def test_what_is_excepted_says_why_and_the_rest_is_as_asked(stages: list[Stage]) -> None:
    choices = {c.name: c for c in policy.choose(stages, "int8", "bf16", {}, {})}
    assert choices["visual_decode:branch.vision_head"].fmt == "bf16"
    assert "tokens" in choices["visual_decode:branch.vision_head"].reason
    for name in (
        "visual_decode:branch.layers.0.mlp.down_proj",
        "denoise:transformer_blocks.0.attn.to_q",
    ):
        assert choices[name].fmt == "int8"
        assert choices[name].reason == ""
    assert all(c.reason for c in choices.values() if c.fmt == "bf16")
    assert {c.fmt for c in choices.values() if c.stage == "conditioning"} == {"bf16"}


def test_a_stage_and_a_layer_can_be_something_else(stages: list[Stage]) -> None:
    layers = {"denoise:transformer_blocks.*": "fp8", "denoise:transformer_blocks.1.*": "fp16"}
    choices = {
        c.name: c for c in policy.choose(stages, "int8", "bf16", {"t5_text": "fp32"}, layers)
    }
    assert {c.fmt for c in choices.values() if c.stage == "t5_text"} == {"fp32"}
    assert choices["denoise:transformer_blocks.0.attn.to_q"].fmt == "fp8"
    chosen = choices["denoise:transformer_blocks.1.attn.to_q"]  # the last that fits counts
    assert (chosen.fmt, chosen.reason) == ("fp16", "recipe: denoise:transformer_blocks.1.*")
    assert choices["denoise:controlnet_blocks.0.attn.to_q"].fmt == "int8"


def test_blocks_that_do_not_divide_stay_in_16_bit(stages: list[Stage]) -> None:
    choices = [c for c in policy.choose(stages, "int4", "fp16", {}, {}) if "multiple" in c.reason]
    assert choices  # T5 is 48 wide here
    assert {c.fmt for c in choices} == {"fp16"}
    assert "no multiple of int4's block of 32" in choices[0].reason


@pytest.mark.parametrize(
    ("of_stages", "of_layers", "message"),
    [
        ({"denoize": "int8"}, {}, "no stage 'denoize' .did you mean 'denoise'"),
        ({}, {"denoise:blocks.*": "int8"}, "'denoise:blocks..' fits no linear layer"),
    ],
)
def test_overrides_that_fit_nothing_are_refused(
    stages: list[Stage], of_stages: dict[str, str], of_layers: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        policy.choose(stages, "int8", "bf16", of_stages, of_layers)
