"""Building: recipes, flags, precision, and what an interrupted or refused build leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from bifrost_rt import Generator, RequestError, cache, manifest
from export import build, recipe, shipped
from export.engine_set import atomic_output
from export.errors import BuildError, CheckpointError, ExportError, RecipeError
from tests.conftest import ALPHA, alpha_recipe, difference, load_case
from tests.patience import PATIENCE, until

FLAGS = [
    *("--mllm", str(ALPHA / "mllm"), "--bifrost", str(ALPHA / "bifrost")),
    *("--flux", str(ALPHA / "flux"), "--mllm-max-length", "48", "--t5-max-length", "32"),
]


def test_the_report_holds_every_engines_parity(alpha_set: Path) -> None:
    report = json.loads((alpha_set / "report.json").read_text())
    facts = manifest.read(alpha_set)
    assert report["engines"].keys() == {spec.name for spec in facts.engines}
    for engine in report["engines"].values():
        parity = engine["parity"]
        assert parity["calls"] > 0
        assert parity["max_error"] <= parity["tolerance"] * max(1, parity["largest_value"])


def test_graphs_have_their_opset_and_tell_nothing_of_the_machine(alpha_set: Path) -> None:
    """Of opset 24 is only what writes into a cache."""
    for path in sorted(alpha_set.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        writes = any(node.op_type == "TensorScatter" for node in model.graph.node)
        assert writes == (path.stem == "mllm_text")
        assert {i.domain: i.version for i in model.opset_import}[""] == (24 if writes else 23)
        assert str(Path.home()).encode() not in path.read_bytes()
        assert b".py" not in path.read_bytes()
        onnx.checker.check_model(str(path), full_check=True)


def test_every_file_of_the_set_is_in_the_manifest(alpha_set: Path) -> None:
    files = {p.relative_to(alpha_set).as_posix() for p in alpha_set.rglob("*") if p.is_file()}
    assert files == {*manifest.read(alpha_set).files, "manifest.json"}


@pytest.fixture(scope="module", params=["bf16", "fp16"])
def half_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("half") / request.param
    return build.build(alpha_recipe(output, precision=request.param, max_images=1))


def test_16_bit_weights_are_half_the_bytes_and_close(half_set: Path, alpha_set: Path) -> None:
    names = {"bf16": "bfloat16", "fp16": "float16"}
    for spec in manifest.read(half_set).engines:
        assert spec.precision.requested == half_set.name
        assert spec.precision.weights == names[half_set.name]
        assert spec.precision.compute == "float32"
    data = [sum(p.stat().st_size for p in s.glob("*.data")) for s in (half_set, alpha_set)]
    assert data[0] < 0.6 * data[1]  # biases, norms and rotary tables stay
    case = load_case("case_01")
    with Generator(half_set) as generator:
        result = generator.run(**case.request(), output_type="np")
    # bfloat16 has 8 bits of mantissa; through all networks a few percent remain
    scale = float(np.abs(case.tensors["mllm.tokens_final"]).max())
    error = difference(result.tokens, case.tensors["mllm.tokens_final"])
    assert 0 < error < 0.05 * scale
    mean = np.abs(result.images.astype(int) - case.tensors["flux.image_u8"]).mean()
    assert mean < 4


def test_a_set_for_one_image_refuses_two(half_set: Path) -> None:
    with (
        Generator(half_set) as generator,
        pytest.raises(RequestError, match="built for at most 1 in one run") as refused,
    ):
        generator.run(["a", "b"], num_inference_steps=1, decoding_steps=1)
    assert "--max-images 2" in str(refused.value.hint)


def test_fp16_refuses_what_it_cannot_hold() -> None:
    import torch

    from export import lazy_tensors
    from export.precision import round_weights

    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    layer[0].weight.data[0, 0] = 1e6
    round_weights(layer, "fp16")
    with pytest.raises(ExportError, match=r"0.weight reaches 1e\+06, beyond the range of fp16"):
        lazy_tensors.load(layer)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_recipe_with_flags_on_top(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.toml"
    text = 'mllm = "m"\nbifrost = "b"\nflux = "f"\noutput = "o"\nprecision = "bf16"\n'
    path.write_text(text, encoding=encoding)
    read = recipe.read(path, {"precision": "fp16"})
    assert read.mllm == str(tmp_path / "m")
    assert read.precision == "fp16"


@pytest.mark.parametrize(
    ("own", "flags", "folder"),
    [
        ("", {}, "sets/default"),
        ("", {"precision": "fp32"}, "sets/default"),
        ("", {"precision": "fp8"}, "sets/default-fp8"),
        ("", {"precision": "bf16", "t5_max_length": 24}, "sets/default-bf16"),
        ("", {"t5_max_length": 24}, "sets/default"),
        ('precision = "fp8"', {}, "sets/default"),
        ('precision = "fp8"', {"precision": "fp8"}, "sets/default"),
        ('precision = "fp8"', {"precision": "fp32"}, "sets/default-fp32"),
        ("", {"backend": "tensorrt-rtx", "max_images": 1}, "sets/default-tensorrt-rtx"),
        (
            "",
            {"backend": "tensorrt-rtx", "max_images": 1, "precision": "fp8"},
            "sets/default-fp8-tensorrt-rtx",
        ),
        (
            'backend = "tensorrt-rtx"\nmax_images = 1',
            {"backend": "onnxruntime"},
            "sets/default-onnxruntime",
        ),
    ],
)
def test_another_precision_or_backend_has_a_folder_of_its_own(
    tmp_path: Path, own: str, flags: dict[str, object], folder: str
) -> None:
    path = tmp_path / "default.toml"
    path.write_text(f'mllm = "m"\nbifrost = "b"\nflux = "f"\noutput = "sets/default"\n{own}\n')
    assert recipe.read(path, flags).output == str(tmp_path / folder)
    named = recipe.read(path, {**flags, "output": "mine"})
    assert named.output == "mine"


def test_another_checkpoint_does_not_take_the_place_of_the_recipes_set(tmp_path: Path) -> None:
    path = tmp_path / "default.toml"
    path.write_text('mllm = "m"\nbifrost = "b"\nflux = "f"\noutput = "sets/default"\n')
    with pytest.raises(RecipeError, match="set of another checkpoint would take") as refused:
        recipe.read(path, {"flux": "my-flux"})
    assert refused.value.hint == "name its folder: --output DIR"
    assert recipe.read(path, {"flux": "my-flux", "output": "mine"}).flux == "my-flux"
    same = str(tmp_path / "x" / ".." / "f")
    assert recipe.read(path, {"flux": same}).output == str(tmp_path / "sets/default")


def test_the_default_recipes_other_precisions_stand_beside_the_default_set() -> None:
    default = recipe.read(build.DEFAULT_RECIPE, {})
    assert Path(default.output) == shipped.base(build.DEFAULT_RECIPE) / "sets" / "default"
    other = build._recipe(build._parser().parse_args(["--precision", "fp8"]))
    assert other.output == f"{default.output}-fp8"
    assert build.graphs_of(other) == other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('presicion = "fp32"', r"unknown key 'presicion' \(did you mean 'precision'\?\)"),
        ('precision = "fp31"', r"precision 'fp31' is unknown \(did you mean 'fp32'\?\)"),
        ('backend = "onnx"', r"backend 'onnx' is unknown"),
        ("t5_max_length = 0", "t5_max_length must be at least 1"),
        ('t5_max_length = "9"', "t5_max_length: expected int, found str"),
        ("t5_max_length = 1000000000000", "t5_max_length must be at most 65536"),
        ("t5_max_length = ", "not TOML"),
    ],
)
def test_a_recipe_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'mllm = "m"\nbifrost = "b"\nflux = "f"\noutput = "o"\n{text}\n')
    with pytest.raises(RecipeError, match=message):
        recipe.read(path, {})


def test_a_recipe_that_lacks_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('mllm = "m"\n')
    with pytest.raises(RecipeError, match="missing key 'bifrost'"):
        recipe.read(path, {})


def test_a_length_that_does_not_hold_the_template(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not hold the chat template"):
        build.build(alpha_recipe(tmp_path / "set", mllm_max_length=20))
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_one_line_and_a_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = build.main(["--mllm", "nowhere", "--bifrost", "b", "--flux", "f", "--output", "o"])
    assert status == 1
    assert capsys.readouterr().err == (
        "error: nowhere: no such folder\nhint: give the mllm folder of the checkpoint as --mllm\n"
    )
    assert build.main(["--mllm", "m"]) == 1
    assert "missing key 'bifrost'" in capsys.readouterr().err


def test_a_folder_that_is_no_set_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(BuildError, match="is not an engine set; it will not be overwritten"),
        atomic_output(tmp_path),
    ):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A set that was there before."""
    output = tmp_path / "set"
    output.mkdir()
    (output / "manifest.json").write_text("older")
    return output


