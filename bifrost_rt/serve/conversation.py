"""Messages as OpenAI's chat API has them -> turns. What a request cannot have read, such as files
of this machine, never gets beyond here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from bifrost_rt import image_processor, images, messages, vision
from bifrost_rt.errors import RequestError, RequestTypeError
from bifrost_rt.manifest import Manifest, Vision
from bifrost_rt.serialization import nearest

# Of OpenAI's newer models; it means the same.
_ROLES = {"developer": "system"}
_WIRE_ROLES = (*messages.ROLES, *_ROLES)
_FULL = ("auto", "high")  # images are looked at as the model's limits allow

_TEXT = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "additionalProperties": False,
}
_IMAGE = {
    "type": "object",
    "required": ["type", "image_url"],
    "properties": {
        "type": {"const": "image_url"},
        "image_url": {
            "type": "object",
            "required": ["url"],
            "properties": {
                "url": {"type": "string", "description": "a data URI, or https where allowed"},
                "detail": {"enum": list(_FULL)},
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
# What the document of the API says of `messages`; `read` checks it, in words for who wrote it.
SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": list(_WIRE_ROLES)},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _IMAGE]}},
                ]
            },
        },
        "additionalProperties": False,
    },
}


def read(
    given: list[Any], manifest: Manifest, fetch: messages.Fetch, most_images: int
) -> tuple[messages.Turn, ...]:
    """Check messages, and read their images: fetched where they are addresses, and as small as the
    model makes them, so that what waits takes little memory.

    Raises:
        RequestError: naming the message, the part, and what was expected.
    """
    seen = 0

    def part(value: Any, where: str) -> Any:
        nonlocal seen
        if not isinstance(value, Mapping):
            return value  # refused by `messages.read`, or a text
        kind = value.get("type")
        if kind not in ("text", "image_url"):
            raise RequestError(f"{where}: type must be text or image_url")
        checked = _known(value, ("type", kind), where)
        if kind == "text":
            return checked
        seen += 1
        if seen > most_images:
            raise RequestError(f"{where}: a request has at most {most_images} images here")
        image = _image(checked.get("image_url"), where, vision.facts(manifest), fetch)
        return {"type": "image", "image": image}

    turns = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise RequestTypeError(
                f"{where} must be a message with role and content, got {type(message).__name__}"
            )
        checked = _known(message, ("role", "content"), where)
        role, content = checked.get("role"), checked.get("content")
        if isinstance(content, list):
            content = [part(p, f"{where}.content[{k}]") for k, p in enumerate(content)]
        if role not in _WIRE_ROLES:
            raise RequestError(f"{where}: role must be one of {', '.join(_WIRE_ROLES)}")
        turns.append({"role": _ROLES.get(role, role), "content": content})
    return messages.read(turns)


def _known(given: Mapping[str, Any], names: tuple[str, ...], where: str) -> dict[str, Any]:
    """Return what is given without its nulls, which are for what is not."""
    found = {name: value for name, value in given.items() if value is not None}
    for name in found:
        if name not in names:
            shown = name.encode("ascii", "backslashreplace").decode()[:80]
            raise RequestError(f"{where}: unknown field {shown!r}{nearest(shown, names)}")
    return found


def _image(given: Any, where: str, facts: Vision, fetch: messages.Fetch) -> Image.Image:
    if not isinstance(given, Mapping):
        raise RequestTypeError(
            f"{where}: image_url must be an object with a url, got {type(given).__name__}"
        )
    checked = _known(given, ("url", "detail"), f"{where}.image_url")
    url, detail = checked.get("url"), checked.get("detail", _FULL[0])
    if not isinstance(url, str):
        raise RequestTypeError(f"{where}: image_url must hold a url, got {type(url).__name__}")
    if detail not in _FULL:
        raise RequestError(
            f"{where}: detail must be {' or '.join(_FULL)}: images are looked at in full here"
        )
    image = images.read(messages.data(url, where, fetch), where)
    return image_processor.fit(image, facts, where)
