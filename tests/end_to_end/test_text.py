"""Tokenisation against the reference's, without transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bifrost_rt import EngineSetError, inspect, manifest
from bifrost_rt.tokenizers import Tokenizers, strip_lead_in
from tests.conftest import ALPHA, Case

TEXTS = json.loads((ALPHA / "tokenizer_cases.json").read_text())


@pytest.fixture(scope="module")
def tokenizers(alpha_set: Path) -> Tokenizers:
    return Tokenizers(alpha_set, manifest.read(alpha_set).text)


def test_all_31_texts_are_there() -> None:
    assert len(TEXTS) == 31


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: repr(t["text"])[:30])
def test_ids_are_the_references(tokenizers: Tokenizers, text: dict) -> None:
    assert tokenizers.mllm_raw(text["text"]) == text["qwen"]
    assert tokenizers.clip([text["text"]]).tolist() == [text["clip77"]]
    assert tokenizers.t5([text["text"]]).tolist() == [text["t5"]]


def test_prompts_of_the_golden_cases(tokenizers: Tokenizers, case: Case) -> None:
    """Template, lead-in and truncation, down to the ids that the reference's MLLM saw."""
    n = len(case.facts["prompts"])
    for i, prompt in enumerate(case.facts["prompts"]):
        assert tokenizers.mllm_prompt(prompt) == case.tensors[f"mllm.text_ids.{n + i}"].tolist()
    assert tokenizers.mllm_prompt("") == case.tensors["mllm.text_ids.0"].tolist()
    prompts = case.facts["prompts"]
    assert np.array_equal(tokenizers.clip(prompts), case.tensors["flux.clip_input_ids"])
    assert np.array_equal(tokenizers.t5(prompts), case.tensors["flux.t5_input_ids"])


LEAD_INS = json.loads((ALPHA / "verify.json").read_text())["remove_suffix_quirk"]


@pytest.mark.parametrize("prompt", LEAD_INS)
def test_lead_ins_are_stripped_as_the_reference_strips_them(prompt: str) -> None:
    assert strip_lead_in(prompt) == LEAD_INS[prompt]


def test_a_long_prompt_is_cut_before_the_postfix(tokenizers: Tokenizers) -> None:
    ids = tokenizers.mllm_prompt("word " * 400)
    assert len(ids) == 48
    assert ids[-6:] == [602, 198, 601, 383, 198, 609]


def test_special_tokens_are_special_in_templates_only(tokenizers: Tokenizers) -> None:
    assert tokenizers.mllm_raw("<|image_pad|>") == [612]
    assert 612 not in tokenizers.mllm_prompt("<|image_pad|>")


def test_a_byte_order_mark_is_no_part_of_a_set(alpha_set: Path, tmp_path: Path) -> None:
    """In the manifest, the tokenizers and the report alike."""
    folder = Path(shutil.copytree(alpha_set, tmp_path / "set"))
    facts = manifest.read(alpha_set)
    names = [part.tokenizer for part in (facts.text.mllm, facts.text.clip, facts.text.t5)]
    for name in (manifest.FILENAME, inspect.REPORT, *names):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert manifest.read(folder) == facts
    marked, plain = Tokenizers(folder, facts.text), Tokenizers(alpha_set, facts.text)
    for text in ("a red circle", "café 猫"):
        assert marked.mllm_prompt(text) == plain.mllm_prompt(text)
        assert np.array_equal(marked.clip([text]), plain.clip([text]))
        assert np.array_equal(marked.t5([text]), plain.t5([text]))
    unlisted = dataclasses.replace(facts, files={})
    assert inspect.precision(folder, unlisted) == inspect.precision(alpha_set, facts)


def test_a_tokenizer_that_cannot_be_read_is_named(alpha_set: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineSetError, match=r"mllm\.json: cannot be read: No such file"):
        Tokenizers(tmp_path, manifest.read(alpha_set).text)
