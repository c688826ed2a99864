"""Tokens of an answer -> its text, in pieces that never split a character."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one answer, token by token. Special tokens are left out.

    Attributes:
        token_ids: what was fed.
        text: all pieces so far.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_id: int) -> str:
        """Take a token, and give the text that is certain now; empty where a character is not yet
        whole."""
        self.token_ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id) or ""
        self.text += piece
        return piece

    def rest(self) -> str:
        """Give what is left at the end: characters that never became whole, as U+FFFD."""
        whole = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        piece = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += piece
        return piece
