"""Messages as transformers and OpenAI write them -> what the MLLM reads.

    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": [{"type": "image", "image": "cat.png"},
                                  {"type": "text", "text": "What is this?"}]},
     {"role": "assistant", "content": "A cat."},
     {"role": "user", "content": "Which colour has it?"}]

An image is a path, the bytes of a file, a `PIL.Image` or an array; or `image_url`, a data URI. The
words are ordinary text: `<|im_end|>` and its like become characters, never special tokens.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import images, unicode
from bifrost_rt.errors import RequestError, RequestTypeError
from bifrost_rt.manifest import Chat

ROLES = ("system", "user", "assistant")
_DATA_URI = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,", re.ASCII)

Part: TypeAlias = str | Image.Image
# Gives the bytes behind an address that is no data URI, or raises a RequestError.
Fetch: TypeAlias = Callable[[str, str], bytes]


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, and words and images in their order."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Prompt:
    """Turns as the MLLM reads them: S tokens, I of them an image's.

    Attributes:
        ids: int64 [S], with one placeholder for every image token.
        positions: int64 [3, S], of M-RoPE: time, height, width.
        image_places: int64 [I], the rows of the placeholders, rising.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    image_places: NDArray[np.int64]


def _no_fetch(url: str, where: str) -> bytes:
    raise RequestError(
        f"{where}: images are not fetched from addresses",
        hint="send the image itself, as data:image/png;base64,…",
    )


def read(messages: Any, fetch: Fetch = _no_fetch) -> tuple[Turn, ...]:
    """Check messages, and read their images.

    Args:
        fetch: for addresses that are no data URI; by default they are refused.

    Raises:
        RequestError, RequestTypeError: naming the message, the part, and what was expected.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestTypeError(
            f"messages must be a list of messages, got {type(messages).__name__}"
        )
    if not messages:
        raise RequestError("messages is an empty list", hint="pass at least one message")
    turns = tuple(_turn(message, f"messages[{i}]", fetch) for i, message in enumerate(messages))
    for i, turn in enumerate(turns[1:], 1):
        if turn.role == "system":
            raise RequestError(f"messages[{i}]: a system message comes first, or not at all")
    return turns


def _turn(message: Any, where: str, fetch: Fetch) -> Turn:
    if not isinstance(message, Mapping):
        raise RequestTypeError(
            f"{where} must be a message with role and content, got {type(message).__name__}"
        )
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}: role must be {', '.join(ROLES)}, got {role!r}")
    content = message.get("content")
    if isinstance(content, str):
        return Turn(role, (_words(content, where),))
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise RequestTypeError(
            f"{where}: content must be a text or a list of parts, got {type(content).__name__}"
        )
    if not content:
        raise RequestError(f"{where}: content is an empty list", hint="write a text or a part")
    parts = tuple(_part(p, f"{where}.content[{i}]", fetch) for i, p in enumerate(content))
    if role != "user" and any(isinstance(part, Image.Image) for part in parts):
        raise RequestError(f"{where}: only a user's message holds images, this is {role!r}")
    return Turn(role, parts)


def _part(part: Any, where: str, fetch: Fetch) -> Part:
    if isinstance(part, str):
        return _words(part, where)
    if not isinstance(part, Mapping):
        raise RequestTypeError(f"{where} must be a part with a type, got {type(part).__name__}")
    kind = part.get("type") or next((k for k in ("text", "image", "image_url") if k in part), None)
    if kind == "text":
        return _words(part.get("text"), where)
    if kind == "image":
        return images.read(part.get("image"), where)
    if kind == "image_url":
        given = part.get("image_url")
        url = given.get("url") if isinstance(given, Mapping) else given
        if not isinstance(url, str):
            raise RequestTypeError(f"{where}: image_url must hold a url, got {type(url).__name__}")
        return images.read(data(url, where, fetch), where)
    raise RequestError(f"{where}: type must be text, image or image_url, got {kind!r}")


def data(url: str, where: str, fetch: Fetch) -> bytes:
    """Return the bytes of a data URI, or of what `fetch` finds at another address.

    Raises:
        RequestError: it is no data URI in base64, or `fetch` refuses it.
    """
    if not url.startswith("data:"):
        return fetch(url, where)
    head = _DATA_URI.match(url)
    if head is None:
        raise RequestError(f"{where}: the data URI is not data:image/…;base64,…")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: the data URI is not base64: {error}") from None


def _words(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise RequestTypeError(f"{where}: text must be a string, got {type(text).__name__}")
    unicode.check(where, text)
    return text


def prompt(
    turns: Sequence[Turn],
    grids: Sequence[tuple[int, int]],
    chat: Chat,
    encode: Callable[[str], list[int]],
) -> Prompt:
    """Return turns in the chat template, up to where the assistant answers.

    Args:
        grids: rows and columns of tokens of every image, in the turns' order.
        encode: ordinary text -> ids.
    """
    ids: list[int] = []
    columns: list[NDArray[np.int64]] = []
    places: list[NDArray[np.int64]] = []
    waiting = iter(grids)
    at = 0  # the next position

    def say(found: Sequence[int]) -> None:
        nonlocal at
        ids.extend(found)
        columns.append(np.tile(np.arange(at, at + len(found)), (3, 1)))
        at += len(found)

    def show(rows: int, across: int) -> None:
        nonlocal at
        places.append(np.arange(len(ids), len(ids) + rows * across))
        ids.extend([chat.image_pad] * (rows * across))
        row, column = np.divmod(np.arange(rows * across), across)
        columns.append(at + np.stack([np.zeros_like(row), row, column]))
        at += max(rows, across)

    if chat.default_system is not None and turns[0].role != "system":
        turns = [Turn("system", (chat.default_system,)), *turns]
    for turn in turns:
        say([chat.turn_start])
        words = f"{turn.role}\n"
        for part in turn.parts:
            if isinstance(part, str):
                words += part
                continue
            say([*encode(words), chat.vision_start])
            show(*next(waiting))
            say([chat.vision_end])
            words = ""
        say([*encode(words), chat.turn_end, *encode("\n")])
    say([chat.turn_start, *encode("assistant\n")])
    return Prompt(
        ids=np.array(ids, np.int64),
        positions=np.concatenate(columns, axis=1).astype(np.int64),
        image_places=np.concatenate([np.zeros(0, np.int64), *places]),
    )
