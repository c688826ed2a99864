"""The three tokenizers, made from the world's own words and written as their authors publish them.

Every word of the world is one token; anything else falls to bytes (Qwen, CLIP) or letters (T5).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from scenes.captions import caption, describe
from scenes.layout import place, scatter
from scenes.sampling import training_spec
from training.template import CHAT_TEMPLATE, SPECIAL_TOKENS, ask_for_image, ask_for_words

CLIP_LENGTH = 77
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CLIP_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def _corpus() -> tuple[str, ...]:
    rng = np.random.default_rng(7)
    texts = []
    for _ in range(3000):
        spec = training_spec(rng)
        prompt = caption(spec, rng)
        texts += [prompt, f" {prompt}", prompt.capitalize()]
        texts.append(describe(place(spec, rng), spec.drawn_background))
        texts.append(describe(scatter(rng, 4), spec.drawn_background))
    return tuple(texts)


def _plain(text: str) -> str:
    for special in SPECIAL_TOKENS:
        text = text.replace(special, "\n")
    return text


@cache
def qwen_tokenizer() -> Tokenizer:
    """Byte-level BPE with Qwen's splitting rule and its special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    frame = [_plain(ask_for_image("")), _plain(ask_for_words(1))] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=20,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*_corpus(), *frame], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS]
    )
    return tokenizer


@cache
def clip_tokenizer() -> Tokenizer:
    """Lower-cased BPE with word ends, as CLIP's."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=20,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), learner)
    # CLIP's order: bytes, bytes at word ends, merges, then the two special tokens with the
    # highest ids, because the pooled output is taken at the highest id.
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(f"{a}</w>" for a in alphabet)]
    pieces += [a + b for a, b in merges]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *specials]))}
    tokenizer.model = models.BPE(
        vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens([AddedToken(s, normalized=False) for s in specials])
    start, end = (token_id(tokenizer, s) for s in specials)
    tokenizer.post_processor = processors.RobertaProcessing(
        (specials[1], end), (specials[0], start), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def t5_tokenizer() -> Tokenizer:
    """Unigram over whole words, letters behind them."""
    words = sorted({w for text in _corpus() for w in text.split()})
    letters = sorted({c for w in words for c in w} | set("abcdefghijklmnopqrstuvwxyz.,'-"))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{w}", -4.0) for w in words] + [("▁", -8.0)] + [(c, -10.0) for c in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(
        [AddedToken(s, normalized=False) for s in ("<pad>", "</s>", "<unk>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a token that the tokenizer must have."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return found


def clip_ids(texts: list[str]) -> list[list[int]]:
    """[B, 77], padded with the end token as CLIP does."""
    tokenizer = clip_tokenizer()
    end = token_id(tokenizer, "<|endoftext|>")
    rows = [e.ids[: CLIP_LENGTH - 1] for e in tokenizer.encode_batch(texts)]
    return [row + [end] * (CLIP_LENGTH - len(row)) for row in rows]


def t5_ids(texts: list[str], length: int) -> list[list[int]]:
    """[B, length], padded with 0 and ended with 1."""
    rows = [[*e.ids[:-1][: length - 1], 1] for e in t5_tokenizer().encode_batch(texts)]
    return [row + [0] * (length - len(row)) for row in rows]


def _write(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def _added(tokenizer: Tokenizer, names: tuple[str, ...]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {str(tokenizer.token_to_id(n)): {"content": n, **flags, "special": True} for n in names}


def _write_bpe(tokenizer: Tokenizer, folder: Path, specials: tuple[str, ...]) -> None:
    model = json.loads(tokenizer.to_str())["model"]
    _write(folder, "tokenizer.json", tokenizer.to_str(pretty=True))
    vocab = {k: v for k, v in model["vocab"].items() if k not in specials}
    if specials[0] == "<|startoftext|>":  # CLIP lists its special tokens in vocab.json
        vocab = model["vocab"]
    _write(folder, "vocab.json", json.dumps(vocab, ensure_ascii=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    _write(folder, "merges.txt", "\n".join(["#version: 0.2", *merges]))


def write_tokenizers(mllm: Path, flux: Path, t5_length: int) -> None:
    """Return the tokenizer files of the mllm folder and of both text encoders."""
    qwen, clip, t5 = qwen_tokenizer(), clip_tokenizer(), t5_tokenizer()
    _write_bpe(qwen, mllm, SPECIAL_TOKENS)
    _write(mllm, "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    _write(
        mllm,
        "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": _added(qwen, SPECIAL_TOKENS),
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 4096,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    clip_specials = ("<|startoftext|>", "<|endoftext|>")
    _write_bpe(clip, flux / "tokenizer", clip_specials)
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    fills = {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    _write(flux / "tokenizer", "special_tokens_map.json", {**ends, **fills})
    _write(
        flux / "tokenizer",
        "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": _added(clip, clip_specials),
            **ends,
            **fills,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": CLIP_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
        },
    )
    t5_specials = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write(flux / "tokenizer_2", "tokenizer.json", t5.to_str(pretty=True))
    _write(flux / "tokenizer_2", "special_tokens_map.json", t5_specials)
    _write(
        flux / "tokenizer_2",
        "tokenizer_config.json",
        {
            "added_tokens_decoder": _added(t5, tuple(t5_specials.values())),
            **t5_specials,
            "clean_up_tokenization_spaces": False,
            "extra_ids": 0,
            "model_max_length": t5_length,
            "tokenizer_class": "T5Tokenizer",
        },
    )