def untouched(older: Path) -> bool:
    alone = [p.name for p in older.parent.iterdir()] == ["set"]
    return alone and (older / "manifest.json").read_text() == "older"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), RuntimeError("bug")])
def test_an_interrupted_build_leaves_the_older_set(older: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_output(older) as folder:
        (folder / "manifest.json").write_text("newer")
        raise error
    assert untouched(older)


def test_a_full_disk_is_said_and_leaves_the_older_set(older: Path) -> None:
    with pytest.raises(BuildError, match="the disk is full"), atomic_output(older) as folder:
        (folder / "a").write_text("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert untouched(older)


def test_a_write_that_fails_for_another_reason_is_said(older: Path) -> None:
    with pytest.raises(BuildError, match="cannot be built: .*Permission"), atomic_output(older):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert untouched(older)


def test_a_parent_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BuildError, match="cannot be built"), atomic_output(tmp_path / "file/set"):
        pass


def test_a_finished_build_takes_the_place_of_the_older_set(older: Path) -> None:
    with atomic_output(older) as folder:
        (folder / "manifest.json").write_text("newer")
    assert (older / "manifest.json").read_text() == "newer"
    assert [p.name for p in older.parent.iterdir()] == ["set"]


def test_what_killed_builds_left_is_cleaned_up_by_the_next(older: Path) -> None:
    (older.parent / ".set.partial").mkdir()
    (older.parent / ".set.lock").touch()
    older.rename(older.parent / ".set.previous")  # killed between two renames
    with pytest.raises(KeyboardInterrupt), atomic_output(older):
        assert older.exists()
        raise KeyboardInterrupt
    assert untouched(older)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_build_that_is_signalled_leaves_no_set(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, number: signal.Signals
) -> None:
    cache_folder = tmp_path_factory.mktemp("cache")
    output = tmp_path / "set"
    process = subprocess.Popen(
        [sys.executable, "-m", "export.build", *FLAGS, "--output", str(output)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, cache.VARIABLE: str(cache_folder)},  # tracing takes seconds
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore Ctrl-C, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    def one_engine_is_written() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return bool(list(tmp_path.glob(".set.partial/*.onnx")))

    until(one_engine_is_written)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err == f"{build.CONTINUES}\n"
    assert not output.exists()
    assert len(list(tmp_path.iterdir())) <= 1  # what was finished, where anything was


def test_tokenizers_of_other_dialects_give_the_same_ids(tmp_path: Path) -> None:
    """Vocabulary and merges alone, merges as strings, a tokenizer.json with padding of its own, the
    template in a file of its own."""
    from bifrost_rt.tokenizers import Tokenizers
    from export import tokenizer_files
    from export.checkpoint import Checkpoint

    for name in ("mllm", "bifrost", "flux"):
        shutil.copytree(ALPHA / name, tmp_path / name)
    path = tmp_path / "mllm" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    document["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 600,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    document["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(document))
    template = tmp_path / "mllm" / "chat_template.json"
    (tmp_path / "mllm" / "chat_template.jinja").write_text(
        json.loads(template.read_text())["chat_template"]
    )
    template.unlink()
    (tmp_path / "flux" / "tokenizer_2" / "tokenizer.json").unlink()  # leaves spiece.model
    checkpoint = Checkpoint(*(tmp_path / name for name in ("mllm", "bifrost", "flux")))
    (tmp_path / "set").mkdir()
    facts = tokenizer_files.write(checkpoint, tmp_path / "set", 48, 32)
    tokenizers = Tokenizers(tmp_path / "set", facts)
    for case in json.loads((ALPHA / "tokenizer_cases.json").read_text()):
        assert tokenizers.mllm_raw(case["text"]) == case["qwen"]
        assert tokenizers.clip([case["text"]]).tolist() == [case["clip77"]]
        assert tokenizers.t5([case["text"]]).tolist() == [case["t5"]]
    golden = load_case("case_06")
    assert (
        tokenizers.mllm_prompt(golden.facts["prompts"][0])
        == golden.tensors["mllm.text_ids.1"].tolist()
    )
