"""`bifrost-rt describe`: words about an image, on stdout as they come."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from bifrost_rt import chat, images, manifest, vision
from bifrost_rt.chat_params import OPTIONS, ChatOptions, ChatParameters
from bifrost_rt.generator import QUESTION, Generator, default_set


def run(options: argparse.Namespace) -> int:
    """Answer the question about the image."""
    asked = chosen(options)
    image = images.read(Path(options.image))
    folder = default_set() if options.engines is None else Path(options.engines)
    found = manifest.read(folder)  # what cannot be done is said before engines are opened
    chat.facts(found)
    vision.facts(found)
    ChatParameters.fill(asked)
    with Generator(
        folder, backend=options.backend, memory_budget=options.memory_budget
    ) as generator:
        result = generator.describe(
            image,
            QUESTION if options.question is None else options.question,
            stream=None if options.json else say,
            **asked,
        )
    if options.json:
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
    else:
        print()
    return 0


def chosen(options: argparse.Namespace) -> ChatOptions:
    """Take the options of an answer from a command line."""
    given: Any = {n: v for n in OPTIONS if (v := getattr(options, n)) is not None}
    found: ChatOptions = given
    return found


def say(piece: str) -> None:
    """Print a piece of an answer at once."""
    print(piece, end="", flush=True)
