"""From a prompt to the token ids of the three text encoders, with `tokenizers` alone.

Sources: the official `t2i_prompt` (lead-ins, template, truncation) and diffusers' FluxPipeline
(`_get_clip_prompt_embeds`, `_get_t5_prompt_embeds`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bifrost_rt.manifest import EncoderText, Text

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
    """The prompt as the MLLM sees it: without its lead-in, and then capitalised (which lowers every
    later letter). A prompt without a lead-in is left as it is."""
    for lead_in in LEAD_INS:
        if prompt.startswith(lead_in):
            return prompt[len(lead_in) :].strip().capitalize()
    return prompt


class Tokenizers:
    """The tokenizers of one engine set, each loaded at its first use."""

    def __init__(self, folder: Path, text: Text) -> None:
        self._folder = folder
        self._text = text

    def mllm_prompt(self, prompt: str) -> list[int]:
        """Ids of the whole chat prompt, unpadded, cut so that the postfix always ends it.

        The user's words are ordinary text: `<|image_pad|>` and its like become characters, never
        special tokens.
        """
        facts = self._text.mllm
        user = self._mllm_ordinary.encode(
            facts.lead + strip_lead_in(prompt), add_special_tokens=False
        ).ids
        room = facts.max_length - len(facts.postfix_ids)
        return [*(*facts.prefix_ids, *user)[:room], *facts.postfix_ids]

    def clip(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """[P, 77], padded."""
        return _batch(self._clip, [clean_clip(p) for p in prompts])

    def t5(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """[P, T], padded; the network attends the padding too, so it is part of the input."""
        return _batch(self._t5, prompts)

    def mllm_raw(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are special. For templates, not for prompts."""
        tokenizer = Tokenizer.from_file(str(self._folder / self._text.mllm.tokenizer))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _mllm_ordinary(self) -> Tokenizer:
        path = self._folder / self._text.mllm.tokenizer
        document = json.loads(path.read_text(encoding="utf-8"))
        document |= {"added_tokens": [], "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(document))

    @cached_property
    def _clip(self) -> Tokenizer:
        return _fixed_length(self._folder, self._text.clip)

    @cached_property
    def _t5(self) -> Tokenizer:
        return _fixed_length(self._folder, self._text.t5)


def clean_clip(text: str) -> str:
    """What CLIP's reference tokenizer does before its own rules: repair encoding accidents and HTML
    entities, and collapse white space."""
    import ftfy  # here, so that importing the package does not load its tables

    return re.sub(r"\s+", " ", ftfy.fix_text(text)).strip()


def _fixed_length(folder: Path, facts: EncoderText) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / facts.tokenizer))
    tokenizer.enable_truncation(facts.max_length)
    tokenizer.enable_padding(length=facts.max_length, pad_id=facts.pad_id)
    return tokenizer


def _batch(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.int64]:
    return np.array([e.ids for e in tokenizer.encode_batch(list(texts))], dtype=np.int64)
