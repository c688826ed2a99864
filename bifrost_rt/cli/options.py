"""What the command line understands. `docs/commands.md` is made from this."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import bifrost_rt
from bifrost_rt.chat_params import OPTIONS as CHAT_OPTIONS
from bifrost_rt.params import OPTIONS, Boolean, Default, Option


@dataclass(frozen=True)
class Module:
    """A command that is a module outside of this package, with a parser of its own."""

    module: str
    help: str


MODULES = {
    "plan": Module("export.plan", "say what a device will do, before anything is built"),
    "bench": Module("benchmarks.latency", "time sets, backends and the official loop"),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser; every command sets `command` to its name."""
    root = argparse.ArgumentParser(
        prog="bifrost-rt", description="Run Bifrost-1 engine sets: prompts to images."
    )
    root.add_argument("--debug", action="store_true", help="show the trace of an error")
    root.add_argument("--version", action="version", version=bifrost_rt.__version__)
    commands = root.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _generate(commands.add_parser("generate", help="draw prompts"))

    encode = commands.add_parser("encode", help="read an image into CLIP latents, to draw them")
    encode.add_argument("image", metavar="IMAGE", help="the image's file")
    encode.add_argument(
        "-o",
        "--output",
        default="tokens.safetensors",
        metavar="FILE",
        help="for `generate --tokens` (tokens.safetensors)",
    )
    encode.add_argument(
        "--prompt", metavar="TEXT", help="its caption; default: what the MLLM says of the image"
    )
    encode.add_argument(
        "--engines", metavar="DIR", help="the engine set; default: the default model's"
    )
    _runs_a_set(encode)

    inspect = commands.add_parser("inspect", help="say what an engine set holds")
    inspect.add_argument("engines", metavar="DIR", help="the engine set")
    shown = inspect.add_mutually_exclusive_group()
    shown.add_argument(
        "--precision", action="store_true", help="what every layer is, read back from the files"
    )
    shown.add_argument(
        "--plan", action="store_true", help="what a call of every compiled engine does"
    )

    verify = commands.add_parser("verify", help="check a set: hashes, engines, a test image")
    verify.add_argument("engines", metavar="DIR", help="the engine set")
    verify.add_argument("--backend", metavar="NAME", help="default: the fastest that is installed")
    _no_cache(verify)

    tune = commands.add_parser("tune", help="measure which backend draws a set fastest here")
    tune.add_argument(
        "engines", metavar="DIR", nargs="?", help="the engine set; default: the default model's"
    )
    tune.add_argument(
        "--rounds", type=whole, default=3, metavar="N", help="images of each, twice (3)"
    )
    tune.add_argument(
        "--steps", type=whole, metavar="N", help="denoising steps; default: the set's"
    )

    describe = commands.add_parser("describe", help="answer a question about an image")
    describe.add_argument("image", metavar="IMAGE", help="the image's file")
    describe.add_argument("question", nargs="?", help="default: to describe it")
    _answers(describe)
    describe.add_argument("--json", action="store_true", help="one line of JSON at the end")

    chat = commands.add_parser("chat", help="hold a conversation, with images and drawing")
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before all else")
    _answers(chat)

    commands.add_parser("doctor", help="say what this machine can run, and why not the rest")
    _serve(commands.add_parser("serve", help="serve images over HTTP, with a page"))
    for name, command in MODULES.items():
        text = f"{command.help} (python -m {command.module})"
        commands.add_parser(name, help=text, add_help=False)
    return root


def _generate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("prompt", nargs="*", help="one text, or several that are drawn together")
    add("--prompts", metavar="FILE", help="a prompt per line, drawn one after another; - is stdin")
    add("--engines", metavar="DIR", help="the engine set; default: the default model's")
    add(
        "-o",
        "--output",
        default="out.png",
        metavar="FILE",
        help="image to write, or a folder for it (out.png)",
    )
    add("--like", metavar="PNG", help="make an image again; other options on top of its own")
    add("--image", metavar="FILE", help="draw this image again; a prompt, if any, varies it")
    add("--mask", metavar="FILE", help="what of it is drawn anew: white, or transparent")
    add(
        "--tokens",
        metavar="FILE",
        help="draw the CLIP latents of --save-tokens or `encode`, without the MLLM",
    )
    add(
        "--think",
        nargs="?",
        const=True,
        metavar="INSTRUCTION",
        help="have the MLLM answer the prompt first, and draw its answer; default: what the set "
        "asks; {prompt} stands for the prompt, which comes before this option",
    )
    add("--save-tokens", metavar="FILE", help="write the CLIP latents (safetensors)")
    for option in OPTIONS.values():
        add_option(command, option)
    add("--size", type=size, metavar="WxH", help="refused where it is not the set's own")
    add("--json", action="store_true", help="one line of JSON per image, instead of its path")
    _runs_a_set(command)


