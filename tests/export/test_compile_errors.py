"""What goes wrong while compiling, and with compiled engines: one error that says where and what to
do, and sets on disk stay as they were. Library, parser and builder are the real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onnx import load, save

from bifrost_rt import Generator, manifest, memory_plan, opened
from bifrost_rt.backends import gpu
from bifrost_rt.backends.tensorrt import TensorRtRtx
from bifrost_rt.errors import BackendError, IntegrityError
from export import build, build_lock
from export.compile import __main__ as command
from export.compile import builder as builders
from export.compile import error as errors
from export.compile import graphs
from export.compile.compiled_set import compile_set
from export.compile.profiles import Sizes
from export.engine_set import hidden
from export.errors import BuildError, CompileError
from tests.conftest import alpha_recipe
from tests.export.conftest import TARGETS, content, holding, rewritten
from tests.tensorrt_double import HostDevice

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.fixture
def older(compiled: Path, tmp_path: Path) -> Path:
    """A compiled set, where the next one would go."""
    return Path(shutil.copytree(compiled, tmp_path / "sets" / "older"))


@pytest.fixture
def source(small_set: Path, tmp_path: Path) -> Path:
    """A set to break."""
    return Path(shutil.copytree(small_set, tmp_path / "sets" / "source"))


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """A set stays byte for byte, and so does all that is beside it, hidden or not."""
    before = content(folder.parent)
    yield
    assert content(folder.parent) == before
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def on(architecture: str = "sm89", version: str | None = None) -> TensorRtRtx:
    """The backend with the real library on a GPU that is not there."""
    import tensorrt_rtx

    from bifrost_rt.backends.tensorrt_log import logger

    library = SimpleNamespace(
        __version__=version or tensorrt_rtx.__version__,
        Runtime=tensorrt_rtx.Runtime,
        logger=logger("tensorrt_rtx"),
    )
    return TensorRtRtx(library, HostDevice(), architecture)


def test_a_truncated_engine_is_refused_by_hash_and_by_the_library(older: Path) -> None:
    path = older / "t5_text.engine"
    path.write_bytes(path.read_bytes()[:100_000])
    with untouched(older):
        with pytest.raises(IntegrityError, match=r"t5_text\.engine: expected \d+ bytes, found 100"):
            Generator(older)
        facts = manifest.read(older)
        with pytest.raises(BackendError, match=r"cannot load this engine: .*plan\.header") as error:
            on().open(older, facts.engine("t5_text"), facts.dimensions)
    assert "python -m export.compile" in str(error.value.hint)


def test_a_foreign_file_in_an_engines_place(older: Path) -> None:
    (older / "clip_text.engine").write_bytes(b"GIF89a" * 1000)
    with untouched(older), pytest.raises(IntegrityError, match=r"clip_text\.engine"):
        Generator(older)
    rewritten(older, lambda m: m)  # whoever put it there sealed the set again
    with untouched(older), pytest.raises(BackendError, match=r"clip_text\.engine: .*magic") as told:
        Generator(older, backend=on())
    assert "python -m export.compile" in str(told.value.hint)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ({"version": "1.6.0.1"}, r"was compiled by tensorrt-rtx 1\.\S+, this is 1\.6\.0\.1"),
        ({"architecture": "sm86"}, "was compiled for sm89, sm120, this GPU is sm86"),
    ],
)
def test_a_set_of_another_version_or_for_another_gpu_is_refused_at_load_with_the_command(
    older: Path, backend: dict[str, str], message: str
) -> None:
    with untouched(older), pytest.raises(BackendError, match=message) as error:
        Generator(older, backend=on(**backend))
    assert error.value.message.startswith(str(older))
    target = backend.get("architecture", "sm89")
    assert error.value.hint == (
        f"python -m export.compile ONNX_SET --backend tensorrt-rtx --target {target} --output DIR"
    )


def test_tensorrt_compiles_on_its_device_alone(small_set: Path, older: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with (
        untouched(older),
        pytest.raises(CompileError, match=r"TensorRT is not installed .*`tensorrt`") as error,
    ):
        compile_set(small_set, older, backend="tensorrt", max_images=1)
    assert error.value.hint == "pip install 'bifrost-rt[tensorrt]'"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("raise ImportError('libtensorrt_rtx.so.1: cannot open shared object file')", "libtensor"),
        ("", "module 'tensorrt_rtx' has no attribute '__version__'"),
    ],
)
def test_a_runtime_library_that_is_not_there(
    small_set: Path,
    older: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str,
    message: str,
) -> None:
    """The package is installed and what it loads is gone, or something else has its name."""
    package = tmp_path / "packages" / "tensorrt_rtx.py"
    package.parent.mkdir()
    package.write_text(content)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    with (
        untouched(older),
        pytest.raises(CompileError, match=f"TensorRT-RTX .* cannot be loaded: {message}") as error,
    ):
        compile_set(small_set, older, targets=TARGETS, max_images=1)
    assert "pip install --force-reinstall 'bifrost-rt[tensorrt-rtx]'" in str(error.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("sm89",)}, "any number of images in one run"),
        ({"targets": ("h200",), "max_images": 1}, "does not compile for sm90"),
        ({"targets": ("rtx-2080",), "max_images": 1}, "does not compile for sm75"),
        ({"targets": ("rtx-9999",), "max_images": 1}, "target 'rtx-9999' is unknown"),
        ({"targets": ("sm89",), "max_images": 2**31}, "`images` up to 2147483648: an engine's"),
    ],
)
def test_refusals_come_before_the_build_and_leave_the_old_set(
    small_set: Path,
    older: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(builders, "compile_graph", None)  # would fail in another way
    with untouched(older), pytest.raises(CompileError, match=message):
        compile_set(small_set, older, **options)


def test_the_builder_has_no_float32_products_for_turing(small_set: Path) -> None:
    """Every set keeps some in float32, so the table leaves Turing to TensorRT."""
    spec, builder = manifest.read(small_set).engine("t5_text"), builders.find("tensorrt-rtx")
    graph, sizes = graphs.read(small_set / spec.graph, spec.name), Sizes({"prompts": (1, 1)})
    with pytest.raises(
        CompileError, match=r"`t5_text`, layer `node_\w+`: .*FP32 GEMM is not supported"
    ):
        builders.compile_graph(builder, graph, spec, sizes, ("sm75",))


def test_a_type_that_the_target_lacks(source: Path, older: Path) -> None:
    rewritten(source, lambda m: holding(m, weights="float8_e4m3fn"))
    targets = ("sm89", "rtx-3090")
    with (
        untouched(older),
        pytest.raises(CompileError, match=r"sm86 \(Ampere.*\) has no fp8 arithmetic"),
    ):
        compile_set(source, older, targets=targets, max_images=1)


def test_what_the_other_weights_are_in_is_asked_before_the_graphs_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Turing card has int8 and no bf16, which the rest of an int8 set is in."""
    tensorrt = builders.Builder("tensorrt", "TensorRT", "tensorrt_rtx", "10")
    monkeypatch.setattr(builders, "find", lambda name: tensorrt)
    recipe = alpha_recipe(
        tmp_path / "set", precision="int8", backend="tensorrt", target=("rtx-2080",), max_images=1
    )
    with pytest.raises(CompileError, match="sm75 .* has no bf16 arithmetic") as error:
        build.build(recipe)
    assert "--fallback fp16" in str(error.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_no_target_means_this_machines_gpu(small_set: Path, older: Path) -> None:
    if not isinstance(gpu.find(), str):
        pytest.skip("this machine has one")
    with untouched(older), pytest.raises(CompileError, match="for which GPU"):
        compile_set(small_set, older, max_images=1)


def test_neither_its_own_source_nor_a_compiled_set(source: Path, compiled: Path) -> None:
    with untouched(source):
        with pytest.raises(CompileError, match="would replace the set"):
            compile_set(source, source, targets=TARGETS, max_images=1)
        with pytest.raises(CompileError, match="was built for tensorrt-rtx"):
            compile_set(compiled, source, targets=TARGETS, max_images=1)


def test_neither_around_nor_inside_of_its_source(source: Path, older: Path) -> None:
    inner = Path(shutil.copytree(source, older / "onnx"))
    with untouched(older):
        for read, output in ((inner, older), (source, source / "rtx")):
            with pytest.raises(CompileError, match="around or inside of the set") as error:
                compile_set(read, output, targets=TARGETS, max_images=1)
            assert f"--output {read}-compiled" in str(error.value.hint)


def test_a_folder_that_is_no_set_is_refused_before_anything_is_measured(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "home" / "theses"
    output.mkdir(parents=True)
    (output / "mine.txt").write_text("years of work")
    monkeypatch.setattr(errors, "measure", None)  # would fail in another way
    with untouched(output), pytest.raises(BuildError, match="theses: exists and is not an engine"):
        compile_set(small_set, output, targets=TARGETS, max_images=1, compute="bf16", measure=True)


@pytest.mark.parametrize("name", ["t5_text.onnx", "clip_text.data"])
def test_a_source_that_is_damaged(source: Path, older: Path, name: str) -> None:
    path = source / name
    path.write_bytes(path.read_bytes()[:-1])
    with untouched(older), pytest.raises(IntegrityError, match=rf"{name}: expected \d+ bytes"):
        compile_set(source, older, targets=TARGETS, max_images=1)


def test_a_set_that_is_being_compiled_is_refused_before_a_file_is_read(
    small_set: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opened, "verify", None)  # would fail in another way
    with (
        untouched(older),
        build_lock.alone(older, hidden(older, "lock")),
        pytest.raises(BuildError, match="another build of this set is running"),
    ):
        compile_set(small_set, older, targets=TARGETS, max_images=1)


def break_graph(folder: Path, kind: str) -> None:
    path, data = folder / "t5_text.onnx", folder / "t5_text.data"
    if kind == "foreign":
        path.write_bytes(b"not a graph")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "weights":
        data.write_bytes(data.read_bytes()[:-1000])
    else:
        model = load(path, load_external_data=False)
        if kind == "operator":
            model.graph.node[0].op_type = "Unheard"
        elif kind == "door":
            model.graph.output[0].name = model.graph.node[-1].output[0] = "embeds"
        elif kind == "outside":
            shutil.copyfile(data, folder.parent / "outside.data")
            entries = (e for tensor in model.graph.initializer for e in tensor.external_data)
            for entry in entries:
                entry.value = "../outside.data" if entry.key == "location" else entry.value
        save(model, path)


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("foreign", r"engine `t5_text`: t5_text\.onnx is not an ONNX graph", "export.build"),
        ("truncated", r"engine `t5_text`: t5_text\.onnx is not an ONNX graph", "export.build"),
        ("empty", r"engine `t5_text`: the graph's inputs are \[\], the manifest's", "export.build"),
        ("weights", r"engine `t5_text`: the weight \S+ ends at byte \d+ of t5_", "export.build"),
        ("outside", r"lies outside of the set, in .*outside\.data", "export.build"),
        ("operator", r"engine `t5_text`, layer `.+` \(Unheard\): ", "does not know the operator"),
        ("door", r"engine `t5_text`: the graph's outputs are \['embeds'\]", "export.build"),
    ],
)
def test_a_broken_graph_names_stage_and_layer_and_leaves_the_old_set(
    source: Path, older: Path, kind: str, message: str, hint: str
) -> None:
    """Sealed again, so that no hash finds it."""
    break_graph(source, kind)
    rewritten(source, lambda m: m)
    with untouched(older), pytest.raises(CompileError, match=message) as error:
        compile_set(source, older, targets=("sm89",), max_images=1)
    assert hint in str(error.value.hint)
    assert "catchCudaError" not in error.value.message


