"""The MLLM's answers, beside those of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bifrost_rt import backends, manifest, memory_plan
from bifrost_rt.answering import Answering, Conversation, Sampling
from bifrost_rt.backends.onnxruntime import OnnxRuntime
from bifrost_rt.engines import Engines
from bifrost_rt.errors import RequestError
from bifrost_rt.manifest import Manifest
from tests.conftest import ALPHA
from tests.conversations import TURNS, Asked, Judge, Turns, forced_logits

TOKENS = 64
TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(ALPHA / "mllm", ALPHA / "bifrost")


@pytest.fixture(scope="module")
def facts(alpha_set: Path) -> Manifest:
    return manifest.read(alpha_set)


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engines(request: pytest.FixtureRequest, alpha_set: Path, facts: Manifest) -> Iterator[Engines]:
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(reason)
    only = dataclasses.replace(facts, engines=(facts.engine("mllm_text"),))
    opened = Engines(alpha_set, only, backends.load(request.param))
    yield opened
    opened.close()


@dataclasses.dataclass(frozen=True)
class Case:
    """A conversation, transformers' greedy answer, and the logits of its tokens."""

    asked: Asked
    answer: list[int]
    logits: NDArray[np.float32]


@pytest.fixture(scope="module")
def cases(judge: Judge) -> dict[str, Case]:
    found = {}
    for seed, turns in enumerate(TURNS):
        asked = judge.asks(turns, seed)
        answer = judge.answer(asked, TOKENS)
        found[turns.name] = Case(asked, answer, judge.logits(asked, answer))
    return found


def ask(answering: Answering, asked: Conversation, tokens: int, **options: Any) -> list[int]:
    how = Sampling(**options)
    run = answering.answer(asked, how, max_new_tokens=tokens, stop_ids=(), timings={})
    return list(run)


@pytest.mark.parametrize("turns", TURNS, ids=lambda turns: turns.name)
def test_greedy_answers_are_those_of_transformers(
    turns: Turns, engines: Engines, facts: Manifest, cases: dict[str, Case]
) -> None:
    case = cases[turns.name]
    assert ask(Answering(engines, facts), case.asked.conversation, TOKENS) == case.answer


@pytest.mark.parametrize("turns", TURNS, ids=lambda turns: turns.name)
def test_logits_are_those_of_transformers(
    turns: Turns, engines: Engines, cases: dict[str, Case]
) -> None:
    """Of an answer that was given, so that one difference does not hide the others; the prompt is
    read in one piece or in three."""
    case = cases[turns.name]
    pieces = 1 + 2 * (len(turns.parts) % 2)
    found = forced_logits(engines, case.asked.conversation, case.answer, pieces)
    assert np.abs(found - case.logits).max() < TOLERANCE * np.abs(case.logits).max()


def test_a_repetition_penalty_is_that_of_transformers(
    engines: Engines, facts: Manifest, judge: Judge, cases: dict[str, Case]
) -> None:
    case = cases["an image within"]
    expected = judge.answer(case.asked, TOKENS, repetition_penalty=1.4)
    answering = Answering(engines, facts)
    assert ask(answering, case.asked.conversation, TOKENS, repetition_penalty=1.4) == expected
    assert expected != case.answer


