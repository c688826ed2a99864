"""The wheel in empty environments, without a checkout: it draws, it builds, it compiles.

An environment holds the wheel and what its extras ask for. These packages are linked from where
they are installed here, because torch alone would take minutes and a registry; pip resolves the
extras without an index, so a package that an extra forgets is missing as it would be for a user.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bifrost_rt import Generator, manifest
from bifrost_rt.errors import IntegrityError
from tests.conftest import ALPHA
from tools import wheel as wheels

ROOT = Path(__file__).parents[2]
FLAGS = [
    *(part for name in ("mllm", "bifrost", "flux") for part in (f"--{name}", str(ALPHA / name))),
    *("--mllm-max-length", "48", "--t5-max-length", "32"),
]


class Environment:
    """A Python of its own, with the wheel and some of its extras, seen from an empty folder."""

    def __init__(self, folder: Path, wheel: Path, extras: str) -> None:
        venv.create(folder / "venv")
        self.bin = folder / "venv" / "bin"
        self.cwd = folder / "cwd"
        self.cwd.mkdir()
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "venv" / "lib" / version / "site-packages"
        (about,) = metadata.distributions(path=[str(wheel)])
        for distribution in required(about, extras.split(",")):
            link(distribution, site)
        # no index, no settings of this machine: what is not linked is not found
        here = [sys.executable, "-m", "pip", "--isolated", "--python", str(self.bin / "python")]
        done = self._run([*here, "install", "--no-index", "--quiet", f"{wheel}[{extras}]"])
        assert done.returncode == 0, done.stderr

    def run(self, command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        program, *rest = command.split()
        return self._run([str(self.bin / program), *rest, *map(str, arguments)])

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment["PIP_CONFIG_FILE"] = os.devnull
        return subprocess.run(
            command, cwd=self.cwd, env=environment, capture_output=True, text=True, timeout=600
        )


def required(
    about: metadata.Distribution, extras: Iterable[str]
) -> Iterable[metadata.Distribution]:
    """Every distribution that a distribution's extras bring, as it is installed here."""
    seen: set[tuple[str, str]] = set()
    todo = [(about, extra) for extra in ("", *extras)]
    while todo:
        distribution, extra = todo.pop()
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            name = canonicalize_name(requirement.name)
            for own in {(name, extra) for extra in ("", *requirement.extras)} - seen:
                seen.add(own)
                todo.append((metadata.distribution(name), own[1]))
    return [metadata.distribution(name) for name in {name for name, _ in seen}]


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Let a distribution be found in `site`: its packages, and that it is installed."""
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def wheel(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make wheel` builds it, with the golden checkpoint's set in the demo model's place."""
    return wheels.build(tmp_path_factory.mktemp("wheel"), alpha_set, isolated=False)


@pytest.fixture(scope="module")
def environment(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Environment]:
    made: dict[str, Environment] = {}

    def of(extras: str) -> Environment:
        if extras not in made:
            made[extras] = Environment(tmp_path_factory.mktemp("environment"), wheel, extras)
        return made[extras]

    return of


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder.parent)) for p in found if "__pycache__" not in p.parts}


