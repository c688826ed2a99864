"""The options of an answer, each declared once: `Generator.chat`, the command line and the HTTP API
read them here."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from typing import Any, TypedDict

from bifrost_rt import dims
from bifrost_rt.answering import Sampling
from bifrost_rt.params import Float, Integer


@dataclass(frozen=True, kw_only=True)
class ChatOption:
    """Everything about an option, except what the code that uses it does with the value.

    Attributes:
        values: what it takes, beside the bounds that `Sampling` knows.
        default: None: 32 random bits.
        help: one line.
        api_names: the HTTP fields, where OpenAI names it otherwise; the first that is given counts.
    """

    values: Integer | Float
    default: int | float | None
    help: str
    api_names: tuple[str, ...] = ()


OPTIONS = {
    "max_new_tokens": ChatOption(
        values=Integer(1),
        default=512,
        help="tokens of the answer, at most",
        api_names=("max_completion_tokens", "max_tokens"),
    ),
    "temperature": ChatOption(
        values=Float(), default=0.0, help="0 takes the likeliest token; more is more random"
    ),
    "top_p": ChatOption(
        values=Float(), default=1.0, help="choose among the likeliest tokens of this share; 1: all"
    ),
    "top_k": ChatOption(
        values=Integer(0, dims.CANDIDATES),
        default=0,
        help="choose among so many of the likeliest tokens; 0: all",
    ),
    "repetition_penalty": ChatOption(
        values=Float(), default=1.0, help="above 1, tokens that were there become less likely"
    ),
    "seed": ChatOption(
        values=Integer(0, 2**63 - 1), default=None, help="the same seed gives the same answer"
    ),
}


class ChatOptions(TypedDict, total=False):
    """The options as keyword arguments; None takes the default."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None


@dataclass(frozen=True)
class ChatParameters:
    """A value for every option, checked."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int

    @classmethod
    def fill(cls, given: ChatOptions) -> ChatParameters:
        """Check what was given, and fill in the defaults.

        Raises:
            RequestError, RequestTypeError: naming the option, what it must be and what was given.
            TypeError: an option that there is not.
        """
        if unknown := given.keys() - OPTIONS.keys():
            raise TypeError(f"chat() got an unexpected option {sorted(unknown)[0]!r}")
        values: dict[str, Any] = {}
        for name, option in OPTIONS.items():
            value = given.get(name)
            if value is not None:
                values[name] = option.values.check(name, value)
            else:
                values[name] = secrets.randbits(32) if option.default is None else option.default
        found = cls(**values)
        assert found.sampling  # checks the bounds
        return found

    def without_effect(self, given: ChatOptions) -> list[str]:
        """Say in words which of the options that were given do nothing beside the others."""
        named = [name for name in ("top_p", "top_k") if given.get(name) not in (None, _off(name))]
        return [
            f"{name} has no effect: temperature is 0, which takes the likeliest token"
            for name in named
            if self.temperature == 0
        ]

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen.

        Raises:
            RequestError: a value out of bounds.
        """
        names = {field.name for field in dataclasses.fields(Sampling)}
        return Sampling(**{n: v for n, v in dataclasses.asdict(self).items() if n in names})


def _off(name: str) -> int | float | None:
    return OPTIONS[name].default
