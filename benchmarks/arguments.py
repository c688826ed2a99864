"""Kinds of arguments that the benchmarks' command lines share."""

from __future__ import annotations

import argparse
from pathlib import Path


def count(text: str) -> int:
    """Say how many: a whole number from 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return number


def new_file(text: str) -> Path:
    """Return a file to write in the end: asked for now whether it can be."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: is a folder, expected a file")
    return path
