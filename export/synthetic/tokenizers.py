"""Three small tokenizers, trained on the spot, in the dialects in which folders publish them.

No vocabulary is taken from elsewhere. Splitting rules, special tokens and file layouts are those
of Qwen2.5, CLIP and T5; any text can be encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

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

from export.synthetic.shapes import Layout

CLIP_LENGTH = 77
QWEN_PIECES, CLIP_PIECES = 600, 660  # before the special tokens
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLIP_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORDS = """
a an the of and in on at with under over behind beside between near above below to from into
one two three four five six seven eight nine ten many several
red green blue yellow orange purple white black grey brown pink golden silver bright dark pale
small large tiny huge tall short wide narrow old new quiet wooden stone glass round square empty
cat cats dog dogs bird birds horse cow sheep fish tree trees flower flowers house houses bridge
river lake sea boat boats mountain mountains sky cloud clouds sun moon stars road street town city
harbour garden field forest beach island tower castle window door wall roof table chair lamp clock
book cup plate bowl apple apples bread bicycle car cars train bus umbrella bench fence market shop
man woman child children people worker sailor baker photo picture image drawing painting scene
sitting standing sleeping walking running playing reading looking flying leaning covered surrounded
full left right day night dawn dusk sunrise sunset morning evening winter summer snow rain mist
light shadow shows features generate system user assistant you are helpful describe
"""


@cache
def qwen() -> Tokenizer:
    """Byte-level BPE; the special tokens come after all pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _bytes_of(pre_tokenizers.Split(Regex(_QWEN_SPLIT), "isolated"))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=QWEN_PIECES, initial_alphabet=_alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in QWEN_SPECIAL])
    return tokenizer


@cache
def clip() -> Tokenizer:
    """Lower-cased BPE with word ends. Start and end token have the highest ids."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=CLIP_SPECIAL[1]))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_CLIP_SPLIT), "removed", invert=True)
    tokenizer.pre_tokenizer = _bytes_of(split)
    trainer = trainers.BpeTrainer(
        vocab_size=CLIP_PIECES - 256,
        initial_alphabet=_alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    merges = _merges(tokenizer)
    pieces = [*_alphabet(), *(f"{a}</w>" for a in _alphabet()), *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *CLIP_SPECIAL]))}
    tokenizer.model = models.BPE(
        vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=CLIP_SPECIAL[1]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CLIP_SPECIAL])
    start, end = CLIP_SPECIAL
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, vocab[end]), (start, vocab[start]), trim_offsets=False, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@cache
def t5() -> Tokenizer:
    """Unigram over whole words, with letters behind them."""
    words = _WORDS.split()
    pieces = [(token, 0.0) for token in T5_SPECIAL] + [(f"▁{word}", -4.0) for word in words]
    pieces += [("▁", -8.0), *((c, -10.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789.,'-!?")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in T5_SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def qwen_id(token: str) -> int:
    """Id of a special token of the MLLM."""
    return _id_of(qwen(), token)


def clip_end() -> int:
    """Id of CLIP's end token."""
    return _id_of(clip(), CLIP_SPECIAL[1])


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def write(mllm: Path, flux: Path, layout: Layout) -> None:
    """Return the tokenizer files of the mllm folder and of both text encoders."""
    _write_bpe(qwen(), mllm, layout.mllm_tokenizer, QWEN_SPECIAL, layout)
    config = {
        "added_tokens_decoder": _added(qwen(), QWEN_SPECIAL),
        "eos_token": "<|im_end|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    if layout.chat_template == "chat_template.jinja":
        (mllm / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    elif layout.chat_template == "chat_template.json":
        _write_json(mllm / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    else:
        config["chat_template"] = CHAT_TEMPLATE
    _write_json(mllm / "tokenizer_config.json", config)

    start, end = CLIP_SPECIAL
    _write_bpe(clip(), flux / "tokenizer", layout.clip_tokenizer, (), layout)
    names = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    _write_json(flux / "tokenizer" / "special_tokens_map.json", names)
    _write_json(
        flux / "tokenizer" / "tokenizer_config.json",
        {
            "added_tokens_decoder": _added(clip(), CLIP_SPECIAL),
            **names,
            "model_max_length": CLIP_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
        },
    )

    pad, end, unknown = T5_SPECIAL
    folder = flux / "tokenizer_2"
    folder.mkdir(parents=True)
    _write_json(folder / "tokenizer.json", _document(t5(), layout))
    names = {"eos_token": end, "pad_token": pad, "unk_token": unknown}
    _write_json(folder / "special_tokens_map.json", names)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": _added(t5(), T5_SPECIAL),
            **names,
            "extra_ids": 0,
            "model_max_length": 512,
            "tokenizer_class": "T5Tokenizer",
        },
    )


def _write_bpe(
    tokenizer: Tokenizer, folder: Path, files: str, kept_out: tuple[str, ...], layout: Layout
) -> None:
    """`kept_out`: special tokens that the vocabulary file does not list."""
    folder.mkdir(parents=True, exist_ok=True)
    if files in ("json", "both"):
        _write_json(folder / "tokenizer.json", _document(tokenizer, layout))
    if files in ("vocab", "both"):
        vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
        _write_json(folder / "vocab.json", {k: v for k, v in vocab.items() if k not in kept_out})
        lines = ["#version: 0.2", *(" ".join(pair) for pair in _merges(tokenizer))]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _document(tokenizer: Tokenizer, layout: Layout) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    if "merges" in document["model"]:
        pairs = [list(pair) for pair in _merges(tokenizer)]
        strings = [" ".join(pair) for pair in pairs]
        document["model"]["merges"] = pairs if layout.merges == "pairs" else strings
    if layout.own_lengths:
        cut = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
        fill = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
        document |= {"truncation": cut, "padding": fill}
    return document


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    found = json.loads(tokenizer.to_str())["model"]["merges"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in found]
    return [(left, right) for left, right in pairs]


def _bytes_of(split: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, as_bytes])


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _corpus() -> Iterator[str]:
    for word in _WORDS.split():
        yield f"{word} {word} {word.capitalize()}"


def _added(tokenizer: Tokenizer, names: tuple[str, ...]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(tokenizer.token_to_id(name)): {"content": name, **flags, "special": True}
        for name in names
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