def add_option(command: argparse.ArgumentParser, option: Option) -> None:
    """Add an option of `Generator.run`, which the parser leaves at None where it is not given."""
    names = sorted((long_flag(option.name), *option.flags), key=lambda flag: flag.startswith("--"))
    values, text = option.values, option.help
    if option.default is Default.RANDOM:
        text += "; default: random"
    elif not isinstance(option.default, Default):
        text += f" ({option.default})"
    if isinstance(values, Boolean):
        yes_or_no = argparse.BooleanOptionalAction
        command.add_argument(*names, dest=option.name, action=yes_or_no, default=None, help=text)
        return
    command.add_argument(
        *names, dest=option.name, type=values.python_type, metavar=values.metavar, help=text
    )


def _answers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--engines", metavar="DIR", help="the engine set; default: the default model's"
    )
    for name, option in CHAT_OPTIONS.items():
        text = option.help
        text += "; default: random" if option.default is None else f" ({option.default})"
        values = option.values
        command.add_argument(
            long_flag(name), type=values.python_type, metavar=values.metavar, help=text
        )
    _runs_a_set(command)


def long_flag(name: str) -> str:
    """Return the flag of an option of `Generator.run`."""
    return f"--{name.replace('_', '-')}"


def _serve(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--engines", metavar="DIR", help="the engine set; default: the default model's")
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1)")
    add(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="to listen on (8000); 0 takes a free one",
    )
    add("--token-file", metavar="FILE", help="requests must carry this bearer token")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that requests may give in Host, as a proxy passes it on; may be repeated "
        "(this machine's own names)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may use the server from a browser, like "
        "https://app.example; may be repeated (none)",
    )
    add("--max-batch", type=int, default=4, metavar="N", help="images drawn together (4)")
    add(
        "--max-waiting",
        type=int,
        default=64,
        metavar="N",
        help="images and answers in the queue (64)",
    )
    add(
        "--max-images",
        type=int,
        default=8,
        metavar="N",
        help="images of one request, drawn or looked at (8)",
    )
    add("--max-prompt", type=int, default=4000, metavar="N", help="characters of a prompt (4000)")
    add("--max-steps", type=int, default=200, metavar="N", help="denoising steps (200)")
    add("--max-body", type=int, default=65536, metavar="N", help="bytes of a request (65536)")
    add(
        "--max-image-body",
        type=int,
        default=16 << 20,
        metavar="N",
        help="bytes of a request with images (16777216)",
    )
    add(
        "--fetch-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host from which images of a conversation are fetched, by https; may be repeated, "
        "and may name a port (none)",
    )
    add("--keep", type=int, default=64, metavar="N", help="finished jobs to remember (64)")
    add("--preview-every", type=int, default=4, metavar="N", help="previews of jobs; 0: none (4)")
    add("--grace", type=int, default=300, metavar="S", help="to finish what runs, on SIGTERM (300)")
    _runs_a_set(command)


def _runs_a_set(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--backend", metavar="NAME", help="default: the fastest that is installed")
    add("--memory-budget", metavar="SIZE", help="for engines, like 8GiB; default: what is free")
    _no_cache(command)


def _no_cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-cache",
        action="store_true",
        help="neither use nor keep kernels that TensorRT-RTX compiled on this machine",
    )


def whole(text: str) -> int:
    """Read a whole number of at least 1."""
    if not (text.isdecimal() and text.isascii()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """`512x512` as (width, height)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, like 512x512, got {text!r}")
    return int(width), int(height)
