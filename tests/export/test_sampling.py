"""The choice of the next token, against transformers' own processors of logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from export.model.sampling import choose

VOCABULARY, SEEN = 300, [3, 5, 200, 17]
CASES = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"top_p": 0.8},
    {"top_p": 0.3, "repetition_penalty": 1.6},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 2.0, "top_k": 299},
    {"top_k": 1},
]


def logits() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(0, 2.5, (1, VOCABULARY))).float()


def expected(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0
) -> Tensor:
    """The probabilities by transformers, [V]."""
    seen = torch.tensor([SEEN])
    found = RepetitionPenaltyLogitsProcessor(repetition_penalty)(seen, logits())
    found = TemperatureLogitsWarper(temperature)(seen, found)
    if top_k:
        found = TopKLogitsWarper(top_k)(seen, found)
    if top_p < 1:
        found = TopPLogitsWarper(top_p)(seen, found)
    return found.softmax(-1)[0]


def chosen(
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """A token for each of the numbers."""
    many = len(uniform)
    seen = torch.zeros(1, VOCABULARY)
    seen[0, SEEN] = 1
    return choose(
        logits().expand(many, -1),
        seen.expand(many, -1),
        uniform[:, None],
        torch.tensor([temperature]),
        torch.tensor([top_k]),
        torch.tensor([top_p]),
        torch.tensor([repetition_penalty]),
        VOCABULARY,
    )[:, 0]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_tokens_come_as_often_as_their_probability(options: dict[str, float]) -> None:
    """Over numbers that fill the interval evenly, each token gets its share of them to within two
    of the many."""
    many = 20_000
    uniform = (torch.arange(many) + 0.5) / many
    counts = torch.bincount(chosen(uniform, **options), minlength=VOCABULARY)  # type: ignore[arg-type]
    wanted = expected(**options) * many  # type: ignore[arg-type]
    assert (counts - wanted).abs().max() < 2
    assert not counts[wanted == 0].any()


def test_temperature_0_takes_the_most_likely_token() -> None:
    uniform = torch.rand(50)
    best = logits().argmax()
    assert (chosen(uniform, temperature=0.0) == best).all()
    assert (chosen(uniform, temperature=0.0, top_k=3, top_p=0.5) == best).all()


def test_the_ends_of_the_interval_choose_tokens_that_may_be_chosen() -> None:
    uniform = torch.tensor([0.0, float(np.float32(1 - 2**-20))])
    for options in CASES:
        found = chosen(uniform, **options)  # type: ignore[arg-type]
        assert (expected(**options)[found] > 0).all()  # type: ignore[arg-type]
