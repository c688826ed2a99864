"""Think, then draw: what the MLLM says of a prompt is what is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifrost_rt import Generator, RequestError, RequestTypeError, manifest, thinking
from bifrost_rt.cli import main
from bifrost_rt.result import read_parameters
from export.recipe import REWRITE

FEW: dict[str, Any] = {"num_inference_steps": 1, "decoding_steps": 2, "seed": 3}
ASKED = "Tell me of {prompt}."


def said(generator: Generator, words: str) -> str:
    """What the MLLM answers, as long as a thought may be."""
    facts = generator.manifest.text.mllm
    room = facts.max_length - len(facts.prefix_ids) - len(facts.postfix_ids)
    turn = {"role": "user", "content": words}
    return generator.chat([turn], max_new_tokens=room).text.strip()


def test_the_answer_is_drawn_and_kept(generator: Generator) -> None:
    found = generator.run("a cow", think=ASKED, **FEW)
    text = said(generator, "Tell me of a cow.")
    assert found.thought == text
    assert found.parameters["prompt"] == text
    assert (found.thoughts[0].prompt, found.thoughts[0].instruction) == ("a cow", ASKED)
    assert found.timings["think"] < found.timings["total"]
    again = generator.run(**found.parameters)
    assert again.thought is None
    assert np.array_equal(again.tokens, found.tokens)
    assert np.array_equal(np.asarray(again.image), np.asarray(found.image))


def test_what_the_set_asks(generator: Generator) -> None:
    found = generator.run("a cow", think=True, **FEW)
    assert generator.manifest.chat is not None
    assert generator.manifest.chat.think == REWRITE
    assert found.thought == said(generator, REWRITE.replace("{prompt}", "a cow"))


def test_an_instruction_without_a_place_stands_before_the_prompt(generator: Generator) -> None:
    found = generator.run("a {cow}", think="What is it?", **FEW)
    assert found.thought == said(generator, "What is it?\n\na {cow}")


def test_several_prompts_each_have_their_thought(generator: Generator) -> None:
    prompts = ["a cow", "a dog", "a cow"]
    found = generator.run(prompts, think=ASKED, **FEW)
    assert [one.prompt for one in found.thoughts] == prompts
    texts = [said(generator, f"Tell me of {prompt}.") for prompt in prompts]
    assert found.parameters["prompt"] == texts
    other = generator.run(texts, **FEW)
    assert all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(found.images, other.images, strict=True)
    )


def test_runs_of_several_think_for_themselves(generator: Generator) -> None:
    runs: list[dict[str, Any]] = [
        {"prompt": "a cow", "think": ASKED, **FEW},
        {"prompt": "a cow", **FEW},
    ]
    thought, plain = generator.run_several(runs)
    assert thought.thought == said(generator, "Tell me of a cow.")
    assert plain.thoughts == ()
    assert np.array_equal(plain.tokens, generator.run("a cow", **FEW).tokens)


def test_a_callback_hears_the_thought_as_it_comes(generator: Generator) -> None:
    heard: list[tuple[int, str]] = []
    loops: list[str] = []

    def listen(_: Generator, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
        if "thought" in tensors:
            assert tensors["prompt"] == "a cow"
            assert timestep is None
            heard.append((step, tensors["thought"]))
        loops.append(next(iter(tensors)))

    found = generator.run("a cow", think=ASKED, callback_on_step_end=listen, **FEW)
    assert [step for step, _ in heard] == list(range(len(heard)))
    assert all(b.startswith(a) for (_, a), (_, b) in itertools.pairwise(heard))
    assert heard[-1][1].strip() == found.thought
    assert loops == ["thought"] * len(heard) + ["tokens"] * 2 + ["latents"]


def test_a_callback_ends_it_and_cannot_replace_it(generator: Generator) -> None:
    def end(*_: Any) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        generator.run("a cow", think=ASKED, callback_on_step_end=end, **FEW)
    with pytest.raises(RequestError, match="can only read"):
        generator.run("a cow", think=ASKED, callback_on_step_end=lambda *_: {}, **FEW)
    assert generator.run("a cow", **FEW).thought is None


def test_a_thought_that_is_cut_is_said(generator: Generator) -> None:
    found = generator.run("a cow", think=ASKED, **FEW)
    cut = [text for text in found.warnings if "thought ended at" in text]
    assert bool(cut) is not found.thoughts[0].whole


def test_nothing_is_thought_unless_asked(generator: Generator) -> None:
    found = generator.run("a cow", think=False, **FEW)
    assert found.thoughts == ()
    assert "thoughts" not in found.about


@pytest.mark.parametrize("think", ["", "  \n", "\ud800"])
def test_an_instruction_that_is_none(generator: Generator, think: str) -> None:
    with pytest.raises(RequestError, match="think"):
        generator.run("a cow", think=think, **FEW)


def test_other_types_and_missing_prompts(generator: Generator) -> None:
    with pytest.raises(RequestTypeError, match="think must be True, or an instruction"):
        generator.run("a cow", think=1, **FEW)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="think needs a prompt"):
        generator.run(image=np.zeros((8, 8, 3), np.uint8), think=True, **FEW)


def test_sets_that_cannot(generator: Generator) -> None:
    found: manifest.Manifest = generator.manifest
    with pytest.raises(RequestError, match="holds no conversations"):
        thinking.instruction(dataclasses.replace(found, chat=None), True)
    assert found.chat is not None
    older = dataclasses.replace(found, chat=dataclasses.replace(found.chat, think=None))
    with pytest.raises(RequestError, match="states no instruction"):
        thinking.instruction(older, True)
    assert thinking.instruction(older, "So?") == "So?"


def test_on_the_command_line(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--num-inference-steps", "1", "--decoding-steps", "2", "--seed", "3"]
    command = ["generate", "--engines", str(alpha_set)]
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    assert main([*command, "a cow", "--think", ASKED, *few, "-o", str(first), "--json"]) == 0
    out, err = capsys.readouterr()
    thought = json.loads(out)["thoughts"][0]["text"]
    assert f"thought: {thought}" in err
    assert read_parameters(first)["prompt"] == thought
    assert main([*command, "--like", str(first), "-o", str(again)]) == 0
    assert "thought:" not in capsys.readouterr().err
    assert again.read_bytes() == first.read_bytes()
    assert main([*command, "--think", "a cow"]) == 1
    assert "the prompt comes first" in capsys.readouterr().err
