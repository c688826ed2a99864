"""Prompts of GenEval and DPG-Bench -> the folders that their scorers read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import geneval
from bifrost_rt import Generator, RequestError
from tests.patience import until

LINES = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a red cow"},
]
GOOD = '{"prompt": "a\u2028b", "tag": "colors", "include": []}\n'
FEW = ["--decoding-steps", "2", "--steps", "1"]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def drawn(alpha_set: Path, prompts: Path, output: Path, *more: str) -> int:
    asked = ["--engines", str(alpha_set), "--prompts", str(prompts), "--output", str(output)]
    return geneval.main([*asked, *FEW, *more])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_geneval_gets_a_folder_for_every_line(
    alpha_set: Path, generator: Generator, lines: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert drawn(alpha_set, lines, output, "--together", "2") == 0
    assert sorted(path.name for path in output.iterdir()) == ["00000", "00001", "run.json"]
    for i, line in enumerate(LINES):
        folder = output / f"0000{i}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        samples = sorted((folder / "samples").iterdir())
        assert [path.name for path in samples] == [f"000{n}.png" for n in range(4)]
        for seed, sample in enumerate(samples):
            alone = generator.run(
                line["prompt"],
                seed=seed,
                decoding_steps=2,
                num_inference_steps=1,
                output_type="np",
            )
            assert np.abs(pixels(sample).astype(int) - alone.images[0]).max() <= 1


def test_dpg_gets_a_grid_for_every_file(
    alpha_set: Path, generator: Generator, tmp_path: Path
) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "partiprompts7.txt").write_text("a cow on a hill\n")
    assert drawn(alpha_set, folder, tmp_path / "out") == 0
    grid = pixels(tmp_path / "out" / "partiprompts7.png")
    side = generator.manifest.model.image_height
    assert grid.shape == (2 * side, 2 * side, 3)
    last = generator.run(
        "a cow on a hill", seed=3, decoding_steps=2, num_inference_steps=1, output_type="np"
    )
    assert np.abs(grid[side:, side:].astype(int) - last.images[0]).max() <= 1


def test_a_run_that_was_cut_off_continues(alpha_set: Path, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert drawn(alpha_set, lines, output) == 0
    files = sorted(path for path in output.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in files}
    (output / "00001" / "samples" / "0002.png").unlink()
    assert drawn(alpha_set, lines, output) == 0
    assert {path: path.read_bytes() for path in files} == before
    untouched = [path for path in files if "00001" not in path.parts]
    assert all(path.stat().st_mtime_ns == times[path] for path in untouched)


def test_images_of_two_runs_are_never_mixed(alpha_set: Path, lines: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert drawn(alpha_set, lines, output) == 0
    with pytest.raises(RequestError, match=r"were drawn with other options"):
        drawn(alpha_set, lines, output, "--guidance-scale", "2")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(RequestError, match=r"holds files and no run\.json"):
        drawn(alpha_set, lines, other)
    for text in ("{", "[1]", ""):
        (output / "run.json").write_text(text)
        with pytest.raises(RequestError, match=r"run\.json: does not say what drew"):
            drawn(alpha_set, lines, output)


def test_images_of_other_prompts_are_never_taken_for_these(
    alpha_set: Path, lines: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    (tmp_path / "out").mkdir()
    (output / ".bifrost-rt.0.tmp").write_text("a run that was killed while it began")
    assert drawn(alpha_set, lines, output) == 0
    lines.write_text(json.dumps({**LINES[1], "prompt": "a green cow"}) + "\n")
    with pytest.raises(RequestError, match=r"were drawn with other prompts"):
        drawn(alpha_set, lines, output)
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "7.txt").write_text("a cow")
    with pytest.raises(RequestError, match=r"were drawn with other prompts"):
        drawn(alpha_set, folder, output)


def test_a_killed_run_continues(alpha_set: Path, lines: Path, tmp_path: Path) -> None:
    """Killed between two prompts: what the first has is not drawn again."""
    output, whole = tmp_path / "out", tmp_path / "whole"
    asked = ["--engines", alpha_set, "--prompts", lines, "--output", output, *FEW]
    command = [sys.executable, "-m", "benchmarks.geneval", *map(str, asked)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until(lambda: (output / "00000" / "metadata.jsonl").exists())
    running.kill()
    running.wait()
    first = {p: p.stat().st_mtime_ns for p in (output / "00000").rglob("*.png")}
    assert drawn(alpha_set, lines, output) == 0
    assert {p: p.stat().st_mtime_ns for p in (output / "00000").rglob("*.png")} == first
    assert drawn(alpha_set, lines, whole) == 0
    for path in whole.rglob("*.png"):
        assert path.read_bytes() == (output / path.relative_to(whole)).read_bytes()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + '{"prompt"', r"jsonl: line 2: not JSON"),
        (GOOD + '\n["a"]\n', r'jsonl: line 3: has no "prompt"'),
        ('{"prompt": " "}\n', r'jsonl: line 1: has no "prompt"'),
        ('{"prompt": "a", "tag": "colors"}\n', r"line 1: has no include, which GenEval's scorer"),
        ("\n", "holds no prompt"),
    ],
)
def test_lines_without_a_prompt_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=said):
        geneval.read(path)


def test_files_without_a_prompt_are_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no prompt"):
        geneval.read(tmp_path)
    (tmp_path / "7.txt").write_text(" \n")
    with pytest.raises(RequestError, match=r"7\.txt: holds no prompt"):
        geneval.read(tmp_path)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        geneval.read(tmp_path / "missing.jsonl")