def test_what_conversations_begin_with_in_common_is_not_computed_again(
    engines: Engines, facts: Manifest, cases: dict[str, Case]
) -> None:
    """The next turn behind an answer, the same question again, another question on the same image,
    and the same words about another image."""
    case = cases["several turns"]
    first, answer = case.asked.conversation, case.answer
    end = int(first.positions.max()) + 1
    said = np.array([*answer, 7, 8, 9, 10])
    after = np.tile(np.arange(end, end + len(said)), (3, 1))
    follow = dataclasses.replace(
        first,
        ids=np.concatenate([first.ids, said]),
        positions=np.concatenate([first.positions, after], axis=1),
    )
    other = dataclasses.replace(first, ids=np.append(first.ids[:-1], first.ids[-1] + 1))
    assert first.image_tokens is not None
    changed = first.image_tokens.copy()
    changed[4, 0] += 1
    repainted = dataclasses.replace(first, image_tokens=changed)
    for second, common in (
        (follow, len(first.ids) + TOKENS - 1),
        (first, len(first.ids) - 1),
        (other, len(first.ids) - 1),
        (repainted, int(first.image_places[4])),
    ):
        answering = Answering(engines, facts)
        assert ask(answering, first, TOKENS) == answer
        run = answering.answer(second, Sampling(), max_new_tokens=TOKENS, stop_ids=(), timings={})
        found = list(run)
        assert run.cached_tokens == common
        assert found == ask(Answering(engines, facts), second, TOKENS)


@pytest.mark.parametrize("room", [0, -1])
def test_what_is_kept_leaves_when_a_run_needs_its_memory(
    room: int, alpha_set: Path, facts: Manifest, cases: dict[str, Case]
) -> None:
    first = cases["text"].asked.conversation
    backend = backends.load("onnxruntime")
    order, at = [spec.name for spec in facts.engines], memory_plan.sizes(facts)
    needs = memory_plan.needs(facts, order, at, backend.weights_in_memory, backend.scratch_share)
    image = sum(need.resident for need in needs) + max(need.tensors for need in needs)
    layers = sum(t.name.startswith("past_keys.") for t in facts.engine("mllm_text").inputs)
    cache = 256 * layers * 2 * 2 * 16 * 4  # places, keys and values, heads, width, bytes
    opened = Engines(alpha_set, facts, backend, budget=image + cache + room)
    try:
        answering = Answering(opened, facts)
        ask(answering, first, 4)
        opened.begin(order, at)
        run = answering.answer(first, Sampling(), max_new_tokens=4, stop_ids=(), timings={})
        next(run)
        assert run.cached_tokens == (0 if room else len(first.ids) - 1)
    finally:
        opened.close()


class Apart(OnnxRuntime):
    """Reads one buffer and writes another, as backends do that compare replays."""

    writes_in_place = False


def test_a_cache_that_is_not_written_in_place_gives_the_same_answer(
    alpha_set: Path, facts: Manifest, cases: dict[str, Case]
) -> None:
    opened = Engines(
        alpha_set, dataclasses.replace(facts, engines=(facts.engine("mllm_text"),)), Apart()
    )
    narrow = dataclasses.replace(
        facts, dimensions={**facts.dimensions, "new_tokens": manifest.Range(1, 13)}
    )
    try:
        answering = Answering(opened, narrow)
        for name in ("text", "two images", "several turns and images", "text", "text"):
            case = cases[name]
            assert ask(answering, case.asked.conversation, TOKENS) == case.answer
    finally:
        opened.close()


def test_an_answer_that_is_closed_early_leaves_what_it_computed(
    engines: Engines, facts: Manifest, cases: dict[str, Case]
) -> None:
    asked, answer = cases["text"].asked, cases["text"].answer
    answering = Answering(engines, facts)
    run = answering.answer(
        asked.conversation, Sampling(), max_new_tokens=TOKENS, stop_ids=(), timings={}
    )
    assert [next(run) for _ in range(5)] == answer[:5]
    run.close()
    assert list(run) == []
    assert run.finish_reason is None
    assert ask(answering, asked.conversation, TOKENS) == answer


