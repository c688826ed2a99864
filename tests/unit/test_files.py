"""Text files as editors write them."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from bifrost_rt import errors
from bifrost_rt.files import decode_text, read_text


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_text_is_the_same_with_and_without_a_byte_order_mark(tmp_path: Path, mark: bytes) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + "a red circle\r\nein größeres Quadrat\n".encode())
    assert read_text(file) == "a red circle\nein größeres Quadrat\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_unicode_encoding_is_named_with_the_file(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a red circle".encode(encoding))
    with pytest.raises(errors.TextFileError, match=rf"(?s)prompts\.txt.*{encoding.upper()}.*hint"):
        read_text(file)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_not_read_as_ascii_with_zeros(encoding: str) -> None:
    with pytest.raises(errors.TextFileError, match="NUL"):
        decode_text("a red circle".encode(encoding), "prompts.txt")


def test_a_byte_that_is_not_utf8_is_shown_with_its_line() -> None:
    with pytest.raises(errors.TextFileError, match=r"prompts\.txt, line 2: .*0xf6"):
        decode_text("a red circle\nein größeres".encode("latin-1"), "prompts.txt")


def test_a_file_that_is_missing_stays_an_operating_system_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "prompts.txt")
