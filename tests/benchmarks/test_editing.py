"""The tasks of the editing benchmark and their verdicts, on images that are right by making."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.editing import KINDS, SAME, Task, pairs, psnr_outside, table, tasks, verdict
from bifrost_rt import masks
from scenes.layout import PAIR_SIZE
from scenes.render import render
from scenes.scorer import judge
from scenes.world import Placed


def done(task: Task) -> np.ndarray:
    """What the task asks for, drawn by hand."""
    objects = [task.kept]
    if task.wanted is not None:
        left, top, right, bottom = task.box
        x, y = (left + right) / 2, (top + bottom) / 2
        objects.append(Placed(task.wanted.shape, task.wanted.drawn_colour, x, y, PAIR_SIZE))
    return render(objects, task.background)


def test_tasks_are_the_same_every_time_and_of_every_kind() -> None:
    first, again = tasks(12), tasks(12)
    assert [task.prompt for task in first] == [task.prompt for task in again]
    assert [task.kind for task in first] == list(KINDS) * 3


@pytest.mark.parametrize("task", tasks(8), ids=lambda task: task.kind)
def test_what_is_asked_for_is_right_and_what_was_there_is_not(task: Task) -> None:
    assert verdict(task, done(task)) == {"part": True, "rest": True, "both": True}
    assert verdict(task, task.image) == {"part": False, "rest": True, "both": False}
    empty = render([], task.background)
    assert not verdict(task, empty)["rest"]
    moved = replace(task.kept, x=task.kept.x + 6)
    assert not verdict(task, render([moved], task.background))["rest"]
    other = "black" if task.background != "black" else "white"
    assert not verdict(replace(task, background=other), done(task))["rest"]


def test_the_mask_holds_the_object_and_spares_the_other() -> None:
    for task in tasks(40):
        plain = render([], task.background)
        drawn = (render([task.kept], task.background) != plain).any(axis=2)
        # tokens of 16 px around the box may reach to the other's edge, and not to its middle
        cells = masks.touched(Image.fromarray(task.mask()), 8)
        covered = np.kron(cells, np.ones((16, 16), bool))
        assert (drawn & covered).sum() < 0.5 * drawn.sum()
        gone = (task.image != done(replace(task, wanted=None))).any(axis=2)
        assert not (gone & (task.mask() == 0)).any()


def test_psnr_is_of_what_is_kept() -> None:
    (task,) = tasks(1)
    off = task.image.copy()
    off[task.mask() > 0] ^= 128
    assert psnr_outside(task, off, 8) == SAME
    off = task.image ^ 1
    assert psnr_outside(task, off, 8) == pytest.approx(10 * np.log10(255**2))


def test_the_table_names_every_column() -> None:
    row = {"tasks": 1, "part": 100.0, "rest": 50.0, "both": 50.0}
    text = table({"all": {**row, "psnr_mean": 30.0, "psnr_least": 29.0}})
    assert text.splitlines()[-1] == "| all | 1 | 100.0 | 50.0 | 50.0 | 30.0 | 29.0 |"


def test_halves_of_two_scenes_are_the_scene_that_is_wanted() -> None:
    for task in pairs(20):
        composed = np.empty_like(task.images[0])
        for image, (left, top, right, bottom) in zip(task.images, task.boxes, strict=True):
            rows, columns = (
                slice(int(128 * top), int(128 * bottom)),
                slice(int(128 * left), int(128 * right)),
            )
            composed[rows, columns] = image[rows, columns]
        assert judge(task.wanted, composed).correct
        assert not any(judge(task.wanted, image).correct for image in task.images)
