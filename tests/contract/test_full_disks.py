"""A disk that is full once the image is drawn does not cost the image."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import Generator, latents_file
from bifrost_rt.cli import generate, main
from bifrost_rt.errors import RequestError
from bifrost_rt.result import Result

LIMIT = 1000  # bytes of a file, less than any image


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder whose place is taken by a file while images are drawn for it."""
    folder = tmp_path / "gone"
    draw = Generator.run_several

    def run_several(*given: Any, **named: Any) -> list[Result]:
        drawn = draw(*given, **named)
        folder.rmdir()
        folder.write_text("in the way")
        return drawn

    monkeypatch.setattr(Generator, "run_several", run_several)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return folder


def arguments(alpha_set: Path, out: Path, *more: str) -> list[str]:
    steps = ("--num-inference-steps", "1", "--decoding-steps", "1")
    return ["generate", "a", "--engines", str(alpha_set), "-o", str(out), *steps, *more]


def test_an_image_that_its_place_refuses_is_kept_in_another(
    alpha_set: Path, losing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = losing / "a.safetensors"
    asked = arguments(alpha_set, losing / "a.png", "--seed", "3", "--save-tokens", str(tokens))
    assert main(asked) == 1
    told = capsys.readouterr().err
    found = re.search(r"what was drawn is kept in (\S+)\nhint: move it from there", told)
    assert found, told
    kept = Path(found[1])
    assert kept.parent == tmp_path / "temporary"
    with Image.open(kept / "a.png") as image:
        drawn = np.asarray(image)
    with Generator(alpha_set) as generator:
        again = generator.run(
            "a", seed=3, num_inference_steps=1, decoding_steps=1, output_type="np"
        )
    assert np.array_equal(drawn, again.images[0])
    assert np.array_equal(latents_file.load(kept / "a.safetensors").tokens, again.tokens)


def test_other_images_that_are_drawn_keep_their_place(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("in the way")
    few = {"num_inference_steps": 1, "decoding_steps": 1}
    places = (tmp_path / "file" / "a.png", tmp_path / "b.png")
    tasks = [generate.Task({"prompt": "a", **few}, place, None) for place in places]
    with Generator(alpha_set) as generator, pytest.raises(RequestError, match="is kept in"):
        generate._draw(generator, tasks, as_json=False)
    assert places[1].is_file()
    assert len(list(tmp_path.glob("bifrost-rt-*/a.png"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit of Linux")
def test_where_no_place_takes_it_the_seed_is_told(alpha_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))

    asked = arguments(alpha_set, out / "a.png", "--seed", "3")
    done = subprocess.run(
        [sys.executable, "-m", "bifrost_rt", *asked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **{name: str(tmp_path) for name in ("TMPDIR", "HOME")},
            "PYTHONPATH": ":".join(sys.path),
            "PYTHONDONTWRITEBYTECODE": "1",  # Python would leave compiled modules cut off
        },
        preexec_fn=limit,
    )
    assert done.returncode == 1, done.stderr
    assert "cannot be written: File too large; the image could not be kept" in done.stderr
    assert "run it again with --seed 3, which draws the same image" in done.stderr
    assert list(out.iterdir()) == []
    assert not list(tmp_path.glob("bifrost-rt-*"))


def test_a_result_can_be_saved_again(alpha_set: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with Generator(alpha_set) as generator:
        result = generator.run("a", num_inference_steps=1, decoding_steps=1)
    with pytest.raises(RequestError, match="cannot be written"):
        result.save(tmp_path / "file" / "a.png")
    assert result.save(tmp_path / "a.png") == [tmp_path / "a.png"]
