"""Builds continue: an engine that is finished is not built again while nothing that decides its
bytes has changed.

The record of every finished engine stands in `report.json`, of a set and of a build that was cut
off alike: the key of what it was made from, and the hash of each of its files. A file whose hash
does not fit is not used.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bifrost_rt
from bifrost_rt import dims
from bifrost_rt import manifest as manifests
from bifrost_rt.files import atomic_write
from bifrost_rt.manifest import File
from export import fingerprint, lazy_tensors
from export.stages import Stage

REPORT = "report.json"
# Parts of this package that have no say in what a graph holds.
ELSEWHERE = ("compile", "planning", "synthetic")


@dataclasses.dataclass(frozen=True)
class Finished:
    """One engine's record.

    Attributes:
        key: of what it was made from.
        files: names, the graph's first, with their hashes.
        facts: what its maker wants to know again, and what the report says of it.
    """

    key: str
    files: dict[str, File]
    facts: dict[str, Any]


def key(
    stage: Stage,
    configs: str,
    fallback: str,
    counted: Mapping[str, int],
    before: Mapping[str, str] | None = None,
) -> str:
    """Return what changes with everything that decides the bytes of a stage's engine.

    Args:
        stage: its tensors' sources say what was rounded and quantized, and how.
        configs: of the checkpoint, `configs_digest`.
        fallback: the precision in which tensors are stored that have none of their own.
        counted: the sizes for which scratch memory is stated.
        before: as `SharedWeights.before` gives it.
    """
    doors = [*stage.inputs, *stage.outputs]
    facts = {
        "stage": stage.name,
        "doors": [str(door) for door in doors],
        "state": [dataclasses.astuple(state) for state in stage.state],
        "tensors": {name: s.identity for name, s in lazy_tensors.named(stage.module).items()},
        "configs": configs,
        "fallback": fallback,
        "modules": str(stage.module),
        "counted": {name: counted[name] for name in sorted(dims.used_by(stage.outline()))},
        "before": before or {},
        **surroundings(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def surroundings() -> dict[str, Any]:
    """Return what decides the bytes of everything that is built: this package's code, and what it
    runs on."""
    return {"code": code_digest(), **fingerprint.libraries()}


def configs_digest(*checkpoints: Path) -> str:
    """Of the files that say what a checkpoint's networks compute."""
    digest = hashlib.sha256()
    for folder in checkpoints:
        for path in sorted((folder / "config.json", *folder.glob("*/config.json"))):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def code_digest() -> str:
    """Of this package's own code."""
    here = Path(__file__).parent
    files = [p for p in here.rglob("*.py") if p.relative_to(here).parts[0] not in ELSEWHERE]
    files += [Path(bifrost_rt.__file__).parent / name for name in ("dims.py", "manifest.py")]
    return fingerprint.digest_of(files, here.parent)


class StageCache:
    """The engines of one build, those that are finished and those that will be.

    Args:
        folder: where the set is built. What an earlier build left there is kept where it is whole,
            and deleted where it is not.
        older: a set whose engines are used where they are what would be built.
        keep: further files of an earlier build that stay.
    """

    def __init__(self, folder: Path, older: Path | None = None, keep: Sequence[str] = ()) -> None:
        self._folder = folder
        self._places = [folder] if older is None else [folder, older]
        self._known = {place: read(place) for place in self._places}
        self._done: dict[str, Finished] = {}
        kept = {name for record in self._known[folder].values() for name in record.files}
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (*kept, *keep, REPORT):
                path.unlink()

    @property
    def bytes_there(self) -> int:
        """Of what an earlier build has left."""
        return sum(path.stat().st_size for path in self._folder.iterdir())

    @property
    def files(self) -> dict[str, File]:
        """Of all engines that are done, by name."""
        return {name: file for r in self._done.values() for name, file in r.files.items()}

    def get(self, stage: str, key: str) -> Finished | None:
        """Return the engine of a stage, if there is one of this key whose files are whole. It is in
        the build's folder then; otherwise nothing of it is."""
        for place in self._places:
            record = self._known[place].get(stage)
            if record is not None and record.key == key and self._take(record, place):
                self._note(stage, record)
                return record
        stale = self._known[self._folder].pop(stage, None)
        for name in stale.files if stale else ():
            # never written over: it may be one file with the older set's
            (self._folder / Path(name).name).unlink(missing_ok=True)
        return None

    def put(self, stage: str, key: str, files: Sequence[Path], facts: dict[str, Any]) -> Finished:
        """Return an engine that was just written to the build's folder."""
        hashed = {f.name: File(f.stat().st_size, manifests.sha256(f)) for f in files}
        record = Finished(key, hashed, facts)
        self._note(stage, record)
        return record

    def report(self) -> dict[str, dict[str, Any]]:
        """Return the records, as `report.json` has them under "engines"."""
        return _as_report(self._done)

    def _note(self, stage: str, record: Finished) -> None:
        self._done[stage] = record
        # what an earlier build finished beyond this stage stays known until it is asked for
        later = {n: r for n, r in self._known[self._folder].items() if n not in self._done}
        text = json.dumps({"engines": {**self.report(), **_as_report(later)}}, indent=1) + "\n"
        with atomic_write(self._folder / REPORT) as aside:
            aside.write_text(text, encoding="utf-8")

    def _take(self, record: Finished, place: Path) -> bool:
        if not whole(place, record):
            return False
        for name in record.files if place != self._folder else ():
            (self._folder / name).unlink(missing_ok=True)
            try:
                # of the file itself, where the older set has a link to it
                os.link(os.path.realpath(place / name), self._folder / name)
            except OSError:  # a disk that cannot link
                shutil.copyfile(place / name, self._folder / name)
        return True


def read(folder: Path) -> dict[str, Finished]:
    """Return the records in a folder; none where there is no report, or none that can be read."""
    try:
        engines = json.loads((folder / REPORT).read_text(encoding="utf-8"))["engines"]
        return {
            stage: Finished(
                facts.pop("key"),
                {name: File(**file) for name, file in facts.pop("files").items()},
                facts,
            )
            for stage, facts in engines.items()
            if {"key", "files"} <= facts.keys()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def whole(folder: Path, record: Finished) -> bool:
    """Say whether every file of an engine is there, with the very bytes that were built."""
    for name, file in record.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or path.stat().st_size != file.size:
            return False
        if manifests.sha256(path) != file.sha256:
            return False
    return bool(record.files)


def _as_report(records: Mapping[str, Finished]) -> dict[str, dict[str, Any]]:
    return {
        stage: {
            **record.facts,
            "key": record.key,
            "files": {name: dataclasses.asdict(file) for name, file in record.files.items()},
        }
        for stage, record in records.items()
    }
