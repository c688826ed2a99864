"""Text in pieces: no piece splits a character, and together they are the whole."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from bifrost_rt.text_stream import TextStream
from tests.conftest import ALPHA


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ALPHA / "mllm" / "tokenizer.json"))


@pytest.mark.parametrize(
    "text", ["a red cat", "café 猫 🐄🐄 naïve", "\n\n  spaced \n", "", "👩‍🌾👍🏽"]
)
def test_pieces_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = [stream.feed(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.rest() == stream.text == text
    assert stream.token_ids == ids


def test_what_never_became_a_character_is_said_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a🐄", add_special_tokens=False).ids
    assert len(ids) > 2  # bytes
    pieces = [stream.feed(token) for token in ids[:-1]]
    assert "".join(pieces) == "a"
    assert set(stream.rest()) == {"\ufffd"}


def test_special_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("a<|im_end|>b", add_special_tokens=False).ids
    for token in ids:
        stream.feed(token)
    stream.rest()
    assert stream.text == "ab"
