"""`Generator.chat` from pixels and words to words, beside transformers' processor and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import (
    BudgetError,
    Generator,
    GeneratorStateError,
    RequestError,
    RequestTypeError,
    backends,
)
from tests.conftest import ALPHA
from tests.conversations import Judge

TOKENS = 32


def scene(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def shown(seed: int, *size: int) -> dict[str, Any]:
    return {"type": "image", "image": scene(seed, *size)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text alone": [{"role": "user", "content": "What is a cow?"}],
    "a system turn": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ],
    "one image": [{"role": "user", "content": [shown(1), text("Describe the scene.")]}],
    "two images": [{"role": "user", "content": [text("a"), shown(2, 40, 120), shown(3, 200, 30)]}],
    "several turns": [
        {"role": "user", "content": [shown(4, 56, 56), text("which is red?")]},
        {"role": "assistant", "content": "the second"},
        {"role": "user", "content": [text("and this?"), shown(5, 70, 140)]},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why not?"},
    ],
}


class Reference:
    """transformers: chat template, processor, model."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        from export.tokenizer_files import chat_template

        self.tokenizer = Tokenizer.from_file(str(ALPHA / "mllm" / "tokenizer.json"))
        self.shell = PreTrainedTokenizerFast(tokenizer_object=self.tokenizer)
        self.template = chat_template(ALPHA / "mllm")[1]
        self.images = Qwen2VLImageProcessorPil.from_pretrained(ALPHA / "mllm")
        self.judge = Judge(ALPHA / "mllm", ALPHA / "bifrost")

    def answer(self, conversation: list[dict[str, Any]], tokens: int) -> list[int]:
        import torch

        written = self.shell.apply_chat_template(
            conversation, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        parts = [
            part["image"]
            for message in conversation
            if not isinstance(message["content"], str)
            for part in message["content"]
            if "image" in part
        ]
        inputs: dict[str, Any] = {}
        if parts:
            seen = self.images(images=parts, return_tensors="pt")
            inputs |= {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
            for _, height, width in seen["image_grid_thw"].tolist():
                places = "<|place|>" * (height * width // 4)
                written = written.replace("<|image_pad|>", places, 1)
        ids = self.tokenizer.encode(written.replace("<|place|>", "<|image_pad|>")).ids
        row = torch.tensor([ids])
        inputs |= {"input_ids": row, "attention_mask": torch.ones_like(row)}
        model = self.judge.model
        if parts:
            inputs["mm_token_type_ids"] = (row == model.config.image_token_id).int()
        with torch.no_grad():
            found = model.generate(
                **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        return list(found[0, len(ids) :].tolist())


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    reference = Reference()
    return {name: reference.answer(asked, TOKENS) for name, asked in CONVERSATIONS.items()}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def opened(request: pytest.FixtureRequest, alpha_set: Path) -> Any:
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(reason)
    with Generator(alpha_set, backend=request.param) as generator:
        yield generator


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_those_of_transformers(
    opened: Generator, expected: dict[str, list[int]], name: str
) -> None:
    found = opened.chat(CONVERSATIONS[name], max_new_tokens=TOKENS)
    # a stop token ends ours; the reference was told to go on
    assert found.token_ids == expected[name][: len(found.token_ids)]
    stopped = found.finish_reason == "stop"
    assert len(found.token_ids) < TOKENS if stopped else len(found.token_ids) == TOKENS
    assert stopped or found.finish_reason == "length"
    assert found.usage.completion_tokens == len(found.token_ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + len(found.token_ids)


@pytest.fixture(scope="module")
def generator(alpha_set: Path) -> Any:
    with Generator(alpha_set) as one:
        yield one


IMAGE = CONVERSATIONS["one image"]


def test_pieces_are_the_text_and_seeds_repeat_it(generator: Generator) -> None:
    pieces: list[str] = []
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 3.0, "seed": 5}
    first = generator.chat(IMAGE, stream=pieces.append, **options)
    assert "".join(pieces) == first.text
    assert all(pieces)
    assert generator.chat(IMAGE, **options).token_ids == first.token_ids
    other = generator.chat(IMAGE, **{**options, "seed": 6})
    assert other.token_ids != first.token_ids
    drawn = generator.chat(IMAGE, max_new_tokens=24, temperature=3.0)
    again = generator.chat(IMAGE, max_new_tokens=24, temperature=3.0, seed=drawn.seed)
    assert again.text == drawn.text


def test_what_conversations_have_in_common_is_not_computed_again(alpha_set: Path) -> None:
    following = [
        *IMAGE,
        {"role": "assistant", "content": "A cow."},
        {"role": "user", "content": "Which colour?"},
    ]
    with Generator(alpha_set) as warm, Generator(alpha_set, prompt_cache=0) as cold:
        first = warm.chat(IMAGE, max_new_tokens=4)
        assert first.usage.cached_tokens == 0
        assert "vision_encode" in first.timings
        found = warm.chat(following, max_new_tokens=16)
        assert found.usage.cached_tokens >= first.usage.prompt_tokens - 3
        assert "vision_encode" not in found.timings  # the same image
        assert found.token_ids == cold.chat(following, max_new_tokens=16).token_ids
        another = [{"role": "user", "content": [shown(9), text("Describe the scene.")]}]
        assert warm.chat(another, max_new_tokens=4).usage.cached_tokens < 30


def test_drawing_and_speaking_take_turns(alpha_set: Path, generator: Generator) -> None:
    few: dict[str, Any] = {"num_inference_steps": 2, "decoding_steps": 4, "output_type": "np"}
    image = generator.run("a cow", seed=1, **few).images
    answer = generator.describe(image[0], max_new_tokens=8)
    assert np.array_equal(generator.run("a cow", seed=1, **few).images, image)
    assert generator.describe(image[0], max_new_tokens=8).text == answer.text


def test_within_a_budget_the_answer_is_the_same(alpha_set: Path, generator: Generator) -> None:
    with Generator(alpha_set, memory_budget="40MiB") as small:
        assert small.reloads()
        for _ in range(2):
            found = small.chat(IMAGE, max_new_tokens=12)
            assert found.token_ids == generator.chat(IMAGE, max_new_tokens=12).token_ids
        with pytest.raises(BudgetError, match="engine `vision_encode` needs"):
            small.describe(scene(1, 1000, 1000))
        assert small.chat(IMAGE, max_new_tokens=12).token_ids == found.token_ids


def test_a_callback_that_raises_ends_the_answer_alone(generator: Generator) -> None:
    def fail(piece: str) -> None:
        raise ZeroDivisionError

    def reenter(piece: str) -> None:
        generator.describe(scene(1))

    expected = generator.chat(IMAGE, max_new_tokens=12).text
    with pytest.raises(ZeroDivisionError):
        generator.chat(IMAGE, max_new_tokens=12, stream=fail)
    with pytest.raises(GeneratorStateError):
        generator.chat(IMAGE, max_new_tokens=12, stream=reenter)
    assert generator.chat(IMAGE, max_new_tokens=12).text == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_new_tokens": 0}, RequestError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.5}, RequestTypeError, "max_new_tokens must be a whole number"),
        ({"temperature": float("nan")}, RequestError, "temperature must be finite in float32"),
        ({"temperature": -1.0}, RequestError, "temperature must be a number from 0 to 100"),
        ({"temperature": "hot"}, RequestTypeError, "temperature must be a number, got 'hot'"),
        ({"top_p": 0.0}, RequestError, "top_p must be a number above 0, up to 1"),
        ({"top_k": 5000}, RequestError, "top_k must be at most 1024, got 5000"),
        ({"repetition_penalty": 0.0}, RequestError, "repetition_penalty must be 0.01 to 100"),
        ({"seed": -1}, RequestError, "seed must be at least 0, got -1"),
    ],
)
def test_options_that_cannot_be_served_are_named(
    generator: Generator, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        generator.chat(IMAGE, **options)


def test_messages_that_cannot_be_served_are_named(generator: Generator) -> None:
    with pytest.raises(RequestError, match="messages is an empty list"):
        generator.chat([])
    with pytest.raises(RequestError, match="image is no image that Pillow reads|content"):
        generator.describe(b"no image")
    words = "a cow by the sea " * 3000
    with pytest.raises(RequestError, match=r"has \d+ tokens, its answer's not counted; it may hav"):
        generator.chat([{"role": "user", "content": words}])
    with pytest.raises(TypeError, match="unexpected option 'stop'"):
        generator.chat(IMAGE, stop="x")  # type: ignore[call-arg]


def test_a_closed_generator_does_not_speak(alpha_set: Path) -> None:
    with Generator(alpha_set) as one:
        pass
    with pytest.raises(GeneratorStateError, match=r"chat\(\): this Generator is closed"):
        one.chat(IMAGE)


def test_sets_that_cannot_say_so(alpha_set: Path) -> None:
    import dataclasses

    with Generator(alpha_set) as one:
        one.manifest = dataclasses.replace(one.manifest, chat=None)
        with pytest.raises(RequestError, match="holds no conversations: the chat template"):
            one.chat(IMAGE)
