"""From a prompt to the token ids of the three text encoders, with `tokenizers` alone.

Sources: the official `t2i_prompt` (lead-ins, template, truncation) and diffusers' FluxPipeline
(`_get_clip_prompt_embeds`, `_get_t5_prompt_embeds`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from bifrost_rt.errors import EngineSetError
from bifrost_rt.files import read_text
from bifrost_rt.manifest import REBUILD, EncoderText, Text
from bifrost_rt.notes import Truncation, truncation
from bifrost_rt.text_stream import TextStream

# Captions of the training data begin like this; the reference strips the first match, in this
# order, without a word boundary ("This island" becomes "Land").
LEAD_INS = (
    "The image shows",
    "In the image,",
    "The image depicts",
    "The image captures",
    "The image features",
    "The image is",
    "The image displays",
    "The image presents",
    "The image showcases",
    "The image you've provided appears to be",
    "This is an image of",
    "The image appears to be",
    "This image features",
    "This image depicts",
    "This image is",
    "This is",
    "This aerial image showcases",
    "The image portrays",
    "The image you've provided is",
)


def strip_lead_in(prompt: str) -> str:
    """Return the prompt as the MLLM sees it: without its lead-in, and then capitalised (which
    lowers every later letter). A prompt without a lead-in is left as it is."""
    for lead_in in LEAD_INS:
        if prompt.startswith(lead_in):
            return prompt[len(lead_in) :].strip().capitalize()
    return prompt


class Tokenizers:
    """The tokenizers of one engine set. Their files are read now, each is made at its first use.

    Raises:
        EngineSetError: a file cannot be read.
    """

    def __init__(self, folder: Path, text: Text) -> None:
        self._text = text
        self._files = {
            facts.tokenizer: _read(folder / facts.tokenizer)
            for facts in (text.mllm, text.clip, text.t5)
        }

    def mllm_prompt(self, prompt: str) -> list[int]:
        """Ids of the whole chat prompt, unpadded, cut so that the postfix always ends it.

        The user's words are ordinary text: `<|image_pad|>` and its like become characters, never
        special tokens.
        """
        facts = self._text.mllm
        room = facts.max_length - len(facts.postfix_ids)
        return [*(*facts.prefix_ids, *self._mllm_user(prompt))[:room], *facts.postfix_ids]

    def _mllm_user(self, prompt: str) -> list[int]:
        text = self._text.mllm.lead + strip_lead_in(prompt)
        return self.mllm_ordinary(text)

    def mllm_ordinary(self, text: str) -> list[int]:
        """Ids of a text whose every character is ordinary."""
        return list(self._mllm_ordinary.encode(text, add_special_tokens=False).ids)

    def clip(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """[P, 77], padded."""
        return _batch(self._clip, [clean_clip(p) for p in prompts])

    def t5(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """[P, T], padded; the network attends the padding too, so it is part of the input."""
        return _batch(self._t5, prompts)

    def truncations(self, prompts: Sequence[str], *, mllm: bool = True) -> list[Truncation]:
        """Return the prompts that are longer than a text model reads.

        Args:
            mllm: whether the MLLM reads them at all.
        """
        found = []
        facts = self._text.mllm
        for i, prompt in enumerate(prompts if mllm else ()):
            tokens = len(facts.prefix_ids) + len(self._mllm_user(prompt)) + len(facts.postfix_ids)
            if tokens > facts.max_length:
                found.append(truncation(i, "mllm", tokens, facts.max_length))
        for name, tokenizer, limit, texts in (
            ("clip", self._clip, self._text.clip.max_length, [clean_clip(p) for p in prompts]),
            ("t5", self._t5, self._text.t5.max_length, prompts),
        ):
            for i, encoding in enumerate(tokenizer.encode_batch(list(texts))):
                if encoding.overflowing:
                    found.append(truncation(i, name, _all_tokens(encoding), limit))
        return sorted(found, key=lambda one: one.prompt or 0)

    def mllm_raw(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are special. For templates, not for prompts."""
        return list(self._mllm_whole.encode(text, add_special_tokens=False).ids)

    def mllm_stream(self) -> TextStream:
        """Return the text of an answer, to be fed with its tokens."""
        return TextStream(self._mllm_whole)

    @cached_property
    def _mllm_whole(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self._files[self._text.mllm.tokenizer])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _mllm_ordinary(self) -> Tokenizer:
        document = json.loads(self._files[self._text.mllm.tokenizer])
        document |= {"added_tokens": [], "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(document))

    @cached_property
    def _clip(self) -> Tokenizer:
        return _fixed_length(self._files, self._text.clip)

    @cached_property
    def _t5(self) -> Tokenizer:
        return _fixed_length(self._files, self._text.t5)


def clean_clip(text: str) -> str:
    """Do what CLIP's reference tokenizer does before its own rules: repair encoding accidents and
    HTML entities, and collapse white space."""
    import ftfy  # here, so that importing the package does not load its tables

    return re.sub(r"\s+", " ", ftfy.fix_text(text)).strip()


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except OSError as error:
        why = error.strerror or error
        raise EngineSetError(f"{path}: cannot be read: {why}", hint=REBUILD) from None


def _fixed_length(files: Mapping[str, str], facts: EncoderText) -> Tokenizer:
    tokenizer = Tokenizer.from_str(files[facts.tokenizer])
    tokenizer.enable_truncation(facts.max_length)
    tokenizer.enable_padding(length=facts.max_length, pad_id=facts.pad_id)
    return tokenizer


def _batch(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    return np.array([e.ids for e in tokenizer.encode_batch(list(texts))], dtype=np.int64)


def _all_tokens(encoding: Encoding) -> int:
    """Tokens of the whole text: those of every piece, and the special ones of one."""
    pieces = [encoding, *encoding.overflowing]
    special = [
        [bool(m) for m, used in zip(e.special_tokens_mask, e.attention_mask, strict=True) if used]
        for e in pieces
    ]
    return sum(piece.count(False) for piece in special) + special[0].count(True)
