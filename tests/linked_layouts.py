"""Sets whose files are links, as people have them. Each takes a set and an empty folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from bifrost_rt import manifest

Layout = Callable[[Path, Path], Path]


def as_a_hub(source: Path, out: Path) -> Path:
    """Every file is a link to one that is named by its hash."""
    snapshot, blobs = out / "models--org--set/snapshots/0123abcd", out / "models--org--set/blobs"
    blobs.mkdir(parents=True)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        target, blob = snapshot / file.relative_to(source), blobs / manifest.sha256(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        target.symlink_to(os.path.relpath(blob, target.parent))
    return snapshot


def over_two_disks(source: Path, out: Path) -> Path:
    """Weights are links to a folder elsewhere, one of them under another name."""
    folder, disk = Path(shutil.copytree(source, out / "set")), out / "disk"
    disk.mkdir()
    for i, path in enumerate(sorted(folder.glob("*.data"))):
        moved = disk / (path.name if i else "weights.bin")
        shutil.move(path, moved)
        path.symlink_to(moved)
    return folder


def with_linked_graphs(source: Path, out: Path) -> Path:
    """The graphs are elsewhere, and the folder is itself behind a link."""
    folder, disk = Path(shutil.copytree(source, out / "real")), out / "graphs"
    disk.mkdir()
    for path in sorted(folder.glob("*.onnx")):
        shutil.move(path, disk / path.name)
        path.symlink_to(disk / path.name)
    (out / "set").symlink_to(folder)
    return out / "set"


LAYOUTS = [as_a_hub, over_two_disks, with_linked_graphs]
