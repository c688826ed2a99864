"""`python -m export.synthesize`: a random checkpoint in the official layout.

Of the true shapes, whole or cut in depth, or of any other (`export.synthetic.shapes.Shapes`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from bifrost_rt import command, serialization
from export import build_lock, extras
from export.build import INTERRUPTED
from export.engine_set import hidden
from export.errors import BuildError, RecipeError
from export.formats import HALF
from export.synthetic.shapes import DTYPES, PRESETS, Shapes


def synthesize(shapes: Shapes, output: Path, seed: int | None = 0) -> dict[str, int]:
    """Write `output/{mllm,bifrost,flux}`. Memory does not grow with the shapes.

    The same shapes and seed give the same bytes; a tensor's values do not depend on the sharding.
    With no seed there are no values: headers and holes, for those that read nothing else.

    Returns:
        Bytes of weights per network.

    Raises:
        BuildError: `output` exists and is not empty, is being written by another process, or the
            disk is full.
        RecipeError: a vocabulary is smaller than its tokenizer.
    """
    _refuse_small_vocabularies(shapes)
    if output.exists() and any(output.iterdir()):
        raise BuildError(f"{output}: exists and is not empty", hint="choose another --output")
    output = Path(os.path.realpath(output))
    aside = hidden(output, "partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with build_lock.alone(output, hidden(output, "lock"), "checkpoint"):
            shutil.rmtree(aside, ignore_errors=True)
            try:
                written = _write(shapes, aside, seed)
                if output.exists():
                    output.rmdir()
                aside.rename(output)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise BuildError(f"{output}: {error.strerror}; nothing was kept") from error
    return written


def _write(shapes: Shapes, folder: Path, seed: int | None) -> dict[str, int]:
    # torch and its company take seconds to import: not before the command line is understood
    from export.synthetic import configs, networks, shards, tokenizers

    layout, written = shapes.layout, {}
    for name, (stem, tensors, config) in networks.NETWORKS.items():
        written[name] = shards.write(
            folder / name, stem, tensors(shapes), layout.dtype, layout.shard_bytes, seed
        )
        _write_json(folder / name / "config.json", config(shapes))
    (folder / "flux/scheduler").mkdir()
    _write_json(folder / "flux/scheduler/scheduler_config.json", configs.scheduler(shapes))
    _write_json(folder / "flux/model_index.json", configs.pipeline())
    tokenizers.write(folder / "mllm", folder / "flux", layout)
    return written


def _refuse_small_vocabularies(shapes: Shapes) -> None:
    from export.synthetic import tokenizers

    for what, vocab, tokenizer in (
        ("decoder.vocab_size", shapes.decoder.vocab_size, tokenizers.qwen()),
        ("clip.vocab", shapes.clip.vocab, tokenizers.clip()),
        ("t5.vocab", shapes.t5.vocab, tokenizers.t5()),
    ):
        if vocab < tokenizer.get_vocab_size():
            raise RecipeError(
                f"{what} is {vocab}, its tokenizer has {tokenizer.get_vocab_size()} tokens"
            )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    options = _parser().parse_args(arguments)

    @extras.needed("export")
    def written() -> int:
        sizes = synthesize(_shapes(options), options.output, options.seed)
        for name, size in sizes.items():
            print(f"{size / 1e9:9.3f} GB  {name}", file=sys.stderr)
        print(options.output)
        return 0

    return command.run(written, debug=options.debug, interrupted=INTERRUPTED)


def _shapes(options: argparse.Namespace) -> Shapes:
    if options.like not in PRESETS:
        raise RecipeError(
            f"--like {options.like!r} is unknown{serialization.nearest(options.like, PRESETS)}",
            hint=f"known: {', '.join(PRESETS)}",
        )
    shapes = PRESETS[options.like]
    changes = {"dtype": options.dtype, "shard_bytes": options.shard_bytes}
    given = {name: value for name, value in changes.items() if value is not None}
    shapes = dataclasses.replace(shapes, layout=dataclasses.replace(shapes.layout, **given))
    return shapes if options.layers is None else shapes.cut(options.layers)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.synthesize",
        description="Write a random checkpoint in the official layout: mllm, bifrost, flux.",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument("--like", default="tiny", metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument(
        "--layers", type=int, metavar="N", help="at most N layers in every network; default: all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--dtype", metavar="NAME", help=f"{', '.join(DTYPES)}; default: {HALF.name}"
    )
    parser.add_argument("--shard-bytes", type=int, metavar="N", help="default: 5 GiB")
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
