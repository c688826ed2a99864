"""Messages in every form that users write, and one clear error for every other."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import RequestError, RequestTypeError, messages
from bifrost_rt.manifest import Chat
from bifrost_rt.messages import Turn

RED = Image.new("RGB", (2, 3), (255, 0, 0))
CHAT = Chat(1, 2, 3, 4, 5, (2,), "Help.")


def png() -> bytes:
    file = io.BytesIO()
    RED.save(file, "PNG")
    return file.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": RED},
        {"type": "image", "image": png()},
        {"image": np.asarray(RED)},
        {"type": "image_url", "image_url": {"url": uri(png()), "detail": "low"}},
        {"type": "image_url", "image_url": uri(png(), "image/png;name=a.png")},
        {"image_url": {"url": uri(png(), "")}},
    ],
)
def test_images_are_read_in_every_form(part: Any) -> None:
    ((image,),) = [turn.parts for turn in messages.read(user(part))]
    assert isinstance(image, Image.Image)
    assert image.tobytes() == RED.tobytes()


def test_texts_and_turns_keep_their_order() -> None:
    found = messages.read(
        [
            {"role": "system", "content": "Be brief."},
            *user("a", {"type": "text", "text": "b"}, {"type": "image", "image": RED}, "c"),
            {"role": "assistant", "content": [{"type": "text", "text": "d"}]},
            {"role": "user", "content": ""},
        ]
    )
    assert [turn.role for turn in found] == ["system", "user", "assistant", "user"]
    assert found[0].parts == ("Be brief.",)
    assert [p if isinstance(p, str) else p.size for p in found[1].parts] == ["a", "b", (2, 3), "c"]
    assert found[2].parts == ("d",)
    assert found[3].parts == ("",)


BAD: list[tuple[Any, type[Exception], str]] = [
    ([], RequestError, "messages is an empty list"),
    ("hello", RequestTypeError, "messages must be a list of messages, got str"),
    ({"role": "user"}, RequestTypeError, "messages must be a list of messages, got dict"),
    (None, RequestTypeError, "messages must be a list of messages, got NoneType"),
    (["hello"], RequestTypeError, r"messages\[0\] must be a message with role and content"),
    ([{"content": "a"}], RequestError, r"messages\[0\]: role must be system, user, assistant, got"),
    ([{"role": "tool", "content": "a"}], RequestError, "got 'tool'"),
    ([{"role": ["user"], "content": "a"}], RequestError, r"got \['user'\]"),
    ([{"role": "user"}], RequestTypeError, "content must be a text or a list of parts, got NoneT"),
    (user(), RequestError, "content is an empty list"),
    (user(5), RequestTypeError, r"messages\[0\].content\[0\] must be a part with a type, got int"),
    (user({"type": "video"}), RequestError, "type must be text, image or image_url, got 'video'"),
    (user({}), RequestError, "got None"),
    (user({"type": "text"}), RequestTypeError, "text must be a string, got NoneType"),
    (user({"type": "text", "text": "\ud800"}), RequestError, "is not valid Unicode"),
    (user({"type": "image", "image": b"x"}), RequestError, r"content\[0\] is no image that Pillow"),
    (user({"type": "image"}), RequestTypeError, "must be a path, the bytes of a file"),
    (user({"image_url": 5}), RequestTypeError, "image_url must hold a url, got int"),
    (user({"image_url": "http://a/b.png"}), RequestError, "images are not fetched from addresses"),
    (user({"image_url": "file:///etc/passwd"}), RequestError, "images are not fetched from addre"),
    (user({"image_url": "data:image/png,abc"}), RequestError, "the data URI is not data:image/"),
    (user({"image_url": "data:image/png;base64,?"}), RequestError, "the data URI is not base64"),
    (
        [*user("a"), {"role": "system", "content": "b"}],
        RequestError,
        "a system message comes first",
    ),
    (
        [{"role": "system", "content": [{"image": RED}]}, *user("a")],
        RequestError,
        "only a user's message holds images, this is 'system'",
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD, ids=range(len(BAD)))
def test_what_is_no_message_is_refused(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        messages.read(given)


def test_addresses_are_fetched_by_who_may() -> None:
    asked: list[str] = []

    def fetch(url: str, where: str) -> bytes:
        asked.append(url)
        return png()

    ((image,),) = [t.parts for t in messages.read(user({"image_url": "https://a/b"}), fetch)]
    assert isinstance(image, Image.Image)
    assert asked == ["https://a/b"]


def test_positions_grow_by_an_images_longer_side() -> None:
    turns = [Turn("user", ("ab", RED, "c"))]
    found = messages.prompt(turns, [(2, 3)], CHAT, lambda text: [100] * len(text))
    system = 1 + len("system\nHelp.") + 1 + 1
    first = system + 1 + len("user\nab") + 1
    assert found.image_places.tolist() == list(range(first, first + 6))
    assert (found.ids[found.image_places] == CHAT.image_pad).all()
    rows, columns = np.divmod(np.arange(6), 3)
    assert found.positions[:, found.image_places].tolist() == [
        [first] * 6,
        (first + rows).tolist(),
        (first + columns).tolist(),
    ]
    after = found.positions[:, first + 6 :]
    assert after.tolist() == [list(range(first + 3, first + 3 + after.shape[1]))] * 3
    assert found.positions[:, :first].tolist() == [list(range(first))] * 3


def test_a_default_system_stands_where_none_speaks() -> None:
    def written(*turns: Turn, chat: Chat = CHAT) -> str:
        found = messages.prompt(turns, [], chat, lambda text: [ord(c) + 100 for c in text])
        return "".join(chr(i - 100) if i > 100 else f"<{i}>" for i in found.ids)

    assert written(Turn("user", ("a",))) == "<1>system\nHelp.<2>\n<1>user\na<2>\n<1>assistant\n"
    own = written(Turn("system", ("b",)), Turn("user", ("a",)))
    assert own == "<1>system\nb<2>\n<1>user\na<2>\n<1>assistant\n"
    silent = Chat(1, 2, 3, 4, 5, (2,))
    assert written(Turn("user", ("a",)), chat=silent) == "<1>user\na<2>\n<1>assistant\n"
