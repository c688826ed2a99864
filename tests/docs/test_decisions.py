"""Every decision is a page with a number, a status, and a line in the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "decisions"
PAGES = sorted(FOLDER.glob("[0-9]*.md"))
TITLE = re.compile(r"# (\d{4}) · (.+)")
HEADINGS = ["## Context", "## Decision", "## Consequences"]
STATUS = re.compile(r"accepted( \((amended|extended) by .+\))?|superseded by \[\d{4}\]\(\S+\)")


def parts(page: Path) -> tuple[str, str, str, str]:
    """Number, title, status and date of a page."""
    title, _, status, date = page.read_text().splitlines()[:4]
    found = TITLE.fullmatch(title)
    assert found, f"{page.name}: {title}"
    number, name = found.groups()
    return number, name, status.removeprefix("- Status: "), date.removeprefix("- Date: ")


def number(page: Path) -> str:
    return page.name[:4]


@pytest.mark.parametrize("page", PAGES, ids=number)
def test_a_page_has_a_number_a_status_a_date_and_three_sections(page: Path) -> None:
    numbered, _, status, date = parts(page)
    assert numbered == number(page)
    assert STATUS.fullmatch(status), status
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", date)
    sections = re.findall(r"^## .*$", page.read_text(), re.M)
    assert sections == HEADINGS


def test_numbers_have_no_gap_and_follow_the_dates() -> None:
    assert [number(page) for page in PAGES] == [f"{i:04d}" for i in range(1, len(PAGES) + 1)]
    dates = [parts(page)[3] for page in PAGES]
    assert dates == sorted(dates)


def test_the_index_lists_every_page_with_its_title_and_status() -> None:
    index = (FOLDER / "README.md").read_text()
    found = re.findall(r"^\| \[\d{4}\].*$", index, re.M)
    wanted = []
    for page in PAGES:
        numbered, name, status, date = parts(page)
        wanted.append(f"| [{numbered}]({page.name}) | {name} | {date} | {status} |")
    assert found == wanted


def test_what_supersedes_a_decision_names_it() -> None:
    """Of the two pages each leads to the other."""
    superseded = [page for page in PAGES if parts(page)[2].startswith("superseded")]
    assert superseded
    for page in superseded:
        later = FOLDER / re.findall(r"\((\S+)\)", parts(page)[2])[0]
        assert number(later) > number(page)
        assert number(page) in later.read_text()
