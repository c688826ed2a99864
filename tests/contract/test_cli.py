"""The command line as a person meets it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from benchmarks import machine
from bifrost_rt import Generator, backends, cache, doctor, generator, latents_file
from bifrost_rt import processor as processors
from bifrost_rt.cli import generate, main
from bifrost_rt.params import OPTIONS
from bifrost_rt.processor import Processor
from tests.patience import PATIENCE
from tests.processors import KINDS, named

FEW = ["--seed", "1", "--num-inference-steps", "2"]


def test_generate_writes_an_image_and_prints_its_path(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "a.png"
    arguments = ["generate", "a red circle", "--engines", str(alpha_set), "-o", str(out)]
    assert main([*arguments, "--seed", "1", "--num-inference-steps", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert captured.err == ""  # quiet in a pipe
    with Image.open(out) as drawn:
        assert drawn.size == (128, 128)


def test_several_prompts_and_images(
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


def test_an_image_is_made_again_from_its_own_file(
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


def test_like_refuses_foreign_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("other", "does not say how it was made"), ("text", "cannot be read")):
        like = str(tmp_path / f"{name}.png")
        assert main(["generate", "--like", like, "--engines", "e"]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file/a.png", "a.xyz"])
def test_a_place_that_takes_no_image_is_said_before_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["generate", "a", "--engines", "nowhere", "-o", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_prompts_of_a_file_are_drawn_one_after_another(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each as it would be alone, so that a line can be drawn again by itself."""
    (tmp_path / "prompts.txt").write_text("a cow\n\n  a dog \n", encoding="utf-8")
    common = ["generate", "--engines", str(alpha_set), "--steps", "1", "--seed", "3"]
    file = ["--prompts", str(tmp_path / "prompts.txt"), "--save-tokens", str(tmp_path / "t.st")]
    assert main([*common, *file, "-o", str(tmp_path / "p.png"), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["a cow", "a dog"]
    assert [line["path"] for line in lines] == [str(tmp_path / f"p-{i}.png") for i in range(2)]
    assert {line["seed"] for line in lines} == {3}
    assert lines[0]["seconds"]["denoise"] > 0
    assert main([*common, "a dog", "-o", str(tmp_path / "alone.png")]) == 0
    assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "p-1.png").read_bytes()
    assert {p.name for p in tmp_path.glob("t*")} == {"t-0.st", "t-1.st"}


def test_tokens_go_from_one_run_to_another(alpha_set: Path, tmp_path: Path) -> None:
    tokens, common = str(tmp_path / "t.safetensors"), ["generate", "--engines", str(alpha_set)]

    def draw(name: str, *arguments: str) -> bytes:
        path = tmp_path / f"{name}.png"
        assert main([*common, "-o", str(path), *arguments]) == 0
        return path.read_bytes()

    def pixels(name: str) -> bytes:
        with Image.open(tmp_path / f"{name}.png") as drawn:
            return drawn.tobytes()

    draw("first", "a cow", "--seed", "1", "--steps", "2", "--save-tokens", tokens)
    draw("again", "--tokens", tokens)
    assert pixels("again") == pixels("first")
    draw("other", "--tokens", tokens, "--seed", "9", "--controlnet-conditioning-scale", "0.2")
    assert pixels("other") != pixels("first")
    # an image of tokens is made again from itself and them
    like = ["--like", str(tmp_path / "other.png")]
    assert draw("like", *like, "--tokens", tokens) == (tmp_path / "other.png").read_bytes()


def test_an_image_is_drawn_again(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its description or another prompt, at once or by a file of its latents."""
    image, tokens = tmp_path / "image.png", str(tmp_path / "t.safetensors")
    Image.linear_gradient("L").resize((60, 90)).convert("RGB").save(image)
    common = ["--engines", str(alpha_set)]

    def draw(name: str, *arguments: str) -> bytes:
        path = tmp_path / f"{name}.png"
        assert main(["generate", *common, *FEW, "-o", str(path), *arguments]) == 0
        with Image.open(path) as drawn:
            return drawn.tobytes()

    assert main(["encode", str(image), *common, "-o", tokens]) == 0
    assert capsys.readouterr().out == f"{tokens}\n"
    with Generator(alpha_set) as opened:
        said = opened.describe(image).text
        expected = opened.run(image=image, seed=1, num_inference_steps=2).images[0].tobytes()
    assert latents_file.load(tokens).parameters["prompt"] == said
    assert draw("again", "--image", str(image)) == expected
    assert draw("by_file", "--tokens", tokens) == expected
    assert main(["encode", str(image), *common, "-o", tokens, "--prompt", "a cow"]) == 0
    other = draw("other", "a cow", "--image", str(image))
    assert other == draw("other_by_file", "--tokens", tokens)
    assert other != expected
    # what was drawn from an image is made again from itself and that image
    assert draw("like", "--like", str(tmp_path / "other.png"), "--image", str(image)) == other


def test_a_part_of_an_image_is_drawn_anew(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask, none = (tmp_path / f"{name}.png" for name in ("image", "mask", "none"))
    Image.linear_gradient("L").resize((60, 90)).convert("RGB").save(image)
    Image.linear_gradient("L").resize((90, 60)).save(mask)  # its lower half
    Image.new("L", (9, 9)).save(none)
    common = ["generate", "--engines", str(alpha_set), *FEW]

    def draw(name: str, *arguments: str) -> bytes:
        path = tmp_path / f"{name}.png"
        assert main([*common, "-o", str(path), *arguments]) == 0
        with Image.open(path) as drawn:
            return drawn.tobytes()

    edited = draw("edited", "a cow", "--image", str(image), "--mask", str(mask))
    with Generator(alpha_set) as opened:
        expected = opened.run("a cow", image=image, mask=mask, seed=1, num_inference_steps=2)
    assert edited == expected.images[0].tobytes()
    like = ["--like", str(tmp_path / "edited.png"), "--image", str(image)]
    assert draw("like", *like, "--mask", str(mask)) == edited
    again = draw("again", *like, "--mask", str(mask), "--no-keep-pixels")
    with Generator(alpha_set) as opened:
        expected = opened.run(
            "a cow", image=image, mask=mask, seed=1, num_inference_steps=2, keep_pixels=False
        )
    assert again == expected.images[0].tobytes() != edited
    capsys.readouterr()
    for arguments, message in (
        (["a cow", "--keep-pixels"], "keep_pixels keeps what lies outside the mask of an image"),
        (["--mask", str(mask)], "--mask says what to draw anew of an image or of tokens"),
        (like, "edited.png: was made from a mask of its own\nhint: --mask FILE"),
        ([*like, "--mask", str(none)], "was made from another mask than that of --mask"),
        ([*like[:2], "--image", str(mask)], "was made from another image than that of --image"),
    ):
        assert main([*common, *arguments]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--like", "drawn.png"], "was made from tokens of its own"),
        (["--like", "drawn.png", "--tokens", "b.st"], "other tokens than those of --tokens"),
        (["--like", "plain.png", "--tokens", "a.st"], "was not made from a file of tokens"),
        (["--image", "nowhere.png"], "nowhere.png: "),
        (["--image", "plain.png", "--tokens", "a.st"], "two sources of CLIP latents"),
        (["--prompts", "empty.txt", "--image", "plain.png"], "does not go with a prompt, --image"),
        (["--tokens", "plain.png"], "cannot be read as tokens"),
        (["--tokens", "nowhere"], "cannot be read as tokens"),
        (["--tokens", "two.st"], "expected one tensor `tokens`, found a, tokens"),
        (["--tokens", "wide.st"], "expected tokens float32[images, places, width], all finite"),
        (["--tokens", "bare.st"], "does not say which prompts its tokens are of"),
        (["--tokens", "a.st", "x", "y"], "tokens must have the shape [2, 16, 64]"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--prompts", "nowhere"], "cannot be read as prompts"),
        (["--prompts", "plain.png"], "cannot be read as prompts"),
        (["--prompts", "empty.txt", "x"], "--prompts does not go with a prompt"),
        (["x", "--size", "64x128"], "width=64: the set 'alpha' was built for 128x128"),
    ],
)
def test_hand_over_refuses_what_it_cannot_draw(
    alpha_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {"prompt": "a", "num_images_per_prompt": 1, "seed": 1}
    for name, seed in (("a", 0), ("b", 1)):
        values = np.random.default_rng(seed).standard_normal((1, 16, 64), np.float32)
        latents_file.save(f"{name}.st", values, made)
    save_file({"tokens": values, "a": values}, "two.st")
    save_file({"tokens": values[0]}, "wide.st")
    save_file({"tokens": values}, "bare.st")
    Path("empty.txt").write_text("\n\n")
    with Generator(alpha_set) as generator:
        few = {"seed": 1, "num_inference_steps": 1}
        generator.run("a", **few).save("plain.png")
        generator.run("a", **few, tokens=latents_file.load("a.st").tokens).save("drawn.png")
    command = ["generate", "--engines", str(alpha_set), "-o", "out.png", *arguments]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not Path("out.png").exists()


def test_an_image_that_asks_for_unknown_arguments_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = PngImagePlugin.PngInfo()
    about.add_itxt("bifrost-rt", json.dumps({"prompt": "a", "image": 0, "style": "x"}))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=about)
    assert main(["generate", "--like", str(tmp_path / "a.png"), "--engines", "e"]) == 1
    assert "with other parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "-n", "100000"], "num_images_per_prompt=100000: one run draws at most 4096"),
        (["a", "-n", str(10**18)], "one run draws at most 4096"),
        (["a"] * 5000, "prompt has 5000 texts, for 5000 images: one run draws at most 4096"),
        (["--prompts", "two.txt", "-n", "100000"], "one run draws at most 4096"),
        (["a", "--steps", "1000000000"], "num_inference_steps must be at most 10000"),
        (["a", "-o", "x" * 256], "File name too long"),
        (["a", "b", "-o", f"{'x' * 251}.png"], "File name too long"),
        (["--prompts", "two.txt", "-o", f"{'x' * 251}.png"], "File name too long"),
        (["a", "-n", "2", "-o", "p.png"], "p-1.png: cannot be written: it is a folder"),
        (["a", "--save-tokens", "p-1.png"], "p-1.png: cannot be written: it is a folder"),
        (["a", "-o", "q.png", "--save-tokens", "q.png"], "is named for the image and for"),
        (["a", "-o", "q.xbm"], "'.xbm' is not an image format that Pillow writes"),
        (["a", "-o", "two.txt/q.png"], "cannot be written: Not a directory"),
        (["--like", "third.png", "-n", "2"], "that image is number 2 of its run"),
        (["a", "--size", "64x64"], "was built for 128x128"),
    ],
)
def test_what_cannot_be_drawn_or_written_is_said_before_the_set_is_opened(
    alpha_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "Generator", None)  # would fail in another way
    Path("two.txt").write_text("a\nb\n")
    Path("p-1.png").mkdir()
    about = PngImagePlugin.PngInfo()
    given = {"prompt": "a", **dict.fromkeys(OPTIONS), "num_images_per_prompt": 3}
    about.add_itxt("bifrost-rt", json.dumps({**given, "image": 2}))
    Image.new("RGB", (4, 4)).save("third.png", pnginfo=about)
    before = sorted(tmp_path.iterdir())
    assert main(["generate", "--engines", str(alpha_set), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_images_go_into_a_folder(
    alpha_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("prompts.txt").write_text("a\nb\n")
    common = ["generate", "--engines", str(alpha_set), "--steps", "1", "--seed", "1"]
    assert main([*common, "a", "-o", "there"]) == 0
    assert main([*common, "a", "-o", "new/", "-n", "2"]) == 0
    assert main([*common, "--prompts", "prompts.txt", "-o", "lines/"]) == 0
    assert capsys.readouterr().out.split() == [
        *("there/out.png", "new/out-0.png", "new/out-1.png"),
        *("lines/out-0.png", "lines/out-1.png"),
    ]
    assert Path("lines/out-0.png").read_bytes() == Path("there/out.png").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_sees_both_loops(alpha_set: Path, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    command = ["generate", "a cow", "--engines", str(alpha_set), "--steps", "2", "--seed", "4"]
    done = subprocess.Popen(
        [sys.executable, "-m", "bifrost_rt", *command, "-o", str(tmp_path / "a.png")],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    assert done.wait(timeout=PATIENCE) == 0
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # a terminal whose other end is closed, when all is read
        while piece := os.read(ours, 1 << 16):
            shown += piece.decode()
    os.close(ours)
    assert "decoding  [###" in shown
    assert "denoising [############------------] 1/2" in shown
    assert shown.endswith("seed 4\r\n")


@pytest.mark.parametrize(("name", "module"), [("plan", "export.plan"), ("bench", "benchmarks.lat")])
def test_commands_that_are_modules(name: str, module: str, capfd: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m {module}" in capfd.readouterr().out


def test_help_loads_no_backend_and_no_server() -> None:
    """So it is there at once: importing those is what takes time."""
    code = (
        "import sys\n"
        "from bifrost_rt.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "COMMAND" in done.stdout
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    libraries = {
        name.partition(".")[0] for d in backends.BACKENDS.values() for name in (d.library, *d.also)
    }
    assert not loaded & {*libraries, "fastapi", "uvicorn", "torch", "onnx", "safetensors", "ftfy"}


def test_no_prompt_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--engines", "e"]) == 1
    assert capsys.readouterr().err.startswith("error: no prompt\nhint:")


EXACT = sorted(name for name, backend in backends.BACKENDS.items() if backend.exact)


@pytest.mark.parametrize("backend", EXACT)
def test_verify_draws_what_the_builder_drew(
    set_for: Callable[[str], Path], backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason := backends.BACKENDS[backend].unavailable():
        pytest.skip(reason)
    assert main(["verify", str(set_for(backend)), "--backend", backend]) == 0
    assert "10 engines load, self-test image within" in capsys.readouterr().out


def test_doctor_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in backends.BACKENDS)
    assert all(f"\n{task}\n  " in text for task in doctor.TASKS)


@named(*KINDS)
def test_doctor_says_what_the_processor_means_for_int8(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in processors.LIMITS:
        monkeypatch.delenv(name, raising=False)
    section = doctor.report(processor).split("\n\n")[1].splitlines()
    assert section[0] == "processor"
    assert section[1].startswith(f"  {processor.name}: ")
    assert section[2].startswith("  int8 in onnxruntime: exact")
    assert section[3].startswith("  int8 in openvino: ")
    assert ("refused here" in section[3]) == processor.saturates


def test_doctor_names_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "here"))
    cache.write("traces", "key", bytes(3 << 20))
    assert main(["doctor"]) == 0
    assert f"  {tmp_path / 'here'}, 3 MiB; {cache.VARIABLE} names" in capsys.readouterr().out


def test_doctor_tells_the_version_of_the_module_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime and onnxruntime-gpu have one module; the package's data may be the other's."""
    pytest.importorskip("onnxruntime")
    told = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata,
        "version",
        lambda name: "0.0.1" if name == "onnxruntime" else told(name),
    )
    monkeypatch.setattr(sys.modules["onnxruntime"], "__version__", "9.9.9")
    assert main(["doctor"]) == 0
    assert "yes, version 9.9.9" in capsys.readouterr().out
    assert machine.describe()["libraries"]["onnxruntime"] == "9.9.9"


def test_doctor_says_what_is_missing_and_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    absent = ("torch", "uvicorn", "onnxruntime")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generator, "DEFAULT_SET", Path("nowhere"))
    assert main(["doctor"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "no: torch not installed; pip install 'bifrost-rt[export]'" in lines
    assert "no: uvicorn not installed; pip install 'bifrost-rt[serve]'" in lines
    assert any(
        line.startswith("onnxruntime") and line.endswith("; pip install 'bifrost-rt[cpu]'")
        for line in lines
    )
    assert any(line.startswith("no: no default engine set") for line in lines)


def test_python_m_bifrost_rt_is_the_same_command(alpha_set: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bifrost_rt", "inspect", str(alpha_set)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("alpha: Bifrost-1 engine set")


def test_a_reader_that_goes_is_no_error(alpha_set: Path) -> None:
    command = [sys.executable, "-m", "bifrost_rt", "inspect", str(alpha_set)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_files_of_prompts_as_windows_writes_them(
    alpha_set: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a byte order mark, at the seam of two such files too; from a pipe the same."""
    marked = "\ufeffa cow\r\n\ufeffa dog\r\n".encode()
    (tmp_path / "prompts.txt").write_bytes(marked)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(marked)))
    common = ["generate", "--engines", str(alpha_set), "--steps", "1", "--seed", "3", "--json"]
    for name in (str(tmp_path / "prompts.txt"), "-"):
        assert main([*common, "--prompts", name, "-o", str(tmp_path / "p.png")]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["prompt"] for line in lines] == ["a cow", "a dog"]
        assert [line["warnings"] for line in lines] == [[], []]


@pytest.mark.parametrize("name", ["prompts.txt", "-"])
def test_prompts_in_another_encoding_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As PowerShell's `>` writes them."""
    written = "a cow\r\n".encode("utf-16")
    (tmp_path / "prompts.txt").write_bytes(written)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(written)))
    assert main(["generate", "--engines", "e", "--prompts", name]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: cannot be read as prompts: ")
    assert "expected text in UTF-8, found UTF-16\nhint: save the file as UTF-8" in error


def test_a_prompt_that_is_cut_is_a_line_on_stderr(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a photo of a wooden bridge over a river " * 12
    command = ["generate", long, "--engines", str(alpha_set), "--steps", "1", "--seed", "1"]
    assert main([*command, "-o", str(tmp_path / "a.png"), "--json"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    starts = [f"warning: prompt 0: truncated: {name} reads" for name in ("the MLLM", "CLIP", "T5")]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    warnings = json.loads(captured.out)["warnings"]
    assert [f"warning: {text}" for text in warnings] == lines


def test_an_image_that_would_be_black_is_an_error(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "a cow", "--engines", str(alpha_set), "-o", str(tmp_path / "a.png")]
    assert main([*command, "--controlnet-conditioning-scale", "3e38"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: engine `denoise`: latents are not finite: 1024 of 1024")
    assert lines[1] == "hint: controlnet_conditioning_scale=3e+38: use a value like the default"
    assert len(lines) == 2
    assert not list(tmp_path.iterdir())


def test_options_of_the_mllm_with_its_tokens_given_are_said(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = str(tmp_path / "t.safetensors")
    few = ["--engines", str(alpha_set), "--steps", "1", "--json", "-o", str(tmp_path / "a.png")]
    assert main(["generate", "a cow", *few, "--cfg-weight", "2", "--save-tokens", tokens]) == 0
    assert main(["generate", "--tokens", tokens, *few]) == 0
    assert capsys.readouterr().err == ""
    assert main(["generate", "--tokens", tokens, *few, "--cfg-weight", "5"]) == 0
    captured = capsys.readouterr()
    said = "--cfg-weight has no effect: --tokens brings the CLIP latents"
    assert captured.err == f"warning: {said}\n"
    assert json.loads(captured.out)["warnings"] == [said]
