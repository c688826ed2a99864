"""`bifrost-rt chat`: a conversation in the terminal, with images and drawing."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from bifrost_rt import chat, images, manifest
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.cli.describe import chosen, say
from bifrost_rt.errors import BifrostError, RequestError
from bifrost_rt.generator import Generator, default_set
from bifrost_rt.result import numbered

HELP = """\
/image FILE     show an image with the next message; several may be shown
/draw [PROMPT]  draw the prompt, or the last answer; it is shown with the next message
/new            begin anew
/quit           end; so does Ctrl-D
anything else is said to the model; Ctrl-C ends an answer"""
DRAWN = Path("drawn.png")


def run(options: argparse.Namespace) -> int:
    """Talk until the input ends."""
    asked = chosen(options)
    folder = default_set() if options.engines is None else Path(options.engines)
    chat.facts(manifest.read(folder))
    ChatParameters.fill(asked)
    with Generator(
        folder, backend=options.backend, memory_budget=options.memory_budget
    ) as generator:
        talk = Talk(generator, options.system, asked)
        if sys.stdin.isatty():
            print("/help says what can be typed", file=sys.stderr)
        for line in _lines():
            if line.strip() == "/quit":
                break
            try:
                talk.take(line)
            except KeyboardInterrupt:
                print("\n(ended)", file=sys.stderr)
            except BifrostError as error:  # the conversation goes on
                print(f"error: {error}", file=sys.stderr, flush=True)
    return 0


class Talk:
    """A conversation, and what is shown with its next message."""

    def __init__(self, generator: Generator, system: str | None, asked: Any) -> None:
        self._generator, self._system, self._asked = generator, system, asked
        self._drawn = 0
        self._begin()

    def _begin(self) -> None:
        self._messages: list[dict[str, Any]] = []
        if self._system is not None:
            self._messages.append({"role": "system", "content": self._system})
        self._shown: list[Image.Image] = []

    def take(self, line: str) -> None:
        """Do what a line says.

        Raises:
            BifrostError: it cannot be done; the conversation is as before.
        """
        command, _, rest = line.strip().partition(" ")
        if command == "/image":
            self._shown.append(images.read(Path(_path(rest))))
        elif command == "/draw":
            self._draw(rest.strip())
        elif command == "/new":
            self._begin()
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/") and command[1:].isalpha():
            raise RequestError(f"{command} is unknown", hint="/help lists what there is")
        elif line.strip() or self._shown:
            self._say(line)

    def _say(self, words: str) -> None:
        parts: list[dict[str, Any]] = [{"type": "image", "image": i} for i in self._shown]
        parts.append({"type": "text", "text": words.strip()})
        message = {"role": "user", "content": parts}
        result = self._generator.chat([*self._messages, message], stream=say, **self._asked)
        print(flush=True)
        self._messages += [message, {"role": "assistant", "content": result.text}]
        self._shown = []

    def _draw(self, prompt: str) -> None:
        if not prompt:
            answers = [m["content"] for m in self._messages if m["role"] == "assistant"]
            if not answers:
                raise RequestError("/draw: there is no answer to draw yet", hint="/draw PROMPT")
            prompt = answers[-1]
        result = self._generator.run(prompt)
        path = DRAWN
        while path.exists():
            path, self._drawn = numbered(DRAWN, self._drawn), self._drawn + 1
        for saved in result.save(path):
            print(saved, flush=True)
        self._shown.append(result.image)


def _path(text: str) -> str:
    """Return a path as a shell takes it: in quotes, or with backslashes, or as it is."""
    if not (name := text.strip()):
        raise RequestError("/image needs a file", hint="/image FILE")
    with contextlib.suppress(ValueError):
        if len(parts := shlex.split(name)) == 1 and not Path(name).exists():
            return parts[0]
    return name


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return
