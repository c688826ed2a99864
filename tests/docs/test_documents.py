"""What the documents say is what the code does: commands in the guides and the Python of the README
are run, other commands are parsed, and the list of commands is the parser's.

A fenced block's first word is its language, the second how it is checked:

    sh               run here, in a folder with `engines/`
    sh checkout      run in the checkout
    sh tests         a part of this suite: only which tests it means
    sh server        started; the blocks after it talk to it
    sh tensorrt-rtx  run where that package is, else parsed
    sh ray, slow, rtx, jetson, parsed
                     parsed: what it needs is not here, or is tested elsewhere
    python           run, like sh
    python toy       followed by tests/export/test_add_an_engine.py
    yaml, toml       read as what they are
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import bifrost_rt
from bifrost_rt import serialization
from bifrost_rt.cli import reference
from bifrost_rt.cli.options import MODULES, parser
from export.recipe import Recipe
from tests.patience import PATIENCE, until
from tools import api_reference

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "docs" / "benchmarks.md", *GUIDES]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PARSED = {"ray", "slow", "rtx", "jetson", "parsed"}


@dataclass(frozen=True)
class Block:
    kind: str
    text: str


def blocks(path: Path) -> Iterator[Block]:
    for kind, text in re.findall(r"^```([^\n]*)\n(.*?)^```$", path.read_text(), re.M | re.S):
        yield Block(kind, text)


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield shlex.split(line, comments=True)


@pytest.fixture
def buffer_pool(alpha_set: Path, tmp_path: Path) -> Path:
    """A folder as a reader has it: `engines/` with the default model's set."""
    (tmp_path / "engines" / "sets").mkdir(parents=True)
    (tmp_path / "engines" / "sets" / "default").symlink_to(alpha_set)
    return tmp_path


@pytest.mark.parametrize("path", [README, *GUIDES], ids=lambda path: path.stem)
def test_every_command_of_a_guide(path: Path, buffer_pool: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    with contextlib.ExitStack() as servers:
        for block in blocks(path):
            text = block.text.replace("8000", port)
            language, _, how = block.kind.partition(" ")
            if language == "yaml":
                assert yaml.safe_load(block.text)["applications"]
                continue
            if language == "toml":
                serialization.load(Recipe, tomllib.loads(block.text))
                continue
            if how == "toy":
                assert path.name == "add-an-engine.md"  # the one guide that such a test follows
                continue
            assert language in ("sh", "python"), f"{path.name}: unknown block {block.kind!r}"
            if how in PARSED or (how == "tensorrt-rtx" and not found("tensorrt_rtx")):
                for command in commands(block.text):
                    understood(command)
            elif how == "server":
                servers.enter_context(serving(text, port, buffer_pool, environment))
            else:
                assert how in ("", "checkout", "tests", "tensorrt-rtx"), block.kind
                if how == "tests":
                    text = text.rstrip() + " --collect-only"
                run = ["bash", "-euc", text] if language == "sh" else [sys.executable, "-c", text]
                done = subprocess.run(
                    run,
                    cwd=ROOT if how in ("checkout", "tests") else buffer_pool,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=PATIENCE,
                )
                assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example(path: Path, buffer_pool: Path) -> None:
    done = subprocess.run(
        [sys.executable, path], cwd=buffer_pool, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("equal"):
            assert line.endswith("True")
        for word in line.split():
            assert not word.startswith("out/") or (buffer_pool / word).stat().st_size > 0
    assert done.stdout


def found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def serving(text: str, port: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    (command,) = commands(text)
    server = subprocess.Popen(
        [*command, "--port", port], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    )
    try:

        def answers() -> bool:
            assert server.poll() is None
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
                return True
            return False

        until(answers)
        yield
    finally:
        server.terminate()
        assert server.wait(timeout=PATIENCE) == 0


class UnderstoodError(BaseException):
    """Options were parsed, and nothing shall be done."""


def only_parse(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
    left = parser.parse_known_args(arguments)[1]
    assert not left
    raise UnderstoodError


def understood(command: list[str]) -> None:
    """The options of a command that cannot be run here are at least those that it has."""
    if command[0] == "bifrost-rt" and command[1] in MODULES:
        command = ["python", "-m", MODULES[command[1]].module, *command[2:]]
    if command[0] == "bifrost-rt":
        parser().parse_args(command[1:])
    elif command[:2] == ["python", "-m"]:
        name = command[2]
        module = importlib.import_module(name)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{name}.__main__")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UnderstoodError):
            patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
            patch.setattr(sys, "argv", command[2:])
            module.main()
    elif command[:2] == ["serve", "run"]:
        module_name, _, attribute = command[2].partition(":")
        module = pytest.importorskip(module_name)
        module.Arguments.model_validate(dict(part.split("=") for part in command[3:]))
        assert callable(getattr(module, attribute))
    else:
        raise AssertionError(f"nobody knows how to check {command}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_indented_commands_are_understood(path: Path) -> None:
    """What a document shows without running it has at least options that exist."""
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    ((?:bifrost-rt|python -m) .*)$", text, re.M):
        if not line.startswith("python -m pytest"):
            understood(shlex.split(line, comments=True))


def test_the_list_of_commands_is_the_parsers() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == reference.document(), (
        "python -m bifrost_rt.cli.reference > docs/commands.md"
    )


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


@pytest.mark.parametrize("path", sorted(PAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", path.read_text()):
        name, _, anchor = (target[0] or target[1]).partition("#")
        if name.startswith("https:"):
            continue
        file = path.parent / name if name else path
        assert file.exists(), name
        if anchor:
            assert anchor in anchors(file), f"{name}#{anchor}"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    """A stranger reads it to the end: at most 900 words, tables and commands among them."""
    assert len(README.read_text().split()) <= 900


def test_the_api_reference_is_the_docstrings() -> None:
    assert (ROOT / "docs" / "api.md").read_text() == api_reference.document(), (
        "python -m tools.api_reference > docs/api.md"
    )


def test_the_api_reference_names_everything_that_is_exported() -> None:
    names = {entry.name for entry in api_reference.exported()}
    assert names == {name for name in bifrost_rt.__all__ if not name.startswith("__")}


def test_the_guides_can_be_run_here() -> None:
    for tool in ("bash", "curl", "openssl"):
        assert shutil.which(tool), f"the guides use {tool}"
