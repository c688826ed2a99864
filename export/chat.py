"""The chat template of a checkpoint -> ids and facts, so that the runtime renders it without
jinja."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bifrost_rt import messages
from bifrost_rt.manifest import Chat
from export.configs import Config, Many, Whole
from export.errors import CheckpointError
from export.tokenizer_files import chat_template

TOKENS = {
    "turn_start": "<|im_start|>",
    "turn_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
}
IMAGE = {"type": "image", "image": "here"}
_WORD = "\ue000"  # private use: no template has it
# Rendered by the template and by the runtime: who speaks first, several of each, line breaks at the
# seams.
PROBES: tuple[Sequence[dict[str, Any]], ...] = (
    [{"role": "user", "content": "a question"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "\n\nhow?"}],
    [{"role": "user", "content": [IMAGE, {"type": "text", "text": "what is it?"}]}],
    [
        {"role": "user", "content": [{"type": "text", "text": "a\n"}, IMAGE, IMAGE]},
        {"role": "assistant", "content": "two of them"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, IMAGE]},
    ],
)
IDS = Whole(0, 1 << 24)


def read(mllm: Path, tokenizer: Tokenizer, think: str) -> Chat | None:
    """Find how conversations are written; None where the runtime does not render this template.

    Args:
        mllm: the MLLM's folder.
        tokenizer: as the set has it.
        think: what the MLLM is asked where it thinks before it draws.

    Raises:
        CheckpointError: the template cannot be read, or the ids of stop tokens are none.
    """
    known = {name: tokenizer.token_to_id(token) for name, token in TOKENS.items()}
    ids = {name: found for name, found in known.items() if found is not None}
    if ids.keys() != TOKENS.keys():
        return None
    shell = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    _, template = chat_template(mllm)

    def render(probe: Sequence[dict[str, Any]]) -> str:
        text: str = shell.apply_chat_template(
            list(probe), chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text

    try:
        head, _, _ = render([{"role": "user", "content": _WORD}]).partition(_WORD)
        start, end = f"{TOKENS['turn_start']}system\n", f"{TOKENS['turn_end']}\n"
        default = head[len(start) :].partition(end)[0] if head.startswith(start) else None
        stop_ids = _stop_ids(mllm, ids["turn_end"])
        chat = Chat(**ids, stop_ids=stop_ids, default_system=default, think=think)
        same = all(_rendered(probe, chat, tokenizer) == render(probe) for probe in PROBES)
    except CheckpointError:
        raise
    except Exception:  # a template is a program, and raises what it runs into
        return None
    return chat if same else None


def _rendered(probe: Sequence[dict[str, Any]], chat: Chat, tokenizer: Tokenizer) -> str:
    """Return what the runtime writes, in characters."""
    image = Image.new("RGB", (1, 1))
    turns = [
        messages.Turn(
            message["role"],
            (message["content"],)
            if isinstance(message["content"], str)
            else tuple(part.get("text", image) for part in message["content"]),
        )
        for message in probe
    ]
    count = sum(not isinstance(part, str) for turn in turns for part in turn.parts)
    # one id for every character, beyond those of the vocabulary
    beyond = 1 << 24
    found = messages.prompt(
        turns, [(1, 1)] * count, chat, lambda text: [beyond + ord(c) for c in text]
    )
    return "".join(
        chr(i - beyond) if i >= beyond else str(tokenizer.id_to_token(i))
        for i in found.ids.tolist()
    )


def _stop_ids(mllm: Path, turn_end: int) -> tuple[int, ...]:
    """Return the tokens that end an answer: those of the generation config, and the end of a
    turn."""
    found = {turn_end}
    for name in ("generation_config.json", "config.json"):
        if os.path.lexists(mllm / name):
            config = Config.read(mllm / name)
            value = config.values.get("eos_token_id")
            if isinstance(value, list):
                found |= set(config.get("eos_token_id", Many(IDS)))
            elif value is not None:
                found.add(config.get("eos_token_id", IDS))
    return tuple(sorted(found))
