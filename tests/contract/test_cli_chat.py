"""`bifrost-rt describe` and `bifrost-rt chat`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import Generator
from bifrost_rt.cli import main

FEW = ("--max-new-tokens", "6")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a photo.png"
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((60, 60)).save(path)
    return path


def test_describe_says_what_the_generator_says(
    alpha_set: Path, generator: Generator, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = generator.describe(photo, max_new_tokens=6)
    command = ["describe", str(photo), "--engines", str(alpha_set), *FEW]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{expected.text}\n"
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_ids"] == expected.token_ids
    assert found["usage"]["completion_tokens"] == len(expected.token_ids)
    asked = generator.describe(photo, "why?", max_new_tokens=6, temperature=2.0, seed=3)
    command.insert(2, "why?")
    main([*command, "--temperature", "2", "--seed", "3"])
    assert capsys.readouterr().out == f"{asked.text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.png"], "error: image: gone.png: cannot be read: No such file or directory\n"),
        (["{photo}", "--temperature", "nan"], "error: temperature must be finite in float32"),
        (["{photo}", "--max-new-tokens", "0"], "error: max_new_tokens must be at least 1, got 0\n"),
    ],
)
def test_bad_input_is_one_error(
    alpha_set: Path,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = [one.format(photo=photo) for one in arguments]
    assert main(["describe", *given, "--engines", str(alpha_set)]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(message)


def typed(
    monkeypatch: pytest.MonkeyPatch, alpha_set: Path, *lines: str, options: tuple[str, ...] = ()
) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return main(["chat", "--engines", str(alpha_set), *FEW, *options])


def test_a_conversation_goes_on_and_begins_anew(
    alpha_set: Path,
    generator: Generator,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = {"role": "user", "content": [{"image": photo}, {"type": "text", "text": "what is it?"}]}
    one = generator.chat([first], max_new_tokens=6).text
    messages: list[Any] = [first, {"role": "assistant", "content": one}]
    two = generator.chat([*messages, {"role": "user", "content": "why?"}], max_new_tokens=6).text
    alone = generator.chat([{"role": "user", "content": "why?"}], max_new_tokens=6).text
    lines = (f"/image {photo}", "what is it?", "why?", "", "/new", "why?", "/quit", "why?")
    assert typed(monkeypatch, alpha_set, *lines) == 0
    assert capsys.readouterr().out == f"{one}\n{two}\n{alone}\n"
    quoted = (f'/image "{photo}"', "what is it?")
    assert typed(monkeypatch, alpha_set, *quoted) == 0
    assert capsys.readouterr().out == f"{one}\n"


def test_a_system_line_is_said_first(
    alpha_set: Path,
    generator: Generator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    expected = generator.chat(told, max_new_tokens=6).text
    typed(monkeypatch, alpha_set, "why?", options=("--system", "Be brief."))
    assert capsys.readouterr().out == f"{expected}\n"


def test_it_draws_and_looks_at_what_it_drew(
    alpha_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(monkeypatch, alpha_set, "/draw a cow", "what is it?", "/draw a dog") == 0
    first, answer, second = capsys.readouterr().out.splitlines()
    assert (first, second) == ("drawn.png", "drawn-0.png")
    with Generator(alpha_set) as one:
        image = one.describe(tmp_path / first, "what is it?", max_new_tokens=6)
    assert answer == image.text


def test_errors_do_not_end_it(
    alpha_set: Path,
    generator: Generator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ("/image gone.png", "/image", "/draw", "/fly", "word " * 20000, "/help", "why?")
    assert typed(monkeypatch, alpha_set, *lines) == 0
    found = capsys.readouterr()
    alone = generator.chat([{"role": "user", "content": "why?"}], max_new_tokens=6).text
    assert found.out == f"{alone}\n"
    for said in (
        "error: image: gone.png: cannot be read",
        "error: /image needs a file",
        "error: /draw: there is no answer to draw yet",
        "error: /fly is unknown",
        "tokens, its answer's not counted; it may have",
        "/image FILE",
    ):
        assert said in found.err
