"""Build the wheel, with a built set inside or without.

    python tools/wheel.py [--demo SET] [--output DIR]

It is built from a copy of what belongs to it: nothing of earlier builds gets in, and a checkout
never holds the set where an installed package does.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bifrost_rt import command, manifest, opened
from bifrost_rt.errors import BifrostError
from bifrost_rt.generator import SHIPPED_SET

CHECKOUT = Path(__file__).parents[1]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "bifrost_rt", "export")
MOST = 25_000_000  # bytes that a package index and its users take gladly


class WheelError(BifrostError):
    """The wheel could not be built, or is too large."""


def build(output: Path, demo: Path | None = None, *, isolated: bool = True) -> Path:
    """Build the wheel and return its file.

    Args:
        output: the folder that it is written to.
        demo: the set that `Generator()` shall open where there is no other.
        isolated: let pip fetch the build's own requirements; else they are installed here.

    Raises:
        EngineSetError: the set is missing, foreign or damaged.
        WheelError: pip failed, or the wheel is larger than `MOST`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        for name in PARTS:
            _copy(CHECKOUT / name, source / name)
        if demo is not None:
            _copy_set(demo, source / SHIPPED_SET.relative_to(SHIPPED_SET.parents[1]))
        wheel = _pip_wheel(source, Path(temporary) / "wheel", isolated)
        if wheel.stat().st_size > MOST:
            raise WheelError(
                f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, more than {MOST / 1e6:.0f} MB",
                hint="put a smaller set into it",
            )
        output.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, output))


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)


def _copy_set(folder: Path, target: Path) -> None:
    """Return the files that the manifest lists, whole, and nothing else that lies there."""
    facts = manifest.read(folder)
    opened.verify(folder, facts)
    for name in (manifest.FILENAME, *facts.files):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def _pip_wheel(source: Path, folder: Path, isolated: bool) -> Path:
    options = ["--no-deps", "--quiet", *([] if isolated else ["--no-build-isolation"])]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(source), *options, "--wheel-dir", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise WheelError(f"pip wheel failed:\n{done.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build the wheel.")
    parser.add_argument("--demo", type=Path, metavar="SET", help="a built set to put inside")
    parser.add_argument("--output", type=Path, default=Path("dist"), metavar="DIR", help="dist")
    options = parser.parse_args()

    def built() -> int:
        wheel = build(options.output, options.demo)
        print(f"{wheel.stat().st_size / 1e6:.1f} MB", file=sys.stderr)
        print(wheel)
        return 0

    return command.run(built, debug=False)


if __name__ == "__main__":
    raise SystemExit(main())
