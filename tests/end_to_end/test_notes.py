"""What is asked for and not done is said: in the log and in the result, with the same words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bifrost_rt import Generator, manifest
from bifrost_rt.tokenizers import Tokenizers
from tests.conftest import ALPHA, Case

FEW: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "decoding_steps": 2}
SHORT, LONG = "a cow", "a photo of a wooden bridge over a river " * 12
TEXTS = json.loads((ALPHA / "tokenizer_cases.json").read_text())


def test_a_prompt_that_fits_has_no_note(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    result = generator.run(SHORT, **FEW)
    assert (result.notes, result.warnings, result.truncated) == ((), [], [])
    assert caplog.text == ""


def test_a_long_prompt_is_said_for_every_model_that_cuts_it(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    result = generator.run([SHORT, SHORT, LONG], **FEW)
    assert [(one.prompt, one.encoder, one.limit) for one in result.truncated] == [
        *((2, "mllm", 48), (2, "clip", 77), (2, "t5", 32))
    ]
    assert all(one.tokens > one.limit for one in result.truncated)
    assert [record.getMessage() for record in caplog.records] == result.warnings
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    mllm, clip, t5 = result.warnings
    tokens = [one.tokens for one in result.truncated]
    assert mllm.startswith(f"prompt 2: truncated: the MLLM reads 48 of {tokens[0]} tokens")
    assert clip == (
        f"prompt 2: truncated: CLIP reads 77 of {tokens[1]} tokens; this is usual with FLUX, where "
        "T5 reads long prompts"
    )
    assert t5.startswith(f"prompt 2: truncated: T5 reads 32 of {tokens[2]} tokens")


def test_what_the_mllm_does_not_read_is_not_cut_for_it(generator: Generator) -> None:
    first = generator.run(LONG, **FEW)
    again = generator.run(LONG, **FEW, tokens=first.tokens)
    assert [one.encoder for one in again.truncated] == ["clip", "t5"]


def test_the_golden_cases_that_are_truncated_are_known(alpha_set: Path, case: Case) -> None:
    """Cut as the reference cuts: the MLLM's ids end at the limit."""
    tokenizers = Tokenizers(alpha_set, manifest.read(alpha_set).text)
    n = len(case.facts["prompts"])
    cut = {
        one.prompt for one in tokenizers.truncations(case.facts["prompts"]) if one.encoder == "mllm"
    }
    full = {i for i in range(n) if len(case.tensors[f"mllm.text_ids.{n + i}"]) == 48}
    assert cut <= full
    assert cut == (full if case.name in ("case_03", "case_07") else set())


@pytest.mark.parametrize("words", [0, 1, 5, 20, 25, 31, 60, 75, 76, 120])
def test_tokens_are_counted_as_the_tokenizer_counts_them(alpha_set: Path, words: int) -> None:
    text = "cow " * words
    facts = manifest.read(alpha_set).text
    wide = dataclasses.replace(
        facts,
        mllm=dataclasses.replace(facts.mllm, max_length=10**4),
        clip=dataclasses.replace(facts.clip, max_length=10**4),
        t5=dataclasses.replace(facts.t5, max_length=10**4),
    )
    whole = Tokenizers(alpha_set, wide)
    assert whole.truncations([text]) == []
    true = {
        "mllm": len(whole.mllm_prompt(text)),
        "clip": 1 + int((whole.clip([text])[0] != facts.clip.pad_id).sum()),
        "t5": int((whole.t5([text])[0] != facts.t5.pad_id).sum()),
    }
    limits = {"mllm": facts.mllm.max_length, "clip": 77, "t5": 32}
    found = {one.encoder: one.tokens for one in Tokenizers(alpha_set, facts).truncations([text])}
    assert found == {name: n for name, n in true.items() if n > limits[name]}


def test_counting_changes_no_ids(alpha_set: Path) -> None:
    tokenizers = Tokenizers(alpha_set, manifest.read(alpha_set).text)
    for text in TEXTS:
        tokenizers.truncations([text["text"], LONG])
        assert tokenizers.clip([text["text"]]).tolist() == [text["clip77"]]
        assert tokenizers.t5([text["text"]]).tolist() == [text["t5"]]


def test_what_has_no_effect_is_said_the_same_way(
    alpha_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Generator(alpha_set) as generator:
        model = dataclasses.replace(generator.manifest.model, guidance_embeds=False)
        generator.manifest = dataclasses.replace(generator.manifest, model=model)
        default = generator.manifest.defaults.guidance_scale
        for given in (None, default):
            checked = _checked(generator, guidance_scale=given)
            assert list(generator._notes(checked, None)) == []
        checked = _checked(generator, guidance_scale=9.0)
        (note,) = generator._notes(checked, None)
    assert str(note) == ("guidance_scale=9.0 has no effect: this model has no guidance embedding")


def test_a_cache_that_skips_no_step_is_said(generator: Generator) -> None:
    few = {**FEW, "num_inference_steps": 1}
    assert generator.run(SHORT, **few, cache_interval=2).warnings == [
        "cache_interval=2 has no effect: with num_inference_steps=1 none is skipped"
    ]
    assert generator.run(SHORT, **{**few, "num_inference_steps": 9}, cache_interval=2).notes == ()


def _checked(generator: Generator, **changes: Any) -> Any:
    from bifrost_rt import request

    asked = {"prompt": "a", "seed": 1, "output_type": "np"}
    return request.check(generator.manifest, **{**asked, **changes})
