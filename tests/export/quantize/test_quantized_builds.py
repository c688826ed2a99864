"""A quantized set, built as a user builds it, and the builds that are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bifrost_rt import Generator, backends, cache, cli, inspect
from bifrost_rt import manifest as manifests
from bifrost_rt import processor as processors
from bifrost_rt.processor import Processor
from export import build, trace
from export.checkpoint import Checkpoint
from export.errors import CalibrationError, RecipeError
from export.formats import FORMATS
from export.planning import work
from export.planning.storage import Storage
from export.quantize.quantize import STATISTICS
from export.quantize.statistics import Statistics
from export.recipe import Recipe, load
from tests.conftest import ALPHA, alpha_recipe, difference, load_case
from tests.processors import AVX2, WITHOUT_VNNI, named

QEMU = shutil.which("qemu-x86_64")
PROMPTS = "a photo of a red apple\na green bench\n"
OVERRIDES = {
    "stages": {"t5_text": "fp32", "clip_text": "int4"},
    "layers": {"denoise:transformer_blocks.0.attn.*": "bf16"},
}


def only_traces(folder: Path) -> Path:
    """A cache folder with the traces of the real one, and nothing else."""
    kept = cache.folder() / trace.KIND
    kept.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / trace.KIND).symlink_to(kept)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_statistics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Those that an earlier run kept may have been gathered on another processor, whose last bits
    are others."""
    folder = only_traces(tmp_path_factory.mktemp("cached") / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(folder))
        yield


def int8_recipe(folder: Path) -> Recipe:
    """That of a set in a folder, calibrated on prompts that are written beside it."""
    (folder / "prompts.txt").write_text(PROMPTS)
    recipe: Recipe = alpha_recipe(
        folder / "set",
        precision="int8",
        calibration_prompts=str(folder / "prompts.txt"),
        calibration_steps=3,
        **OVERRIDES,
    )
    return recipe


@pytest.fixture(scope="module")
def int8_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(int8_recipe(tmp_path_factory.mktemp("int8")))


def test_the_manifest_says_what_every_engine_holds(int8_set: Path) -> None:
    manifest = manifests.read(int8_set)
    held = {spec.name: spec.precision for spec in manifest.engines}
    assert {name: p.requested for name, p in held.items()} == {
        **dict.fromkeys(held, "int8"),
        **OVERRIDES["stages"],
    }
    assert held["visual_decode"].compute == "int8"
    assert held["visual_decode"].weights == "int8"
    assert held["visual_decode"].layers == {"int8": 21, "bf16": 1}
    assert set(held["clip_text"].layers) == {"int4", "bf16"}
    assert set(held["t5_text"].layers) == {"fp32"}
    assert "int8" not in held["conditioning"].layers
    assert manifest.calibration is not None
    assert manifest.calibration.file in manifest.files
    assert manifest.calibration.prompts == 2


def test_the_report_gives_a_reason_for_every_exception(int8_set: Path) -> None:
    report = json.loads((int8_set / "report.json").read_text())
    for name, layer in report["layers"].items():
        stage = name.partition(":")[0]
        asked = OVERRIDES["stages"].get(stage, "int8")
        if layer["given"] not in (asked, "fp32"):
            assert layer["reason"], name
    assert "recipe" in report["layers"]["denoise:transformer_blocks.0.attn.to_q"]["reason"]
    scales = [layer["input_scale"] for layer in report["layers"].values() if "input_scale" in layer]
    assert len(scales) > 60
    assert all(scale > 0 for scale in scales)
    for engine in report["engines"].values():
        assert engine["parity"]["calls"] > 0


def test_images_stay_close(int8_set: Path) -> None:
    case = load_case("case_01")
    with Generator(int8_set) as generator:
        result = generator.run(**case.request(), output_type="np")
    largest = float(np.abs(case.tensors["mllm.tokens_final"]).max())
    # random weights: nothing was trained to be robust, and 8 bits through all networks add up
    assert 0 < difference(result.tokens, case.tensors["mllm.tokens_final"]) < 0.2 * largest
    assert np.abs(result.images.astype(int) - case.tensors["flux.image_u8"]).mean() < 8


