"""The command line: data on stdout, everything else on stderr, one line and a hint per error."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from bifrost_rt import cache, command
from bifrost_rt.cli.options import MODULES, parser
from bifrost_rt.errors import BifrostError


def main(arguments: list[str] | None = None) -> int:
    """Run `bifrost-rt`. Returns the exit status: 0, 1 for an error, 130 when interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in MODULES:  # with options of their own, --help among them
        return command.run(lambda: _module(given[0], given[1:]), debug=False)
    options = parser().parse_args(given)
    with contextlib.ExitStack() as held:
        if options.command != "serve":
            held.enter_context(_warnings_on_stderr())
        if getattr(options, "no_cache", False):
            held.enter_context(cache.switched_off())
        return command.run(lambda: _COMMANDS[options.command](options), debug=options.debug)


@contextlib.contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Write what the package logs as a warning to stderr, as one line. `serve` has a log of its
    own."""
    handler = _Stderr(logging.WARNING)
    logger = logging.getLogger("bifrost_rt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        text = " ".join(record.getMessage().split())
        print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)


def _generate(options: argparse.Namespace) -> int:
    from bifrost_rt.cli import generate

    return generate.run(options)


def _encode(options: argparse.Namespace) -> int:
    from bifrost_rt.cli import encode

    return encode.run(options)


def _inspect(options: argparse.Namespace) -> int:
    from bifrost_rt import inspect, manifest

    folder = Path(options.engines)
    found = manifest.read(folder)
    if options.plan:
        print(inspect.plan(folder, found))
    else:
        print(inspect.precision(folder, found) if options.precision else inspect.describe(found))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from bifrost_rt import selftest
    from bifrost_rt.generator import Generator

    with Generator(options.engines, backend=options.backend) as generator:
        files, engines = len(generator.manifest.files), len(generator.manifest.engines)
        outcome = selftest.check(generator)
    print(
        f"{options.engines}: {files} files as built, {engines} engines load, "
        f"self-test image within {outcome}"
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from bifrost_rt import doctor

    print(doctor.report())
    return 0


def _tune(options: argparse.Namespace) -> int:
    from bifrost_rt.cli import tune

    return tune.run(options)


def _describe(options: argparse.Namespace) -> int:
    from bifrost_rt.cli import describe

    return describe.run(options)


def _chat(options: argparse.Namespace) -> int:
    from bifrost_rt.cli import chat

    return chat.run(options)


def _serve(options: argparse.Namespace) -> int:
    from bifrost_rt import serve

    return serve.run(options)


_COMMANDS = {
    "generate": _generate,
    "encode": _encode,
    "inspect": _inspect,
    "verify": _verify,
    "describe": _describe,
    "chat": _chat,
    "doctor": _doctor,
    "tune": _tune,
    "serve": _serve,
}


def _module(name: str, arguments: list[str]) -> int:
    """`plan` is in the wheel, `bench` in a checkout that is installed (pip install -e)."""
    module = MODULES[name].module
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise BifrostError(
                f"`bifrost-rt {name}` is `python -m {module}`, which the wheel does not carry",
                hint="run it from a checkout of the source: pip install -e '.[export,benchmarks]'",
            ) from error
        raise BifrostError(
            f"`bifrost-rt {name}` needs the Python package `{error.name}`, which is not installed",
            hint="in the checkout: pip install -e '.[export,benchmarks]'",
        ) from error
    return int(found.main(arguments))
