"""The files of a set that was opened: known again when they are read again.

Every file is hashed once, when the set is opened. From then on its identity is compared, which
costs microseconds; only a file whose identity has changed is hashed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bifrost_rt import manifest as manifests
from bifrost_rt.errors import EngineSetError, IntegrityError
from bifrost_rt.manifest import EngineSpec, File, Manifest

# device, inode, size, modified, changed; a link and its target count as one file
Identity = tuple[int, int, int, int, int]
REOPEN = "wait until the set is complete and open a new Generator"


def identity(path: Path) -> Identity | None:
    """Say who a file is, or None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def files_of(spec: EngineSpec) -> list[str]:
    """Return the files that an engine is opened from, the weights that it gets by address among
    them."""
    bound = [weight.file for weight in spec.compiled.weights] if spec.compiled else []
    return list(dict.fromkeys((spec.graph, *spec.files, *spec.shared, *bound)))


def verify(folder: Path, manifest: Manifest) -> None:
    """Check every file of the set against its hash, several at once.

    Raises:
        IntegrityError: for the first damaged file.
    """
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for check in [
            pool.submit(manifests.verify_file, folder, name, file)
            for name, file in manifest.files.items()
        ]:
            check.result()


class OpenedFiles:
    """The files of a set as they were when this was made. Any thread may call.

    Args:
        folder: an absolute path without links: what a link points to may change.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._expected: dict[str, File] = manifest.files
        used = [name for spec in manifest.engines for name in files_of(spec)]
        text = manifest.text
        used += [part.tokenizer for part in (text.mllm, text.clip, text.t5)]
        self._known = {name: identity(folder / name) for name in (*manifest.files, *used)}

    def verify(self, manifest: Manifest) -> None:
        """Check every file against its hash.

        Raises:
            IntegrityError: for the first damaged file.
            EngineSetError: a file or the manifest was replaced meanwhile.
        """
        verify(self._folder, manifest)
        for name in self._known:
            self._same(name, identity(self._folder / name), "while")
        if manifests.read(self._folder) != manifest:
            raise self._changed(manifests.FILENAME, "was replaced", "while")

    def same(self, names: Iterable[str]) -> None:
        """Check that files are those that were opened, before and after they are read again.

        Raises:
            EngineSetError: one is another file now, or is gone.
        """
        for name in names:
            self._same(name, identity(self._folder / name))

    def untouched(self, names: Iterable[str]) -> None:
        """Check that files which are in use were not written to; that others have taken their
        places does not matter to who has them open.

        Raises:
            EngineSetError: one holds something else now.
        """
        for name in names:
            found, known = identity(self._folder / name), self._known.get(name)
            if found is not None and known is not None and found[:2] == known[:2]:
                self._same(name, found)

    def _same(self, name: str, found: Identity | None, when: str = "after") -> None:
        if found is not None and found == self._known.get(name):
            return
        if found is None:
            raise self._changed(name, "is missing", when)
        if name not in self._expected:
            raise self._changed(name, "was replaced", when)
        try:  # copied, linked or touched: the same bytes are the same set
            manifests.verify_file(self._folder, name, self._expected[name])
        except IntegrityError as error:
            raise self._changed(name, "holds something else", when) from error
        self._known[name] = found

    def _changed(self, name: str, what: str, when: str) -> EngineSetError:
        return EngineSetError(
            f"{self._folder / name}: the set changed {when} it was opened: this file {what}",
            hint=REOPEN,
        )
