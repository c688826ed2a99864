"""The command line as a person meets it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bifrost_rt import backends
from bifrost_rt.cli import main


def test_generate_writes_a_picture_and_prints_its_path(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "a.png"
    arguments = ["generate", "a red circle", "--engines", str(alpha_set), "-o", str(out)]
    assert main([*arguments, "--seed", "1", "--num-inference-steps", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert captured.err == ""  # quiet in a pipe
    with Image.open(out) as picture:
        assert picture.size == (128, 128)


def test_several_prompts_and_pictures(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "a", "b", "-n", "2", "--engines", str(alpha_set)]
    assert main([*arguments, "-o", str(tmp_path / "p.png"), "--num-inference-steps", "1"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / f"p-{i}.png") for i in range(4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-inference-steps", "0"], "error: num_inference_steps must be at least 1, got 0\n"),
        (["--backend", "abacus"], "error: unknown backend 'abacus'; this version has"),
    ],
)
def test_errors_are_one_line(
    alpha_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "a.png"
    status = main(["generate", "a", "--engines", str(alpha_set), "-o", str(out), *arguments])
    assert status == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_a_missing_set_comes_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nowhere"]) == 1
    assert "hint: build one with `python -m export.build" in capsys.readouterr().err


def test_inspect_reads_like_a_description(
    alpha_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(alpha_set)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("alpha: Bifrost-1 engine set for onnxruntime")
    for piece in ("128x128 px", "16 visual tokens of width 64", "text_keys.0 … text_keys.2"):
        assert piece in text


def test_a_picture_is_made_again_from_its_own_file(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["generate", "--engines", str(alpha_set)]
    few = ["--num-inference-steps", "2", "--decoding-steps", "3", "--cfg-weight", "1.5"]
    assert main([*common, "a cow", "a dog", "-n", "2", "-o", str(tmp_path / "a.png"), *few]) == 0
    assert main([*common, "--like", str(tmp_path / "a-2.png"), "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a-2.png").read_bytes()
    like_b = [*common, "--like", str(tmp_path / "b.png"), "--seed", "1"]
    assert main([*like_b, "-o", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_like_refuses_foreign_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("other", "does not say how it was made"), ("text", "cannot be read")):
        like = str(tmp_path / f"{name}.png")
        assert main(["generate", "--like", like, "--engines", "e"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file/a.png", "a.xyz"])
def test_a_place_that_takes_no_picture_is_said_before_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["generate", "a", "--engines", "nowhere", "-o", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_no_prompt_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--engines", "e"]) == 1
    assert capsys.readouterr().err.startswith("error: no prompt\nhint:")


@pytest.mark.parametrize("backend", sorted(backends.DRIVERS))
def test_verify_draws_what_the_builder_drew(
    set_for: Callable[[str], Path], backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := backends.DRIVERS[backend].unavailable():
        pytest.skip(reason)
    assert main(["verify", str(set_for(backend)), "--backend", backend]) == 0
    assert "7 engines load, self-test picture within" in capsys.readouterr().out


def test_doctor_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in backends.DRIVERS)


def test_python_m_bifrost_rt_is_the_same_command(alpha_set: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bifrost_rt", "inspect", str(alpha_set)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("alpha: Bifrost-1 engine set")
