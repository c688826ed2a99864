"""The tokenizers know the world's words, and read equally here and in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

from scenes.heldout import heldout_prompts
from training.template import ask_for_image
from training.tokenizers import (
    clip_ids,
    clip_tokenizer,
    qwen_tokenizer,
    t5_ids,
    t5_tokenizer,
    write_tokenizers,
)

TEXTS = [*sorted(heldout_prompts())[::10], "A Zebra, 12 green\nsquares é!", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder / "mllm", folder / "flux", 24)
    return folder


@pytest.mark.parametrize(
    ("kind", "place", "ours"),
    [
        (AutoTokenizer, "mllm", qwen_tokenizer),
        (CLIPTokenizer, "flux/tokenizer", clip_tokenizer),
        (T5TokenizerFast, "flux/tokenizer_2", t5_tokenizer),
    ],
)
def test_transformers_reads_the_written_files_equally(folder, kind, place, ours) -> None:
    official = kind.from_pretrained(folder / place)
    written = Tokenizer.from_file(str(folder / place / "tokenizer.json"))
    for text in TEXTS:
        assert official(text).input_ids == ours().encode(text).ids == written.encode(text).ids


def test_the_chat_template_gives_the_official_frame(folder: Path) -> None:
    official = AutoTokenizer.from_pretrained(folder / "mllm")
    turn = [{"role": "user", "content": "Generate an image of a red circle"}]
    text = official.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert f"{text}<|vision_start|>" == ask_for_image("a red circle")


def test_the_postfix_is_six_tokens_long() -> None:
    postfix = ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ", "<|vision_start|>"]
    assert qwen_tokenizer().encode(ask_for_image("a cross")).tokens[-6:] == postfix


def test_every_word_of_the_world_is_one_token() -> None:
    for prompt in heldout_prompts():
        words = len(prompt.split())
        assert len(clip_tokenizer().encode(prompt).ids) == words + 2
        assert len(t5_tokenizer().encode(prompt).ids) == words + 1


def test_rows_are_padded_as_the_encoders_expect() -> None:
    clip, t5 = clip_ids(["a cross"])[0], t5_ids(["a cross " * 30], 24)[0]
    assert len(clip) == 77
    assert clip[3] == clip[76] == max(clip)
    assert len(t5) == 24
    assert t5[-1] == 1
