"""Texts that cannot be encoded, such as half of a surrogate pair, are refused on their way in."""

from __future__ import annotations

from bifrost_rt.errors import RequestError


def check(where: str, text: str) -> None:
    """Check that a text is valid Unicode.

    Args:
        where: what errors call it.

    Raises:
        RequestError: naming the first character that is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} is not valid Unicode: {error.reason} at character {error.start}"
        ) from None
