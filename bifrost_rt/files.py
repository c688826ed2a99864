"""Files appear whole or not at all; text files are UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from bifrost_rt.errors import RequestError, TextFileError

MARK = "\ufeff"  # a byte order mark, once it is decoded
OTHER_MARKS = {  # the longer marks first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file; skip a byte order mark.

    Raises:
        OSError: the file cannot be read.
        TextFileError: the bytes are not UTF-8.
    """
    return decode_text(Path(path).read_bytes(), path)


def decode_text(content: bytes, source: str | Path) -> str:
    """Decode UTF-8 with or without a byte order mark.

    Args:
        source: where the bytes come from, to name in an error.

    Raises:
        TextFileError: the bytes are not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        for mark, encoding in OTHER_MARKS.items():
            if content.startswith(mark):
                raise TextFileError(
                    f"{source}: expected text in UTF-8, found {encoding}",
                    hint="save the file as UTF-8; PowerShell: `... | Out-File -Encoding utf8 FILE`",
                ) from error
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise TextFileError(
            f"{source}, line {line}: expected text in UTF-8, found byte 0x{byte:02x}",
            hint="save the file as UTF-8",
        ) from error
    if "\0" in text:  # ASCII in UTF-16 without a mark decodes
        raise TextFileError(
            f"{source}: expected text in UTF-8, found NUL characters (UTF-16 or binary data?)",
            hint="save the file as UTF-8",
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Give a file to write, which takes the place of `target` when the block ends without an
    error. A reader sees the older file or the whole new one. Where the block fails, nothing is left
    of it. The name to write to is short and nobody else's, whatever the target's is.

    Raises:
        OSError: the file cannot be renamed.
    """
    aside = target.with_name(f".bifrost-rt.{secrets.token_hex(8)}.tmp")
    try:
        yield aside
        aside.replace(target)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_output(target: Path) -> Iterator[Path]:
    """Write a user's file atomically: in the place of `target`, or of the file that `target` is a
    link to. Folders that are missing are made.

    Raises:
        RequestError: the file cannot be written.
    """
    place = Path(os.path.realpath(target))
    with _refused(target):
        refuse_others(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as aside:
            yield aside


def check_writable(target: Path) -> None:
    """Try that a folder takes a file, before work is spent on its content.

    Raises:
        RequestError: it takes none.
    """
    place = Path(os.path.realpath(target))
    with _refused(target):
        refuse_others(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        trial = place.with_name(f".bifrost-rt.{secrets.token_hex(8)}.tmp")
        trial.touch()
        trial.unlink()


@contextlib.contextmanager
def _refused(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(
            f"{target}: cannot be written: {error.strerror or error}", hint="choose another place"
        ) from error


def refuse_others(path: Path) -> None:
    """Refuse a path whose place no file can take: a folder, a device, a name that is too long.

    Raises:
        OSError: it is one.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")
