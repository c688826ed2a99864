"""Virtual environments of peers: made once, in the cache folder, with pinned versions."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bifrost_rt import cache
from bifrost_rt.errors import BackendError
from bifrost_rt.files import atomic_write

DONE = "requirements.txt"  # written when everything is installed
SHOWN = 1500  # characters of pip's complaint


@dataclass(frozen=True)
class Environment:
    """What a peer needs.

    Attributes:
        requirements: for pip, each with its version.
        variables: of the process that builds them.
    """

    name: str
    requirements: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where it lies: another set of requirements is another folder."""
        text = "\n".join((*self.requirements, *(f"{k}={v}" for k, v in self.variables.items())))
        text += sys.version
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cache.folder() / "peers" / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def make(self) -> Path:
        """Return its interpreter, after installing what is not there yet.

        Raises:
            BackendError: pip could not; with its last words.
        """
        done = self.folder / DONE
        if done.exists():
            return self.python
        shutil.rmtree(self.folder, ignore_errors=True)  # an installation that was cut off
        print(f"installing {self.name} into {self.folder}", file=sys.stderr)
        venv.create(self.folder, with_pip=True)
        install = [str(self.python), "-m", "pip", "install", "--quiet"]
        if self.variables:  # a wheel that was built without them may lie in pip's cache
            install.append("--no-cache-dir")
        found = subprocess.run(
            [*install, *self.requirements],
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode:
            raise BackendError(
                f"{self.name}: pip cannot install {', '.join(self.requirements)}: "
                f"{found.stderr[-SHOWN:].strip()}",
                hint="peers come from PyPI; those without a wheel need a C++ compiler and cmake",
            )
        with atomic_write(done) as aside:
            aside.write_text("\n".join(self.requirements) + "\n")
        return self.python
