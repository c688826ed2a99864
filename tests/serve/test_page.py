"""The page in a real browser, without a mouse. `--screenshots DIR` keeps what it looked like."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import Generator
from tests.patience import PATIENCE
from tests.serve.conftest import Server, pixels

STEPS = {"num_inference_steps": 40, "decoding_steps": 8}
# Notes every preview that is shown, however short: asking now and then may miss them all.
WATCH = """() => {
  window.previews = new Set();
  new MutationObserver(() => {
    for (const image of document.querySelectorAll("img.preview[data-step]"))
      window.previews.add(image.dataset.step);
  }).observe(document.body, { subtree: true, childList: true, attributes: true });
}"""


@pytest.fixture
def page(
    browser: Any, server: Server, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 900, "height": 900})
    context.set_default_timeout(PATIENCE * 1000)
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda said: said.type == "error" and errors.append(said.text))
    opened.goto(server.url)
    opened.get_by_text("alpha, 128x128 px").wait_for()
    yield opened
    folder = request.config.getoption("--screenshots")
    if folder:
        opened.screenshot(path=Path(folder) / f"{request.node.name}.png", full_page=True)
    context.close()
    assert errors == getattr(request, "param", [])


def focused(page: Any) -> str:
    script = "() => document.activeElement.name || document.activeElement.id"
    return str(page.evaluate(script))


def fill_options(page: Any, **values: int) -> None:
    """By keyboard alone: Tab from field to field."""
    page.locator("summary").focus()
    if page.locator("details").get_attribute("open") is None:
        page.keyboard.press("Enter")
    for _ in range(12):
        page.keyboard.press("Tab")
        if focused(page) in values:
            page.keyboard.press("Control+A")
            page.keyboard.type(str(values.pop(focused(page))))
        if not values:
            return
    raise AssertionError(f"never reached {values}")


def test_an_image_by_keyboard(page: Any, generator: Generator, tmp_path: Path) -> None:
    assert focused(page) == "prompt"
    page.keyboard.type("a red circle")
    fill_options(page, seed=5, **STEPS)
    page.locator("#prompt").focus()
    page.evaluate(WATCH)
    page.keyboard.press("Control+Enter")
    page.get_by_text("Drawn in").wait_for()
    assert page.evaluate("() => window.previews.size") > 0
    assert page.locator("#images img:not(.preview)").count() == 1
    # what is shown is what the generator draws, and the file says how it was made
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").focus()
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "bifrost-5.png"
    download.value.save_as(tmp_path / "a.png")
    expected = generator.run("a red circle", seed=5, **STEPS)
    file = (tmp_path / "a.png").read_bytes()
    assert np.array_equal(pixels(file), np.asarray(expected.image))
    assert json.dumps(expected.parameters)[1:].encode() in file
    assert page.locator("#facts").inner_text().split("\n")[:4] == [
        *("Prompt", "a red circle", "Seed", "5")
    ]


SCENE = Image.radial_gradient("L").convert("RGB").resize((200, 130))


def painted(*places: int) -> Image.Image:
    """A mask of the golden model's grid, white at these places, of the scene's shape: pixels that
    two cells share are white where both are."""
    cells = np.zeros(16, bool)
    cells[list(places)] = True
    cells = cells.reshape(4, 4)
    pixel = np.arange(130)
    first, last = 4 * pixel // 130, (4 * pixel + 3) // 130  # cells that a pixel is part of
    square = np.logical_and.reduce(
        [cells[np.ix_(rows, columns)] for rows in (first, last) for columns in (first, last)]
    )
    whole = Image.new("L", SCENE.size)
    whole.paste(Image.fromarray(square.astype(np.uint8) * 255), (35, 0))
    return whole


def open_scene(page: Any, tmp_path: Path) -> None:
    """Ask for a cow, and take the scene as the image that is edited."""
    SCENE.save(tmp_path / "scene.png")
    page.keyboard.type("a cow")
    fill_options(page, seed=5, **STEPS)
    page.locator("#edit-file").set_input_files(tmp_path / "scene.png")


def edited(page: Any, tmp_path: Path) -> Any:
    """The image that is shown, as a file."""
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "edited.png")
    return pixels((tmp_path / "edited.png").read_bytes())


def test_a_part_is_marked_by_mouse_and_drawn_anew(
    page: Any, generator: Generator, tmp_path: Path
) -> None:
    open_scene(page, tmp_path)
    page.get_by_text("0 of 16 cells are marked").wait_for()
    assert page.locator("#edit").is_disabled()
    box = page.locator("#mask").bounding_box()
    cell = box["width"] / 4
    at = lambda x, y: (box["x"] + (x + 0.5) * cell, box["y"] + (y + 0.5) * cell)  # noqa: E731
    page.mouse.move(*at(1, 1))
    page.mouse.down()
    page.mouse.move(*at(3, 1))  # in one leap: nothing between is left out
    page.mouse.up()
    page.get_by_text("3 of 16 cells are marked").wait_for()
    page.mouse.move(*at(3, 1))  # beginning where it is marked, it clears
    page.mouse.down()
    page.mouse.up()
    page.get_by_text("2 of 16 cells are marked").wait_for()
    page.locator("#edit").click()
    page.get_by_text("Drawn in").wait_for()
    expected = generator.run("a cow", image=SCENE, mask=painted(5, 6), seed=5, **STEPS)
    assert np.array_equal(edited(page, tmp_path), np.asarray(expected.image))
    # before and after, by keyboard too
    over = page.locator(".compare .before")
    assert over.evaluate("e => e.style.clipPath") == "inset(0px 100% 0px 0px)"
    page.get_by_role("slider").focus()
    page.keyboard.press("End")
    assert over.evaluate("e => e.style.clipPath") == "inset(0px 0% 0px 0px)"


def test_pixels_are_drawn_again_where_that_is_asked(
    page: Any, generator: Generator, tmp_path: Path
) -> None:
    open_scene(page, tmp_path)
    page.locator("#mask").focus()
    page.keyboard.press("Space")
    page.get_by_label("Keep all other pixels").focus()
    page.keyboard.press("Space")
    page.locator("#edit").click()
    page.get_by_text("Drawn in").wait_for()
    expected = generator.run(
        "a cow", image=SCENE, mask=painted(0), seed=5, keep_pixels=False, **STEPS
    )
    assert np.array_equal(edited(page, tmp_path), np.asarray(expected.image))


def test_a_thought_is_seen_and_drawn(page: Any, generator: Generator) -> None:
    page.keyboard.type("a cow")
    fill_options(page, seed=5, **STEPS)
    page.get_by_label("Think first").focus()
    page.keyboard.press("Space")
    page.evaluate(WATCH)
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    page.get_by_text("Drawn in").wait_for()
    thought = generator.run("a cow", think=True, seed=5, **STEPS).thought
    assert thought
    assert page.locator("#facts dd").first.inner_text().split() == thought.split()


def test_a_part_is_marked_by_keyboard_alone(
    page: Any, generator: Generator, tmp_path: Path
) -> None:
    page.keyboard.type("a red circle")
    fill_options(page, seed=5, **STEPS)
    page.keyboard.press("Enter")
    page.get_by_text("Drawn in").wait_for()
    page.get_by_role("button", name="Edit it").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Row 1, column 1: kept. 0 of 16 cells are marked").wait_for()
    assert focused(page) == "mask"
    for key in (
        "ArrowRight",
        "ArrowDown",
        " ",
        "Shift+ArrowRight",
        "ArrowLeft",
        "ArrowUp",
        "Space",
    ):
        page.keyboard.press(key)
    page.get_by_text("Row 1, column 2: marked. 3 of 16 cells are marked").wait_for()
    page.keyboard.press("Space")
    page.get_by_text("2 of 16 cells are marked").wait_for()
    page.locator("#prompt").fill("a cow")
    page.locator("#edit").focus()
    page.keyboard.press("Enter")
    page.locator(".compare").wait_for()
    before = generator.run("a red circle", seed=5, **STEPS).image
    cells = np.zeros(16, np.uint8)
    cells[[5, 6]] = 255
    mask = Image.fromarray(cells.reshape(4, 4))
    expected = generator.run("a cow", image=before, mask=mask, seed=5, **STEPS)
    assert np.array_equal(edited(page, tmp_path), np.asarray(expected.image))
    page.locator("#mask").focus()
    page.keyboard.press("Delete")
    page.get_by_text("0 of 16 cells are marked").wait_for()
    assert page.locator("#edit").is_disabled()


def test_a_finger_marks(page: Any, tmp_path: Path) -> None:
    SCENE.save(tmp_path / "scene.png")
    page.locator("#edit-file").set_input_files(tmp_path / "scene.png")
    page.get_by_text("0 of 16 cells are marked").wait_for()
    page.evaluate("""() => {
      const mask = document.getElementById("mask"), box = mask.getBoundingClientRect();
      mask.setPointerCapture = () => {};  // of a pointer that no browser made
      for (const [name, x] of [["pointerdown", 0.1], ["pointermove", 0.9], ["pointerup", 0.9]])
        mask.dispatchEvent(new PointerEvent(name, { pointerId: 7, pointerType: "touch",
          clientX: box.left + x * box.width, clientY: box.top + 0.1 * box.height }));
    }""")
    page.get_by_text("4 of 16 cells are marked").wait_for()
    page.get_by_role("button", name="Clear").click()
    page.get_by_text("0 of 16 cells are marked").wait_for()
    touch = page.locator("#mask").evaluate("e => getComputedStyle(e).touchAction")
    assert touch == "none"  # a finger marks, and does not scroll


def test_escape_cancels(page: Any, server: Server) -> None:
    page.keyboard.type("a cow")
    fill_options(page, num_inference_steps=2000)
    page.keyboard.press("Enter")
    page.get_by_text("Denoising, step").wait_for()
    assert page.locator("#draw").is_disabled()
    page.keyboard.press("Escape")
    page.get_by_text("Cancelled.").wait_for()
    assert server.figure("bifrost_running_jobs") == 0
    assert page.locator("#draw").is_enabled()


def test_history_draws_the_same_again(page: Any) -> None:
    page.keyboard.type("a dog")
    fill_options(page, **STEPS)
    page.keyboard.press("Enter")
    page.get_by_text("Drawn in").wait_for()
    seed = page.locator("#facts dd").nth(1).inner_text()
    page.reload()
    page.get_by_role("button", name="a dog").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Draw makes the same image").wait_for()
    assert page.locator("[name=seed]").input_value() == seed
    page.locator("#prompt").focus()
    page.keyboard.press("Control+Enter")
    page.get_by_text("Drawn in").wait_for()
    thumbs = [image.get_attribute("src") for image in page.locator("#history img").all()]
    assert len(thumbs) == 2
    assert thumbs[0] == thumbs[1]
    page.get_by_role("button", name="Forget history").click()
    assert page.locator("#history img").count() == 0
    page.reload()
    assert page.locator("#history img").count() == 0


def test_a_prompt_is_never_markup(page: Any) -> None:
    page.keyboard.type("<img src=x onerror=alert(1)><b>bold</b>")
    fill_options(page, **STEPS)
    page.keyboard.press("Enter")
    page.get_by_text("Drawn in").wait_for()
    assert page.locator("#facts b").count() == 0
    assert page.locator("#facts dd").first.inner_text().startswith("<img src=x")


@pytest.mark.parametrize(
    "page",
    [["Failed to load resource: the server responded with a status of 400 (Bad Request)"]],
    indirect=True,
    ids=["refusal"],
)
def test_a_refusal_is_said(page: Any) -> None:
    page.keyboard.type("   a")
    page.evaluate("document.querySelector('[name=num_inference_steps]').removeAttribute('max')")
    fill_options(page, num_inference_steps=99999)
    page.keyboard.press("Enter")
    page.locator("#status.error").wait_for()
    assert "num_inference_steps: is at most 2000 here" in page.locator("#status").inner_text()


def test_a_token_is_asked_for(browser: Any, serving: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct-horse-battery")
    with serving("--token-file", str(tmp_path / "token")) as locked:
        opened = browser.new_page()
        opened.goto(locked.url)
        opened.locator("#token").wait_for()
        opened.keyboard.type("correct-horse-battery")
        opened.locator("#prompt").fill("a cow")
        opened.keyboard.press("Control+Enter")
        opened.get_by_text("Drawn in").wait_for()
        assert opened.locator("#images img").count() == 1
        opened.close()


def test_questions_about_a_drawn_and_a_chosen_image(
    page: Any, generator: Generator, tmp_path: Path
) -> None:
    page.keyboard.type("a red circle")
    fill_options(page, seed=5, **STEPS)
    page.keyboard.press("Enter")
    page.get_by_text("Drawn in").wait_for()
    page.get_by_role("button", name="Ask about it").focus()
    page.keyboard.press("Enter")
    assert focused(page) == "question"
    page.keyboard.type("What is this?")
    page.keyboard.press("Enter")
    page.get_by_text("tokens read").wait_for()
    drawn = generator.run("a red circle", seed=5, **STEPS).image
    expected = generator.describe(drawn, "What is this?")
    assert page.locator("#answer").text_content() == expected.text
    drawn.crop((0, 0, 90, 60)).save(tmp_path / "chosen.png")
    page.locator("#file").set_input_files(tmp_path / "chosen.png")
    assert page.locator("#answer-facts").inner_text() == ""
    page.locator("#question").focus()
    page.keyboard.press("Enter")
    page.get_by_text("tokens read").wait_for()
    chosen = generator.describe(tmp_path / "chosen.png", "What is this?")
    assert page.locator("#answer").text_content() == chosen.text