def test_an_answer_ends_at_a_stop_token_at_the_limit_and_at_the_end_of_the_context(
    engines: Engines, facts: Manifest, cases: dict[str, Case]
) -> None:
    asked, answer = cases["short text"].asked, cases["short text"].answer
    answering = Answering(engines, facts)

    def run(conversation: Conversation, limit: int, stop: set[int]) -> tuple[list[int], str | None]:
        answered = answering.answer(
            conversation, Sampling(), max_new_tokens=limit, stop_ids=stop, timings={}
        )
        return list(answered), answered.finish_reason

    stop = next(t for i, t in enumerate(answer) if t not in answer[:i] and i > 2)
    before = answer[: answer.index(stop)]
    assert run(asked.conversation, TOKENS, {stop}) == (before, "stop")
    assert run(asked.conversation, 5, set()) == (answer[:5], "length")
    assert run(asked.conversation, 1, {answer[0]}) == ([], "stop")
    length = answering.context - 3
    ids = np.resize(asked.conversation.ids, length)
    long = Conversation(ids, np.tile(np.arange(length), (3, 1)))
    found, reason = run(long, TOKENS, set())
    assert (len(found), reason) == (3, "length")
    full = np.resize(ids, answering.context)
    with pytest.raises(RequestError, match=rf"has {answering.context} tokens.*may have"):
        run(Conversation(full, np.tile(np.arange(len(full)), (3, 1))), 1, set())


def test_a_long_conversation_is_read_in_pieces(engines: Engines, facts: Manifest) -> None:
    """In more rows than the engine takes in one call."""
    most = facts.dimensions["new_tokens"].max
    assert most is not None
    ids = np.random.default_rng(5).integers(0, 500, 2 * most + 100)
    long = Conversation(ids, np.tile(np.arange(len(ids)), (3, 1)))
    narrow = dataclasses.replace(
        facts, dimensions={**facts.dimensions, "new_tokens": manifest.Range(1, 97)}
    )
    assert ask(Answering(engines, facts), long, 8) == ask(Answering(engines, narrow), long, 8)


def test_who_leaves_while_a_long_prompt_is_read_ends_it(engines: Engines, facts: Manifest) -> None:
    """Pieces that were read stay for who asks again."""
    ids = np.random.default_rng(5).integers(0, 500, 400)
    long = Conversation(ids, np.tile(np.arange(len(ids)), (3, 1)))
    narrow = dataclasses.replace(
        facts, dimensions={**facts.dimensions, "new_tokens": manifest.Range(1, 97)}
    )
    answering, pieces = Answering(engines, narrow), []

    def leave() -> None:
        pieces.append(1)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"max_new_tokens": 4, "stop_ids": (), "timings": {}}
    run = answering.answer(long, Sampling(), on_piece=leave, **options)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    run.close()
    again = answering.answer(long, Sampling(), on_piece=lambda: pieces.append(1), **options)
    found = list(again)
    assert again.cached_tokens == 2 * 97
    assert len(pieces) == 2 + 2  # of the three pieces that were left
    assert found == list(Answering(engines, facts).answer(long, Sampling(), **options))


def test_a_seed_gives_the_same_answer_and_another_one_another(
    engines: Engines, facts: Manifest, cases: dict[str, Case]
) -> None:
    asked = cases["text"].asked.conversation
    answering = Answering(engines, facts)
    drawn = [ask(answering, asked, 24, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert ask(answering, asked, 200, temperature=1.5, seed=1)[:24] == drawn[0]


def test_one_candidate_is_the_greedy_answer(
    engines: Engines, facts: Manifest, cases: dict[str, Case]
) -> None:
    asked, answer = cases["text"].asked, cases["text"].answer
    answering = Answering(engines, facts)
    for limit in ({"top_k": 1}, {"top_p": 1e-6}):
        assert ask(answering, asked.conversation, TOKENS, temperature=2.0, **limit) == answer


def test_what_cannot_be_asked_is_refused() -> None:
    nan = float("nan")
    for name, value in (
        ("temperature", nan), ("temperature", -1), ("top_k", -1), ("top_k", 100_000),
        ("top_p", 0), ("top_p", nan), ("repetition_penalty", 0), ("seed", -1),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=f"{name} must be"):
            Sampling(**{name: value})
