"""A conversation -> the MLLM's answer: look at the images, read the turns, speak token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import image_processor, messages, prompt_cache, text_inputs, vision
from bifrost_rt.answering import Answering, Conversation, FinishReason
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.engines import Engines
from bifrost_rt.errors import RequestError
from bifrost_rt.image_processor import Patches
from bifrost_rt.manifest import Chat, SetSpec
from bifrost_rt.messages import Turn
from bifrost_rt.tokenizers import Tokenizers

# Called with every token's piece of text, which is empty while a character is not whole; raises to
# end the answer.
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        prompt_tokens: of the conversation in its template, images among them.
        image_tokens: of these, those of images.
        cached_tokens: of these, those whose keys and values the conversation before had left.
        completion_tokens: of the answer.
    """

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and answer."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class ChatResult:
    """What `Generator.chat` returns.

    Attributes:
        text: the answer.
        token_ids: its tokens, without the one that ended it.
        finish_reason: "stop" where the model ended it, "length" at the limit or at the end of the
            context.
        usage: tokens.
        timings: seconds of every engine, of `prefill` and `decode`, and `total`;
            `per_token` is `decode` over the tokens that it gave.
        seed: passed to `chat` again, it gives the same answer.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: dict[str, float] = field(default_factory=dict)
    seed: int = 0


def facts(manifest: SetSpec) -> Chat:
    """Say how the set holds conversations.

    Raises:
        RequestError: it does not.
    """
    if manifest.chat is None:
        raise RequestError(
            f"the set {manifest.name!r} holds no conversations: the chat template that it was "
            "built with is not Qwen2.5-VL's",
            hint="rebuild it with the chat template of the model that the training started from",
        )
    return manifest.chat


class Speaker:
    """Answers conversations with a set's engines, one at a time. What two conversations begin with
    in common, images among it, is computed once."""

    def __init__(self, engines: Engines, tokenizers: Tokenizers, manifest: SetSpec) -> None:
        self._engines, self._tokenizers, self._manifest = engines, tokenizers, manifest
        self._answering = Answering(engines, manifest)

    def answer(self, turns: Sequence[Turn], asked: ChatParameters, on_text: OnText) -> ChatResult:
        """Answer the last turn.

        Raises:
            RequestError: the set holds no conversations or reads no images, or the conversation is
                longer than its context.
            BudgetError: the conversation does not fit into the memory budget.
            NumericsError: an image's tokens are not finite.
        """
        start = time.perf_counter()
        timings: dict[str, float] = {}
        chat, engines = facts(self._manifest), self._engines
        seen = [
            self._patches(part)
            for turn in turns
            for part in turn.parts
            if not isinstance(part, str)
        ]
        grids = [(patches.rows, patches.columns) for patches in seen]
        prompt = messages.prompt(turns, grids, chat, self._tokenizers.mllm_ordinary)
        self._answering.check(len(prompt.ids))  # before minutes are spent on looking
        tokens = []
        for patches in seen:
            tokens.append(self._tokens(patches, timings))
            on_text("")
        conversation = Conversation(
            ids=prompt.ids,
            positions=prompt.positions,
            image_tokens=np.concatenate(tokens) if tokens else None,
            image_places=prompt.image_places,
        )
        engines.begin(
            (text_inputs.NAME,), self._answering.sizes(len(prompt.ids), asked.max_new_tokens)
        )
        run = self._answering.answer(
            conversation,
            asked.sampling,
            max_new_tokens=asked.max_new_tokens,
            stop_ids=chat.stop_ids,
            timings=timings,
            on_piece=lambda: on_text(""),
        )
        text = self._tokenizers.mllm_stream()
        try:
            for token_id in run:
                on_text(text.feed(token_id))
        finally:
            run.close()
        on_text(text.rest())
        engines.check_files()
        assert run.finish_reason is not None
        if (decode := timings.get("decode")) is not None and len(text.token_ids) > 1:
            timings["per_token"] = decode / (len(text.token_ids) - 1)
        timings["total"] = time.perf_counter() - start
        return ChatResult(
            text.text,
            text.token_ids,
            run.finish_reason,
            Usage(
                prompt_tokens=len(prompt.ids),
                image_tokens=len(prompt.image_places),
                cached_tokens=run.cached_tokens,
                completion_tokens=len(text.token_ids),
            ),
            timings,
            asked.seed,
        )

    def _patches(self, image: Image.Image) -> Patches:
        return image_processor.patches(image, vision.facts(self._manifest))

    def _tokens(self, patches: Patches, timings: dict[str, float]) -> NDArray[np.float32]:
        """Return the tokens of an image; of one that comes again, those that were kept."""
        kept = self._engines.prompts
        key = prompt_cache.key(vision.NAME, {"patches": patches.values})
        if (found := kept.get(key)) is not None:
            return found["image_tokens"]
        tokens = vision.encode(self._engines, self._manifest, patches, timings)
        kept.keep(key, {"image_tokens": tokens})
        return tokens