def test_memory_that_is_not_there(
    small_set: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "available", lambda: 1000)
    with (
        untouched(older),
        pytest.raises(CompileError, match=r"`clip_text`: compiling its weights .* GiB") as error,
    ):
        compile_set(small_set, older, targets=("sm89",), max_images=1)
    assert "--weights bound" in str(error.value.hint)


def test_a_run_that_no_engine_can_address(
    small_set: Path, older: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The builder refuses, after it has compiled another engine of the set."""
    arguments = [str(small_set), "--output", str(older), "--target", "sm89", "--compute", "bf16"]
    with untouched(older):
        assert command.main([*arguments, "--max-images", str(10**9)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: engine `t5_text`: TensorRT-RTX cannot compile it: ")
    assert said.count("\n") == 2
    assert "lower --max-images" in said


def test_a_builder_out_of_memory(alpha_set: Path, older: Path, tmp_path: Path) -> None:
    """More images at once than any machine holds; one engine was compiled before."""
    source = Path(shutil.copytree(alpha_set, tmp_path / "source"))
    two = ("clip_text", "vae_decode")
    engines = tuple(manifest.read(source).engine(name) for name in two)
    rewritten(source, lambda m: dataclasses.replace(m, engines=engines))
    with (
        untouched(older),
        pytest.raises(CompileError, match="`vae_decode`: .* cannot compile.*OutOfMemory") as error,
    ):
        compile_set(source, older, targets=("sm89",), max_images=1_215_752_191)
    assert "free memory" in str(error.value.hint)
    assert "lower --max-images" in str(error.value.hint)


def test_memory_that_ends_while_a_graph_is_prepared(
    small_set: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_left(*_: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")  # as mmap says it

    monkeypatch.setattr(graphs, "_bytes", nothing_left)
    with (
        untouched(older),
        pytest.raises(CompileError, match="engine `clip_text`: .* Cannot allocate") as error,
    ):
        compile_set(small_set, older, targets=("sm89",), max_images=1)
    assert "free memory" in str(error.value.hint)


def test_a_disk_that_fails_is_not_taken_for_memory(
    small_set: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(graphs, "_bytes", unreadable)
    with untouched(older), pytest.raises(BuildError, match="Input/output error"):
        compile_set(small_set, older, targets=("sm89",), max_images=1)
