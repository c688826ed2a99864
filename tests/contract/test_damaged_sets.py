"""A set on disk that is not what was built: found on opening, named, and never run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from bifrost_rt import (
    BackendError,
    EngineSetError,
    Generator,
    IntegrityError,
    generator,
    manifest,
)


@pytest.fixture
def folder(alpha_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(alpha_set, tmp_path / "set"))


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_found(folder: Path) -> None:
    rng = random.Random(0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        original = path.read_bytes()
        for _ in range(12):  # 200 places in all
            flip(path, rng.randrange(len(original)), rng.randrange(8))
            with pytest.raises(IntegrityError, match=path.name):
                Generator(folder)
            path.write_bytes(original)
    Generator(folder).close()


def test_a_flipped_bit_anywhere_in_the_manifest_is_found(folder: Path) -> None:
    path = folder / manifest.FILENAME
    original = path.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        flip(path, rng.randrange(len(original)), rng.randrange(8))
        with pytest.raises(EngineSetError, match=r"manifest\.json"):
            manifest.read(folder)
        path.write_bytes(original)


@pytest.mark.parametrize("name", ["denoise.data", "visual_decode.onnx", "tokenizers/t5.json"])
def test_a_missing_or_truncated_file(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=rf"{path.name}: expected \d+ bytes, found \d+"):
        Generator(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=f"{path.name}: missing from the engine set"):
        Generator(folder)


def test_no_set_at_all(tmp_path: Path) -> None:
    with pytest.raises(EngineSetError, match="no such folder") as raised:
        Generator(tmp_path / "nowhere")
    assert "python -m export.build" in str(raised.value.hint)
    with pytest.raises(EngineSetError, match="No such file"):
        Generator(tmp_path)


def edit(folder: Path, **changes: object) -> None:
    """As another version of the builder would have written it, hash and all."""
    data = json.loads((folder / manifest.FILENAME).read_text())
    data.pop("sha256")
    data |= changes
    import hashlib

    digest = hashlib.sha256(manifest._render(data, None)).hexdigest()
    (folder / manifest.FILENAME).write_bytes(manifest._render(data, digest))


def test_a_manifest_of_a_newer_format(folder: Path) -> None:
    edit(folder, format=manifest.FORMAT + 1, memory_plan={})
    with pytest.raises(
        EngineSetError, match=f"manifest format {manifest.FORMAT + 1}, this version reads"
    ) as raised:
        Generator(folder)
    assert raised.value.hint == "upgrade bifrost-rt"


def test_an_unknown_key_in_the_manifest(folder: Path) -> None:
    edit(folder, memory_plan={})
    with pytest.raises(EngineSetError, match="unknown key 'memory_plan'"):
        Generator(folder)


def test_a_manifest_that_is_something_else(folder: Path) -> None:
    for text in ("", "[]", "{}", "null", "\x00", '{"format": 1}'):
        (folder / manifest.FILENAME).write_text(text)
        with pytest.raises(EngineSetError, match=r"manifest\.json"):
            Generator(folder)


def test_an_unknown_backend(folder: Path) -> None:
    with pytest.raises(BackendError, match="unknown backend 'onnxruntim' .did you mean 'onnxr"):
        Generator(folder, backend="onnxruntim")


def test_no_default_set_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generator, "DEFAULT_SET", Path("engines/sets/nowhere"))
    with pytest.raises(EngineSetError, match="looked for engines/sets/nowhere in") as raised:
        Generator()
    assert "python -m export.build" in str(raised.value.hint)


def test_the_set_of_the_wheel_is_the_last_that_is_taken(
    alpha_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generator, "DEFAULT_SET", Path("engines/sets/nowhere"))
    monkeypatch.setattr(generator, "SHIPPED_SET", alpha_set)
    with caplog.at_level("INFO", "bifrost_rt"):
        assert generator.default_set() == alpha_set
    assert caplog.messages == [f"default engine set: {alpha_set}"]
    (tmp_path / "engines" / "sets").mkdir(parents=True)
    (tmp_path / "engines" / "sets" / "nowhere").symlink_to(alpha_set)
    assert generator.default_set() == tmp_path / "engines" / "sets" / "nowhere"


def test_the_default_set_is_found_in_the_current_folder(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engines" / "sets").mkdir(parents=True)
    (tmp_path / "engines" / "sets" / "default").symlink_to(alpha_set)
    monkeypatch.chdir(tmp_path)
    with Generator() as opened:
        assert opened.path == tmp_path / "engines" / "sets" / "default"
