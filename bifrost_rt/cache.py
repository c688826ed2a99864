"""Where this machine keeps what can be made again: safe to delete at any time.

Files are named by what decides their bytes, and carry the hash of what they hold: one that is
damaged counts as absent. They are written aside and renamed, so processes can share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from bifrost_rt.files import atomic_write

VARIABLE = "BIFROST_CACHE"
OFF = "BIFROST_NO_CACHE"  # set to anything: what runs a set neither reads nor writes here
UNUSED_SECONDS = 30 * 24 * 3600  # a file that nobody has read for so long is deleted
_DIGEST_BYTES = hashlib.sha256().digest_size


def folder(environment: Mapping[str, str] | None = None, platform: str = sys.platform) -> Path:
    """Return the cache folder of this user; it need not exist.

    `$BIFROST_CACHE` names it; otherwise it is `bifrost-rt` where the system keeps caches.
    """
    found = os.environ if environment is None else environment
    if named := found.get(VARIABLE):
        return Path(named).expanduser()
    if platform == "win32":
        base = found.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = found.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bifrost-rt"


def off() -> bool:
    """Say whether this process was told to run without what earlier ones kept."""
    return bool(os.environ.get(OFF))


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Run without it, and so do the processes that are started meanwhile."""
    before = os.environ.get(OFF)
    os.environ[OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFF]
        else:
            os.environ[OFF] = before


def read(kind: str, key: str) -> bytes | None:
    """Return what was kept under a key, or None: not there, unreadable or damaged.

    Args:
        kind: a subfolder, such as "traces".
        key: a file name; a hash of everything that decides the content.
    """
    path = folder() / kind / key
    try:
        stored = path.read_bytes()
        os.utime(path)  # it was used
    except OSError:
        return None
    digest, content = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None


def write(kind: str, key: str, content: bytes) -> str | None:
    """Keep content under a key, and drop what nobody has read for a month.

    Returns:
        Why it could not be kept, or None. A cache that cannot be written costs time, nothing else.
    """
    place = folder() / kind
    try:
        place.mkdir(parents=True, exist_ok=True)
        with atomic_write(place / key) as aside:
            aside.write_bytes(hashlib.sha256(content).digest() + content)
    except OSError as error:
        return f"{place}: {error.strerror or error}"
    _drop_unused(place)
    return None


def _drop_unused(place: Path) -> None:
    oldest = time.time() - UNUSED_SECONDS
    with contextlib.suppress(OSError):  # another process may be doing the same
        for path in place.iterdir():
            if path.stat().st_mtime < oldest:
                path.unlink()
