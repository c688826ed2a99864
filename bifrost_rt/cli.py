"""The command line: data on stdout, everything else on stderr, one line and a hint per error."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bifrost_rt.errors import BifrostError


def main(arguments: list[str] | None = None) -> int:
    """Run `bifrost-rt`. Returns the exit status: 0, 1 for an error, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except BifrostError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _generate(options: argparse.Namespace) -> int:
    from bifrost_rt.generator import Generator

    with Generator(options.engines, backend=options.backend) as generator:
        progress = _Progress() if sys.stderr.isatty() else None
        result = generator.run(
            options.prompt,
            seed=options.seed,
            num_images_per_prompt=options.num_images_per_prompt,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            controlnet_conditioning_scale=options.controlnet_conditioning_scale,
            decoding_steps=options.decoding_steps,
            cfg_weight=options.cfg_weight,
            callback_on_step_end=progress,
        )
    if progress:
        progress.close(result.timings, result.seed)
    for path in result.save(options.output):
        print(path)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from bifrost_rt import inspect, manifest

    folder = Path(options.engines)
    print(inspect.describe(manifest.read(folder)))
    return 0


class _Progress:
    """One line on a terminal that counts the steps of both loops."""

    def __call__(
        self, generator: Any, step: int, timestep: float | None, tensors: dict[str, Any]
    ) -> None:
        what = "decoding" if "tokens" in tensors else "denoising"
        print(f"\r{what} step {step + 1} ", end="", file=sys.stderr, flush=True)

    def close(self, timings: dict[str, float], seed: int) -> None:
        parts = ", ".join(f"{name} {s:.2f}" for name, s in timings.items() if name != "total")
        print(f"\r{timings['total']:.2f} s ({parts}), seed {seed}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bifrost-rt", description="Run Bifrost-1 engine sets: prompts to pictures."
    )
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw a prompt")
    generate.add_argument("prompt", nargs="+", help="one text, or several")
    generate.add_argument("--engines", required=True, metavar="DIR", help="the engine set")
    generate.add_argument(
        "-o", "--output", default="out.png", metavar="FILE", help="picture to write (out.png)"
    )
    generate.add_argument("--seed", type=int, help="of reveal order and noise; default: random")
    generate.add_argument(
        "-n", "--num-images-per-prompt", type=int, default=1, metavar="N", help="pictures (1)"
    )
    generate.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    generate.add_argument("--decoding-steps", type=int, metavar="N", help="masked decoding steps")
    generate.add_argument("--guidance-scale", type=float, metavar="X", help="embedded guidance")
    generate.add_argument("--cfg-weight", type=float, metavar="X", help="guidance of the MLLM")
    generate.add_argument(
        "--controlnet-conditioning-scale", type=float, metavar="X", help="weight of the latents"
    )
    generate.add_argument("--backend", metavar="NAME", help="default: the set's own")
    generate.set_defaults(command=_generate)

    inspect = commands.add_parser("inspect", help="say what an engine set holds")
    inspect.add_argument("engines", metavar="DIR", help="the engine set")
    inspect.set_defaults(command=_inspect)
    return parser
