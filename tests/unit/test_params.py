"""An option is declared once, and everything that offers it derives from the declaration."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

import bifrost_rt
from bifrost_rt import Generator, RequestTypeError
from bifrost_rt.cli.options import add_option, long_flag, parser
from bifrost_rt.manifest import Defaults
from bifrost_rt.params import (
    OPTIONS,
    Boolean,
    Default,
    Float,
    Option,
    Options,
    Parameters,
    options,
)
from bifrost_rt.result import read_parameters

DEFAULTS = Defaults(16, 1.0, 28, 3.5, 0.7)
PACKAGE = Path(bifrost_rt.__file__).parent


def test_an_option_is_named_where_it_is_declared_and_where_it_is_used() -> None:
    naming = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".js", ".html") and "cache_interval" in path.read_text()
    }
    assert naming == {"params.py", "pipeline.py", "notes.py"}


def test_type_checkers_know_every_option() -> None:
    declared = typing.get_type_hints(Parameters)
    assert typing.get_type_hints(Options) == {name: declared[name] | None for name in OPTIONS}


def test_every_value_of_parameters_but_the_prompt_is_an_option() -> None:
    assert {field.name for field in dataclasses.fields(Parameters)} == {"prompt", *OPTIONS}


def test_the_types_are_those_of_the_declarations() -> None:
    declared = typing.get_type_hints(Parameters)
    assert {name: option.values.python_type for name, option in OPTIONS.items()} == {
        name: declared[name] for name in OPTIONS
    }


def test_a_set_has_the_defaults_that_options_take_from_it() -> None:
    from_set = {name for name, option in OPTIONS.items() if option.default is Default.SET}
    assert from_set == {field.name for field in dataclasses.fields(Defaults)}


def test_help_names_every_option() -> None:
    signature = inspect.signature(Generator.run)
    assert OPTIONS.keys() < signature.parameters.keys()
    document = inspect.getdoc(Generator.run)
    assert document
    for name, option in OPTIONS.items():
        assert signature.parameters[name].default is None
        assert f"\n    {name}: {(option.doc or option.help).split()[0]}" in document
    assert "{options}" not in document


def test_the_command_line_takes_every_option() -> None:
    nothing = vars(parser().parse_args(["generate"]))
    assert all(nothing[name] is None for name in OPTIONS)
    for name, option in OPTIONS.items():
        for flag in (long_flag(name), *option.flags):
            for arguments, value in spellings(option, flag):
                given = vars(parser().parse_args(["generate", *arguments]))
                assert given == {**nothing, name: value}
                assert type(given[name]) is option.values.python_type


def spellings(option: Option, flag: str) -> list[tuple[list[str], Any]]:
    if isinstance(option.values, Boolean):
        return [([flag], True), ([flag.replace("--", "--no-")], False)]
    return [([flag, "7"], 7)]


def test_a_png_says_every_option(generator: Generator, tmp_path: Path) -> None:
    result = generator.run("a cow", num_inference_steps=1, decoding_steps=1)
    (path,) = result.save(tmp_path / "a.png")
    assert read_parameters(path).keys() == {"image", "prompt", *OPTIONS}


@pytest.mark.parametrize("name", OPTIONS)
def test_requests_that_differ_are_drawn_together_only_where_that_is_declared(name: str) -> None:
    values = (True, False) if isinstance(OPTIONS[name].values, Boolean) else (1, 2)
    one, other = (Parameters.fill("a", {"seed": 1, name: value}, DEFAULTS) for value in values)
    assert one != other
    assert (one.shared == other.shared) is OPTIONS[name].per_request


def test_what_differs_from_image_to_image() -> None:
    """A request is drawn with others only if each image comes out the same; options do not agree
    by accident."""
    assert {name for name, option in OPTIONS.items() if option.per_request} == {
        "seed",
        "num_images_per_prompt",
        "extend",  # it is in the tokens and their mask
        "keep_pixels",  # it is in the known region
    }


def test_parameters_are_arguments_that_give_them_again() -> None:
    for prompt in ("a", ("a", "b")):
        made = Parameters.fill(prompt, {}, DEFAULTS)
        again = made.as_dict()
        given = again.pop("prompt")
        assert given == (prompt if isinstance(prompt, str) else list(prompt))
        assert Parameters.fill(prompt, again, DEFAULTS) == made


def test_none_is_for_the_default() -> None:
    seeded = {"seed": 1}
    nothing = {**dict.fromkeys(OPTIONS), **seeded}
    filled = Parameters.fill("a", nothing, DEFAULTS)
    assert filled == Parameters.fill("a", seeded, DEFAULTS)
    assert (filled.num_images_per_prompt, filled.cache_interval) == (1, 1)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(RequestTypeError, match=r"unexpected keyword argument 'num_inference_step'"):
        Parameters.fill("a", {"num_inference_step": 3}, DEFAULTS)
    with pytest.raises(TypeError, match=r"did you mean 'cfg_weight'\?"):
        Parameters.fill("a", {"cfg_weigth": None}, DEFAULTS)


@dataclass(frozen=True, kw_only=True)
class WithToy(Parameters):
    """The parameters, had somebody added an option."""

    sharpness: Annotated[
        float,
        Option(values=Float(), default=0.5, help="how crisp", flags=("-S",)),
    ]


def test_one_declaration_adds_an_option() -> None:
    assert list(options(WithToy)) == [*OPTIONS, "sharpness"]
    toy = options(WithToy)["sharpness"]

    def fill(**given: Any) -> WithToy:
        return WithToy.fill("a", {"seed": 1, **given}, DEFAULTS)

    assert fill().sharpness == 0.5
    assert fill(sharpness=2).as_dict()["sharpness"] == 2.0
    assert fill(sharpness=2).shared != fill(sharpness=3).shared
    with pytest.raises(RequestTypeError, match="sharpness must be a number, got 'very'"):
        fill(sharpness="very")

    command = argparse.ArgumentParser()
    add_option(command, toy)
    assert command.parse_args(["-S", "2"]).sharpness == 2.0
    assert command.parse_args([]).sharpness is None
    assert "-S X, --sharpness X" in " ".join(command.format_help().split())
    assert "how crisp (0.5)" in command.format_help()
