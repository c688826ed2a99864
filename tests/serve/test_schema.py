"""The fields of the HTTP API derive from the options of a run."""

from __future__ import annotations

from typing import Any

import pydantic

from bifrost_rt.params import LARGEST, OPTIONS, Boolean, Float, Integer, Option
from bifrost_rt.serve.schema import ImageRequest, JobRequest, OpenAIRequest, option_field


def test_the_http_api_takes_every_option() -> None:
    names = {option.api_name for option in OPTIONS.values()}
    assert ImageRequest.model_fields.keys() - OpenAIRequest.model_fields.keys() == names
    assert names < JobRequest.model_fields.keys()
    fields = ImageRequest.model_json_schema()["properties"]
    for name, option in OPTIONS.items():
        value = True if isinstance(option.values, Boolean) else 1
        assert ImageRequest(prompt="a", **{option.api_name: value}).options() == {
            **dict.fromkeys(OPTIONS),
            name: value,
        }
        assert fields[option.api_name]["description"].startswith(option.help)
        kind, nothing = fields[option.api_name]["anyOf"]
        assert nothing == {"type": "null"}
        if isinstance(option.values, Integer):
            assert (kind["type"], kind["minimum"]) == ("integer", option.values.least)
            assert kind.get("exclusiveMaximum") == option.values.below_in_json
        elif isinstance(option.values, Boolean):
            assert kind == {"type": "boolean"}
        else:
            bounds = {"minimum": option.values.least, "maximum": option.values.most}
            stated = bounds if option.values.most < LARGEST else {}
            assert kind == {"type": "number", **stated}


def test_one_declaration_adds_a_field() -> None:
    toy = Option(values=Float(), default=0.5, help="how crisp")
    body: Any = pydantic.create_model("Body", sharpness=option_field(toy))
    assert body(sharpness=2).sharpness == 2.0
    assert body().sharpness is None
    assert body.model_json_schema()["properties"]["sharpness"] == {
        "anyOf": [{"type": "number"}, {"type": "null"}],
        "default": None,
        "description": "how crisp; default 0.5",
        "title": "Sharpness",
    }
