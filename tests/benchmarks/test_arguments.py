"""What the benchmarks' command lines refuse, before anything is measured."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import arguments


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", ""])
def test_a_count_is_a_whole_number_from_1(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number from 1, got '"):
        arguments.count(text)


def test_counts_and_files_that_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert arguments.count("12") == 12
    assert arguments.new_file("record.json") == Path("record.json")
    (tmp_path / "old.json").write_text("{}")
    assert arguments.new_file(str(tmp_path / "old.json")) == tmp_path / "old.json"
    assert (tmp_path / "old.json").read_text() == "{}"


def test_a_record_that_could_not_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="nowhere: no such folder"):
        arguments.new_file(str(tmp_path / "nowhere" / "record.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder, expected a file"):
        arguments.new_file(str(tmp_path))


@pytest.mark.parametrize("benchmark", ["quality", "precision"])
def test_a_set_that_is_not_there_is_one_line_and_a_hint(tmp_path: Path, benchmark: str) -> None:
    option = ["--engines"] if benchmark == "quality" else []
    missing = str(tmp_path / "set")
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", *option, missing]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: {missing}/manifest.json: cannot read an engine set here" in done.stderr
    assert "hint: build one with" in done.stderr
    assert "Traceback" not in done.stderr
