"""What the runtime needs, and what importing it costs. `test_wheel.py` has the wheel itself."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "diffusers", "onnx")
# The wheel's dependencies, what they need themselves, and one backend.
BARE = (
    *("numpy", "numpy.libs", "PIL", "pillow.libs", "tokenizers", "ftfy", "wcwidth", "safetensors"),
    *("onnxruntime", "flatbuffers", "google", "packaging"),
)

LIGHT = {"bifrost_rt", "numpy", "PIL", "tokenizers"}  # what importing it takes

MEASURE = """
import json, sys
import bifrost_rt
# not getrusage, whose peak is inherited from the parent process across exec
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) / 1024
print(json.dumps({"mebibytes": peak, "modules": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as a fresh `pip install bifrost-rt[cpu]` makes it: the real ones, and
    nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    installed = Path(str(metadata.distribution("numpy").locate_file("")))
    for name in BARE:
        if (installed / name).exists():
            (folder / name).symlink_to(installed / name)
    (folder / "bifrost_rt").symlink_to(ROOT / "bifrost_rt")
    return folder


def run_bare(bare: Path, *code: str) -> subprocess.CompletedProcess[str]:
    """Isolated from the environment and from the site-packages of this one."""
    path = f"import sys; sys.path.insert(0, {str(bare)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", path + code[0], *code[1:]],
        capture_output=True,
        text=True,
        cwd=bare,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_import_is_light(bare: Path) -> None:
    done = run_bare(bare, MEASURE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mebibytes"] < 80
    top_level = {name.partition(".")[0] for name in found["modules"]}
    # what takes long to import: the backend waits until it is asked for
    assert top_level - sys.stdlib_module_names - {"__main__"} == LIGHT


def test_an_image_needs_nothing_but_the_wheels_dependencies(
    bare: Path, alpha_set: Path, tmp_path: Path
) -> None:
    code = """
import sys
import bifrost_rt
with bifrost_rt.Generator(sys.argv[1]) as generator:
    generator.run("a red circle", seed=1, num_inference_steps=1).save(sys.argv[2])
print(sorted(set(sys.modules) & {"torch", "transformers", "diffusers", "onnx"}))
"""
    done = run_bare(bare, code, str(alpha_set), str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_missing_backend_says_how_to_get_it(bare: Path, alpha_set: Path) -> None:
    folder = bare.parent / "no_backend"
    folder.mkdir(exist_ok=True)
    for link in bare.iterdir():
        target = folder / link.name
        if link.name != "onnxruntime" and not target.exists():
            target.symlink_to(link.resolve())
    done = run_bare(
        folder,
        "import sys\nfrom bifrost_rt.cli import main\n"
        "raise SystemExit(main(['generate', 'a', '--engines', sys.argv[1]]))",
        str(alpha_set),
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: backend 'onnxruntime' is not available: the Python package `onnxruntime` is not "
        "installed\nhint: pip install 'bifrost-rt[cpu]'\n"
    )


def test_the_runtime_never_imports_what_export_needs() -> None:
    for path in (ROOT / "bifrost_rt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                assert name.partition(".")[0] not in (*HEAVY, "export", "benchmarks"), path


def test_public_names_are_frozen() -> None:
    import bifrost_rt

    assert bifrost_rt.__all__ == [
        "BackendError",
        "BifrostError",
        "BudgetError",
        "ChatResult",
        "EngineInputError",
        "EngineSetError",
        "Generator",
        "GeneratorStateError",
        "IntegrityError",
        "NumericsError",
        "RequestError",
        "RequestTypeError",
        "Result",
        "TextFileError",
        "__version__",
    ]
    assert bifrost_rt.__version__ == metadata.version("bifrost-rt")
