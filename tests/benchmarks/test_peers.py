"""The benchmark of peers: its protocol, record, tables and plot, with peers that need no
download."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import interleaving
from benchmarks.peers import __main__ as benchmark
from benchmarks.peers import environments, measure, report
from benchmarks.peers.candidates import Candidate, Work
from benchmarks.peers.child import Child
from benchmarks.peers.environments import Environment
from bifrost_rt.errors import BackendError

PROGRAM = "tests.benchmarks.tiny_peer"


class Here(Environment):
    """This environment in the place of a peer's."""

    def make(self) -> Path:
        return Path(sys.executable)


class Nowhere(Environment):
    """One that cannot be made."""

    def make(self) -> Path:
        raise BackendError(f"{self.name}: pip cannot install it")


def candidate(
    name: str, environment: Environment | None, precision: str = "float32", **settings: Any
) -> Candidate:
    return Candidate(name, precision, PROGRAM, environment, {"scale": 1.0, **settings})


def work(*others: Candidate) -> Work:
    figures = {"step": "a step", "other": "the other"}
    ours = candidate("ours", None)
    return Work("products", figures, {"rows": 3}, "ours", (ours, *others))


def width(image: Path) -> int:
    with Image.open(image) as opened:
        return opened.size[0]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaving, "SETTLE", 0.0)


def test_a_run_of_peers_from_the_command_to_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = Here("here", ())
    asked = work(
        candidate("twice", here, scale=2.0),
        candidate("coarse", here, precision="8 bit"),
        candidate("broken", here, missing=True),
        candidate("absent", Nowhere("nowhere", ())),
    )
    monkeypatch.setattr(benchmark, "WORKS", {"products": lambda: asked})
    record, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    arguments = ["--works", "products", "--rounds", "3", "--threads", "1"]
    assert benchmark.main([*arguments, "--json", str(record), "--plot", str(plot)]) == 0
    about = json.loads(record.read_text())
    assert about["machine"]["cpu"]["cores"] > 0
    assert about["threads"] == 1
    found = about["works"][0]
    assert (found["rounds"], len(found["load"])) == (3, 2 * 3)  # for each precision
    rows = {row["name"]: row for row in found["candidates"]}
    assert list(rows) == ["ours", "twice", "coarse", "broken", "absent"]
    assert [row["ours"] for row in rows.values()] == [True, False, False, False, False]
    for name in ("ours", "twice", "coarse"):
        assert rows[name]["about"]["threads"] == 1
        assert rows[name]["about"]["libraries"] == {"numpy": np.__version__}
        assert rows[name]["peak_memory_bytes"] > 1 << 20
        for figure in rows[name]["seconds"].values():
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]
    assert rows["ours"]["difference"] == {"largest": 0, "rms": 0}
    assert rows["twice"]["difference"] == {"largest": 1, "rms": 1}  # 2x is x away from x
    assert "libmissing.so" in rows["broken"]["failed"]
    assert rows["absent"]["failed"] == "nowhere: pip cannot install it"
    # "coarse" has nobody of ours to be compared with
    assert [(r["peer"], r["ours"], r["figure"]) for r in found["ratios"]] == [
        ("twice", "ours", "step"),
        ("twice", "ours", "other"),
    ]
    for ratio in found["ratios"]:
        theirs = rows["twice"]["seconds"][ratio["figure"]]
        ours = rows["ours"]["seconds"][ratio["figure"]]
        assert ratio["ratio"] == pytest.approx(theirs["median"] / ours["median"])
        assert ratio["least"] == pytest.approx(theirs["min"] / ours["min"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| products | precision | a step, ms | the other, ms |")
    assert len(lines) == 7
    assert "| ours | ours | 0.00 % |" in lines[2]
    ratio = found["ratios"][0]["ratio"]
    assert lines[3].startswith("| twice | float32 | ")
    assert f" | {ratio:.2f} | " in lines[3]
    assert lines[4].endswith("| – | – | 0.00 % |")
    assert "libmissing.so" in lines[5]
    assert width(plot) == 1300


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    run = Child.run

    def noted(self: Child) -> dict[str, float]:
        order.append(self.name)
        return run(self)

    monkeypatch.setattr(Child, "run", noted)
    measure.measure(work(candidate("peer", Here("here", ()))), rounds=2, threads=1)
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours"]


def test_without_ours_nothing_is_measured() -> None:
    broken = Work("products", {"step": "a step"}, {}, "ours", (candidate("ours", None, missing=1),))
    with pytest.raises(BackendError, match=r"ours: RuntimeError: libmissing\.so"):
        measure.measure(broken, rounds=1, threads=1)


def test_a_process_that_dies_says_what_it_wrote() -> None:
    child = Child("peer", Path(sys.executable), PROGRAM, {"scale": 1.0, "dies": True}, 1)
    with pytest.raises(BackendError, match=r"(?s)peer: .* status 3: .*out of luck"):
        child.run()
    child.end()


def test_what_is_compared_has_one_shape() -> None:
    with pytest.raises(BackendError, match=r"computes \[2, 4\], expected \[3, 4\]"):
        measure.difference(np.ones((3, 4)), np.ones((2, 4)))


def test_of_several_of_ours_the_fastest_counts() -> None:
    def row(name: str, ours: bool, median: float, least: float) -> Mapping[str, Any]:
        seconds = {"step": {"median": median, "min": least, "max": 9.0}}
        return {"name": name, "ours": ours, "precision": "8 bit", "seconds": seconds}

    rows = [row("slow", True, 3.0, 1.0), row("fast", True, 2.0, 1.5), row("peer", False, 5.0, 2.0)]
    found = measure.ratios(rows, ["step", "absent"])
    expected = {"peer": "peer", "ours": "fast", "figure": "step", "ratio": 2.5, "least": 2.0}
    assert found == [expected]


def test_an_environment_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BIFROST_CACHE", str(tmp_path))
    monkeypatch.setattr(environments.venv, "create", lambda folder, with_pip: _fake(folder))
    made = Environment("empty", ("nothing==1",))
    assert made.make() == made.python
    assert made.folder.parent == tmp_path / "peers"
    assert made.make() == made.python
    assert capsys.readouterr().err.count("installing empty") == 1
    assert (made.folder / "asked").read_text().split() == [
        *("-m", "pip", "install", "--quiet", "nothing==1")
    ]
    built = Environment("empty", ("nothing==1",), {"CXXFLAGS": "-O1"})
    assert built.folder != made.folder
    built.make()
    asked = (built.folder / "asked").read_text()
    assert "--no-cache-dir" in asked
    assert (built.folder / "flags").read_text().strip() == "-O1"
    with pytest.raises(BackendError, match=r"(?s)pip cannot install bad==1: .*no such version"):
        Environment("bad", ("bad==1",)).make()


def _fake(folder: Path) -> None:
    """Lay an environment whose interpreter writes down what pip is asked."""
    (folder / "bin").mkdir(parents=True)
    script = folder / "bin" / "python"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {folder}/asked\necho "$CXXFLAGS" > {folder}/flags\n'
        'case "$*" in *bad*) echo "no such version" >&2; exit 1;; esac\n'
    )
    script.chmod(0o755)


def test_a_plot_of_one_work(tmp_path: Path) -> None:
    seconds = {"step": {"median": 0.2, "min": 0.1, "max": 0.3}}
    row = {"name": "ours", "precision": "8 bit", "ours": True, "seconds": seconds}
    found = {"work": "w", "figures": {"step": "a step"}, "candidates": [row], "ratios": []}
    report.draw({"works": [found]}, tmp_path / "plot.png")
    assert width(tmp_path / "plot.png") == 1300
