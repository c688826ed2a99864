"""`bifrost-rt encode`: an image's CLIP latents in a file, which `generate --tokens` draws."""

from __future__ import annotations

import argparse
from pathlib import Path

from bifrost_rt import chat, images, latents_file, manifest, request, vision
from bifrost_rt.files import check_writable
from bifrost_rt.generator import Generator, default_set


def run(options: argparse.Namespace) -> int:
    """Write the latents, and print where they are."""
    image, output = images.read(Path(options.image)), Path(options.output)
    folder = default_set() if options.engines is None else Path(options.engines)
    found = manifest.read(folder)  # what cannot be done is said before engines are opened
    vision.facts(found)
    if options.prompt is None:
        chat.facts(found)
    check_writable(output)
    with Generator(
        folder, backend=options.backend, memory_budget=options.memory_budget
    ) as generator:
        tokens = generator.encode(image)
        caption = options.prompt
        if caption is None:
            caption = generator.describe(image).text
    about = request.check(found, prompt=caption, tokens=tokens).parameters.as_dict()
    print(latents_file.save(output, tokens, about))
    return 0