def test_the_wheel_is_bifrost_rt_and_export_and_nothing_else(wheel: Path, alpha_set: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    of_the_set = (*manifest.read(alpha_set).files, manifest.FILENAME)
    demo = {f"bifrost_rt/demo/{file}" for file in of_the_set}
    assert names == files(ROOT / "bifrost_rt") | files(ROOT / "export") | demo


def test_without_an_extra_it_needs_five_packages(wheel: Path) -> None:
    (about,) = metadata.distributions(path=[str(wheel)])
    requires = map(Requirement, about.requires or ())
    always = {requirement.name for requirement in requires if requirement.marker is None}
    assert always == {"numpy", "pillow", "tokenizers", "ftfy", "safetensors"}


def test_it_draws_at_once(
    environment: Callable[[str], Environment], generator: Generator, tmp_path: Path
) -> None:
    cpu = environment("cpu")
    image = tmp_path / "a.png"
    drawn = cpu.run("bifrost-rt generate", "a red circle", "--seed", 1, "--steps", 2, "-o", image)
    assert drawn.returncode == 0, drawn.stderr
    expected = generator.run("a red circle", seed=1, num_inference_steps=2)
    (saved,) = expected.save(tmp_path / "b.png")
    assert image.read_bytes() == saved.read_bytes()
    assert cpu.run("python -c", "import torch").returncode == 1


def test_a_set_of_the_current_folder_comes_before_the_wheels(
    environment: Callable[[str], Environment], alpha_set: Path
) -> None:
    cpu = environment("cpu")
    code = (
        "import logging; from bifrost_rt import generator\n"
        "logging.basicConfig(level='INFO', format='%(message)s')\n"
        "generator.default_set()"
    )
    assert cpu.run("python -c", code).stderr.endswith("site-packages/bifrost_rt/demo\n")
    own = cpu.cwd / "engines" / "sets" / "default"
    own.parent.mkdir(parents=True)
    own.symlink_to(alpha_set)
    said = cpu.run("python -c", code).stderr
    own.unlink()
    assert said == f"default engine set: {own}\n"


def test_it_builds_a_checkpoint(environment: Callable[[str], Environment], alpha_set: Path) -> None:
    export = environment("export")
    built = export.run("python -m export.build", *FLAGS, "--output", "set")
    assert built.returncode == 0, built.stderr
    assert built.stdout == "set\n"
    ours, theirs = manifest.read(alpha_set), manifest.read(export.cwd / "set")
    for engine in ours.engines:
        for name in engine.files:
            assert theirs.files[name] == ours.files[name], name
    planned = export.run("bifrost-rt plan", "--engines", "set", "--device", "rtx-4090")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("GeForce RTX 4090")
    made = export.run("python -m export.synthesize", "--output", "checkpoint")
    assert made.returncode == 0, made.stderr


def test_it_compiles_a_set(environment: Callable[[str], Environment], alpha_set: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    device = environment("compile,tensorrt-rtx")
    compiled = device.run(
        *("python -m export.compile", alpha_set, "--output", "compiled"),
        *("--target", "sm89", "--max-images", 1),
    )
    assert compiled.returncode == 0, compiled.stderr
    assert manifest.read(device.cwd / "compiled").backend == "tensorrt-rtx"
    measured = device.run(
        *("python -m export.compile", alpha_set, "--output", "measured", "--measure"),
        *("--target", "sm89", "--max-images", 1, "--compute", "fp16"),
    )
    assert measured.stderr == (
        "error: the Python package `torch` is not installed\n"
        "hint: pip install 'bifrost-rt[export]'\n"
    )
    assert device.run("python -c", "import torch").returncode == 1


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["python -m export.build", *FLAGS, "--output", "a"], "torch", "export"),
        (["python -m export.synthesize", "--output", "a"], "torch", "export"),
        (["python -m export.plan", "--like", "7b", "--device", "rtx-4090"], "onnx_ir", "export"),
        (["bifrost-rt plan", "--like", "7b", "--device", "rtx-4090"], "onnx_ir", "export"),
        (["python -m export.compile", "a", "--output", "b"], "onnx_ir", "compile"),
    ],
    ids=lambda value: value[0].split()[-1] if isinstance(value, list) else value,
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    environment: Callable[[str], Environment], command: list[str], package: str, extra: str
) -> None:
    done = environment("cpu").run(command[0], *command[1:])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: the Python package `{package}` is not installed\n"
        f"hint: pip install 'bifrost-rt[{extra}]'\n"
    )


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -m export.build", "it is in a checkout of the source, not in the wheel\nhint: to"),
        ("python -m export.build rtx-4090-fp8", "FLUX.1-dev\nhint: put the folders there, or name"),
        ("bifrost-rt bench", "which the wheel does not carry\nhint: run it from a checkout"),
    ],
)
def test_what_is_not_in_the_wheel_is_said(
    environment: Callable[[str], Environment], command: str, said: str
) -> None:
    done = environment("cpu").run(command)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.parametrize("module", ["build", "compile", "plan", "synthesize"])
def test_help_needs_no_extra(environment: Callable[[str], Environment], module: str) -> None:
    done = environment("cpu").run(f"python -m export.{module} --help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m export.{module}")


def test_a_damaged_set_does_not_get_into_a_wheel(alpha_set: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "set"
    for name in manifest.read(alpha_set).files:
        (damaged / name).parent.mkdir(parents=True, exist_ok=True)
        (damaged / name).write_bytes((alpha_set / name).read_bytes())
    (damaged / "manifest.json").write_bytes((alpha_set / "manifest.json").read_bytes())
    with (damaged / "selftest.png").open("ab") as file:
        file.write(b"x")
    with pytest.raises(IntegrityError):
        wheels.build(tmp_path / "wheel", damaged)
    assert not (tmp_path / "wheel").exists()


def test_a_wheel_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "MOST", 100_000)
    with pytest.raises(wheels.WheelError, match=r"bifrost_rt-.*\.whl: 0\.\d MB, more than 0 MB"):
        wheels.build(tmp_path / "wheel", isolated=False)
    assert not (tmp_path / "wheel").exists()
