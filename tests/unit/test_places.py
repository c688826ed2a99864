"""Where images and latents are written: any name that a disk takes, and nothing is lost."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import RequestError, latents_file
from bifrost_rt.files import atomic_output
from bifrost_rt.result import Result, image_path, image_paths


def result(images: int = 1) -> Result:
    """A run's result without the run."""
    drawn = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(images)]
    nothing = np.zeros((images, 1, 1), np.float32)
    return Result(drawn, nothing, nothing, {"total": 0.0}, 0, {"prompt": "a"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("stem", ["x" * 251, "ß" * 125, "🦆" * 62])
def test_a_name_as_long_as_names_can_be(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.png"
    for _ in range(2):  # a new one, and over the older one
        assert result().save(path) == [path]
        assert names(tmp_path) == [path.name]
    long = tmp_path / f"{stem}.tok"
    latents_file.save(long, np.zeros((1, 2, 3), np.float32), {"prompt": "a"})
    assert names(tmp_path) == sorted([path.name, long.name])


def test_a_name_that_is_too_long_is_said_before_anything_is_written(tmp_path: Path) -> None:
    longest = tmp_path / f"{'x' * 251}.png"
    for path, images in (
        (tmp_path / f"{'x' * 252}.png", 1),
        (tmp_path / ("x" * 252), 1),  # gets a suffix
        (longest, 2),  # get a number each
        (tmp_path / f"{'x' * 249}.png", 11),  # the last one a longer number
    ):
        with pytest.raises(RequestError, match="cannot be written: File name too long") as refused:
            image_paths(path, images)
        assert refused.value.hint == "choose another place"
        with pytest.raises(RequestError, match="File name too long"):
            result(images).save(path)
        assert names(tmp_path) == []


def test_a_folder_gets_the_image_under_a_name_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("v1.2").mkdir()
    Path("looks-like.png").mkdir()
    for given, written in (
        ("there", "there/out.png"),
        ("there/", "there/out.png"),
        ("v1.2", "v1.2/out.png"),
        ("looks-like.png", "looks-like.png/out.png"),
        ("new/", "new/out.png"),
        ("deep/new.png/", "deep/new.png/out.png"),
        (".", "out.png"),
        ("", "out.png"),
        ("..", "../out.png"),
        ("plain", "plain.png"),
        ("a.JPG", "a.JPG"),
    ):
        assert image_path(given)[0] == Path(written)
    assert result().save("there/") == [Path("there/out.png")]
    assert result(2).save("new/") == [Path("new/out-0.png"), Path("new/out-1.png")]
    assert names(Path("new")) == ["out-0.png", "out-1.png"]


@pytest.mark.parametrize("name", ["a.xyz", "a.xbm", "a.h5", "a.msp", "a.4 cats", "a.py"])
def test_a_format_that_holds_no_image_in_colour_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="is not an image format that Pillow writes"):
        image_paths(tmp_path / name, 1)
    assert names(tmp_path) == []


def test_an_image_that_has_the_place_of_a_folder_is_found_before(tmp_path: Path) -> None:
    (tmp_path / "a-1.png").mkdir()
    with pytest.raises(RequestError, match=r"a-1\.png: cannot be written: it is a folder"):
        image_paths(tmp_path / "a.png", 2)
    with pytest.raises(RequestError, match="it is a folder"):
        latents_file.save(tmp_path, np.zeros((1, 2, 3), np.float32), {"prompt": "a"})
    assert names(tmp_path) == ["a-1.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
def test_a_device_or_a_pipe_stays_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, Path("/dev/null")):
        with pytest.raises(RequestError, match="it is a device or a pipe"):
            latents_file.save(place, np.zeros((1, 2, 3), np.float32), {"prompt": "a"})
    assert pipe.is_fifo()
    assert Path("/dev/null").is_char_device()


def test_a_file_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "latest.png").write_text("older")
    for link, target in (("a.png", "latest.png"), ("b.png", "new.png")):
        (tmp_path / link).symlink_to(disk / target)
        assert result().save(tmp_path / link) == [tmp_path / link]
        assert (tmp_path / link).is_symlink()
        with Image.open(disk / target) as image:
            assert image.size == (4, 4)
    assert names(disk) == ["latest.png", "new.png"]


def test_two_writers_of_one_file_do_not_share_what_they_write(tmp_path: Path) -> None:
    """Two containers on one volume have the same process number."""
    target = tmp_path / "a.png"
    with atomic_output(target) as one, atomic_output(target) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one"
    assert names(tmp_path) == ["a.png"]


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_text("older")
    with pytest.raises(RequestError, match="No space left"), atomic_output(target) as aside:
        aside.write_text("half")
        raise OSError(28, os.strerror(28))
    assert target.read_text() == "older"
    assert names(tmp_path) == ["a.png"]
    with pytest.raises(RequestError, match="cannot be written: Not a directory"):
        image_paths(target / "b.png", 1)