@named(*WITHOUT_VNNI)
def test_openvino_never_draws_it_wrong(
    int8_set: Path,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither by itself nor when it is asked for, on a processor where it would."""
    monkeypatch.setattr(processors, "here", lambda: processor)
    assert cli.main(["inspect", str(int8_set)]) == 0
    assert "onnxruntime: the only one that computes int8 exactly" in capsys.readouterr().out
    if reason := backends.BACKENDS["openvino"].unavailable():
        pytest.skip(reason)
    for backend in ("openvino", "openvino-bf16"):
        assert cli.main(["verify", str(int8_set), "--backend", backend]) == 1
        error, hint = capsys.readouterr().err.splitlines()
        assert "OpenVINO would compute wrong int8 values" in error
        assert "run this set with backend='onnxruntime'" in hint


def test_an_int8_set_is_as_built_in_the_precise_mode(
    int8_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processors, "here", lambda: AVX2)
    assert cli.main(["verify", str(int8_set), "--backend", "onnxruntime"]) == 0
    assert "self-test image within 0 of 255" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")
def test_a_set_that_was_built_here_is_verified_on_an_older_processor(int8_set: Path) -> None:
    """qemu shows the file of the real processor, so the program is told what is played."""
    code = (
        "import sys\n"
        "from bifrost_rt import cli, processor\n"
        "processor.here = lambda: processor.Processor('x86', frozenset({'avx2'}), 'Haswell')\n"
        "raise SystemExit(cli.main(['verify', sys.argv[1], '--backend', 'onnxruntime']))"
    )
    done = subprocess.run(
        [str(QEMU), "-cpu", "Haswell", sys.executable, "-c", code, str(int8_set)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    assert "10 engines load, self-test image within" in done.stdout


def test_inspect_says_what_every_layer_is_and_why(
    int8_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", "--precision", str(int8_set)]) == 0
    said = capsys.readouterr().out
    assert "calibrated on 2 prompts, ranges by mse" in said
    assert "visual_decode, 21 x MatMulIntegerToFloat in onnxruntime" in said
    assert "(recipe: denoise:transformer_blocks.0.attn.*)" in said
    assert "branch.vision_head" in said


def test_inspect_refuses_a_report_that_was_changed(int8_set: Path, tmp_path: Path) -> None:
    from bifrost_rt.errors import IntegrityError

    changed = shutil.copytree(int8_set, tmp_path / "set")
    report = changed / "report.json"
    report.write_text(report.read_text().replace('"bf16"', '"int8"', 1))
    with pytest.raises(IntegrityError, match=r"report\.json"):
        inspect.precision(changed, manifests.read(changed))


def test_statistics_are_named_after_their_checkpoint(int8_set: Path, tmp_path: Path) -> None:
    kept = manifests.read(int8_set).calibration
    assert kept is not None
    path = int8_set / kept.file
    again = Statistics.load(path, kept.checkpoint)
    assert again.prompts == tuple(PROMPTS.split("\n")[:2])
    foreign = Statistics("0" * 64, again.prompts, again.layers, complete=True)
    foreign.save(tmp_path / "foreign")
    with pytest.raises(CalibrationError, match="another checkpoint"):
        build.build(
            alpha_recipe(tmp_path / "set", precision="int8", statistics=str(tmp_path / "foreign"))
        )
    assert not (tmp_path / "set").exists()


@pytest.fixture
def no_statistics_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(only_traces(tmp_path / "cache")))


def test_another_precision_of_a_model_takes_the_statistics_that_were_gathered(
    int8_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    said: list[str] = []
    folder = build.build(
        alpha_recipe(
            tmp_path / "set",
            precision="fp8",
            calibration_prompts=str(tmp_path / "prompts.txt"),
            calibration_steps=3,
        ),
        said.append,
    )
    assert not any("calibrating" in line for line in said)
    assert manifests.sha256(folder / STATISTICS) == manifests.sha256(int8_set / STATISTICS)


@pytest.mark.usefixtures("no_statistics_kept")
def test_a_build_that_was_cut_off_goes_on_with_what_it_has_seen(
    int8_set: Path, tmp_path: Path
) -> None:
    class Cut(Exception):
        pass

    recipe = int8_recipe(tmp_path)
    said: list[str] = []

    def cut(at: int, word: str) -> None:
        def say(message: str) -> None:
            said.append(message)
            if sum(word in line for line in said) > at:
                raise Cut

        said.clear()
        with pytest.raises(Cut):
            build.build(recipe, say)

    cut(1, "calibrating")  # within the second run, the guided one
    [kept] = tmp_path.glob(".set.partial/calibration.safetensors")
    calibration = manifests.read(int8_set).calibration
    assert calibration is not None
    with pytest.raises(CalibrationError, match="cut off after 1 runs"):
        Statistics.load(kept, calibration.checkpoint)  # nobody else may use it
    cut(0, "building")
    assert sum("calibrating" in line for line in said) == 1
    cut(1, "building")
    assert not any("calibrating" in line for line in said)
    [kept] = tmp_path.glob(".set.partial/calibration.safetensors")
    assert kept.read_bytes() == (int8_set / "calibration.safetensors").read_bytes()


def test_a_file_without_prompts_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("# nothing here\n")
    with pytest.raises(CalibrationError, match="holds no prompt"):
        build.build(
            alpha_recipe(
                tmp_path / "set", precision="fp8", calibration_prompts=str(tmp_path / "none.txt")
            )
        )
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int9"}, "precision 'int9' is unknown .did you mean 'int8'"),
        ({"fallback": "fp32"}, "fallback 'fp32' is unknown"),
        ({"stages": {"denoise": "fp6"}}, "stages.denoise 'fp6' is unknown"),
        ({"layers": {"denoise:*": "half"}}, "'half' is unknown"),
        ({"scales": "entropy"}, "scales 'entropy' is unknown"),
        ({"quality_budget": 40.0}, "quality_budget is for quantized sets"),
        ({"precision": "int8", "quality_budget": -3.0}, "between 0 and 100"),
        ({"statistics": "x"}, "statistics is for quantized sets"),
        ({"precision": "int8", "calibration_steps": 0}, "calibration_steps must be at least 1"),
        ({"stages": {"denoise": 8}}, "stages.denoise: expected str"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, object], message: str) -> None:
    folders = {"mllm": "m", "bifrost": "b", "flux": "f", "output": "o"}
    with pytest.raises(RecipeError, match=message):
        load({**folders, **changes}, "recipe")


def test_a_recipe_may_name_overrides() -> None:
    folders = {"mllm": "m", "bifrost": "b", "flux": "f", "output": "o"}
    recipe = load({**folders, "precision": "fp16", "stages": {"denoise": "int8"}}, "recipe")
    assert isinstance(recipe, Recipe)
    assert recipe.quantized


def test_planned_weights_are_the_built_ones(int8_set: Path) -> None:
    """Of a recipe that says otherwise of two engines and of some layers of a third."""
    works = work.of_checkpoint(
        Checkpoint(*(ALPHA / part for part in ("mllm", "bifrost", "flux")), read=False),
        mllm_max_length=48,
        t5_length=32,
        steps=28,
    )
    asked = Storage(FORMATS["int8"], **OVERRIDES)
    asked.check(one.elements for one in works if one.elements)
    planned = {one.engine: one.weights(asked) for one in works}
    report = json.loads((int8_set / "report.json").read_text())["engines"]
    found = {name: sum(report[name]["weight_bytes"].values()) for name in planned}
    assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=0.01)
    # the tiny CLIP's causal mask, 77 by 77, is no weight
    planned["clip_text"] += 77 * 77
    assert planned == {name: pytest.approx(size, rel=0.02) for name, size in found.items()}
