"""The command line: data on stdout, everything else on stderr, one line and a hint per error."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from bifrost_rt import command
from bifrost_rt.errors import RequestError

# Options of `generate` that are arguments of `Generator.run`.
ARGUMENTS = (
    *("seed", "num_images_per_prompt", "num_inference_steps", "decoding_steps"),
    *("guidance_scale", "cfg_weight", "controlnet_conditioning_scale"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run `bifrost-rt`. Returns the exit status: 0, 1 for an error, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    return command.run(lambda: int(options.command(options)), debug=options.debug)


def _generate(options: argparse.Namespace) -> int:
    from bifrost_rt.generator import Generator
    from bifrost_rt.result import picture_path

    picture_path(options.output)  # before minutes are spent on a picture that has no place
    request, image = _request(options)
    with Generator(
        options.engines, backend=options.backend, memory_budget=options.memory_budget
    ) as generator:
        progress = _Progress() if sys.stderr.isatty() else None
        result = generator.run(**request, callback_on_step_end=progress)
    if progress:
        progress.close(result.timings, result.seed)
    if image is not None:
        about = {**result.parameters, "image": image}
        result = dataclasses.replace(result, images=[result.images[image]], parameters=about)
    for path in result.save(options.output):
        print(path)
    return 0


def _request(options: argparse.Namespace) -> tuple[dict[str, Any], int | None]:
    """Arguments for `run`, and which of its images is wanted (None for all)."""
    given = {name: getattr(options, name) for name in ARGUMENTS}
    given = {name: value for name, value in given.items() if value is not None}
    if options.like is None:
        if not options.prompt:
            raise RequestError("no prompt", hint='bifrost-rt generate "a red circle" …')
        return {"prompt": options.prompt, **given}, None
    from bifrost_rt.result import read_parameters

    parameters = read_parameters(options.like)
    if parameters.pop("injected", False):
        raise RequestError(
            f"{options.like}: was made with order, latents or tokens passed in, which a picture "
            "does not hold"
        )
    image = parameters.pop("image")
    if options.prompt:
        parameters["prompt"] = options.prompt
        image = None
    return {**parameters, **given}, image


def _inspect(options: argparse.Namespace) -> int:
    from bifrost_rt import inspect, manifest

    print(inspect.describe(manifest.read(Path(options.engines))))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from bifrost_rt import selftest
    from bifrost_rt.generator import Generator

    with Generator(options.engines, backend=options.backend) as generator:
        files, engines = len(generator.manifest.files), len(generator.manifest.engines)
        difference = selftest.check(generator)
    print(
        f"{options.engines}: {files} files as built, {engines} engines load, "
        f"self-test picture within {difference} of 255"
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from bifrost_rt import doctor

    print(doctor.report())
    return 0


class _Progress:
    """One line on a terminal that counts the steps of both loops."""

    def __call__(
        self, generator: Any, step: int, timestep: float | None, tensors: dict[str, Any]
    ) -> None:
        what = "decoding" if "tokens" in tensors else "denoising"
        print(f"\r{what} step {step + 1} ", end="", file=sys.stderr, flush=True)

    def close(self, timings: dict[str, float], seed: int) -> None:
        """Replace the line by what the run took."""
        parts = ", ".join(f"{name} {s:.2f}" for name, s in timings.items() if name != "total")
        print(f"\r{timings['total']:.2f} s ({parts}), seed {seed}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bifrost-rt", description="Run Bifrost-1 engine sets: prompts to pictures."
    )
    parser.add_argument("--debug", action="store_true", help="show the trace of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw a prompt")
    add = generate.add_argument
    add("prompt", nargs="*", help="one text, or several")
    add("--engines", metavar="DIR", help="the engine set; default: the default model's")
    add("-o", "--output", default="out.png", metavar="FILE", help="picture to write (out.png)")
    add("--like", metavar="PNG", help="make a picture again; other options on top of its own")
    add("--seed", type=int, help="of reveal order and noise; default: random")
    add("-n", "--num-images-per-prompt", type=int, metavar="N", help="pictures (1)")
    add("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    add("--decoding-steps", type=int, metavar="N", help="masked decoding steps")
    add("--guidance-scale", type=float, metavar="X", help="embedded guidance")
    add("--cfg-weight", type=float, metavar="X", help="guidance of the MLLM")
    add("--controlnet-conditioning-scale", type=float, metavar="X", help="weight of the latents")
    add("--backend", metavar="NAME", help="default: the set's own")
    add("--memory-budget", metavar="SIZE", help="for engines, like 8GiB; default: what is free")
    generate.set_defaults(command=_generate)

    inspect = commands.add_parser("inspect", help="say what an engine set holds")
    inspect.add_argument("engines", metavar="DIR", help="the engine set")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="check a set: hashes, engines, a test picture")
    verify.add_argument("engines", metavar="DIR", help="the engine set")
    verify.add_argument("--backend", metavar="NAME", help="default: the set's own")
    verify.set_defaults(command=_verify)

    doctor = commands.add_parser("doctor", help="say what this machine can run, and why not")
    doctor.set_defaults(command=_doctor)
    return parser
