"""Values that are not finite, found between two engines: never inside a loop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import formats
from bifrost_rt.backends.base import Buffer
from bifrost_rt.errors import NumericsError
from bifrost_rt.manifest import SetSpec
from bifrost_rt.params import OPTIONS, Float
from bifrost_rt.request import Request

# Every engine has norms, which add up squares: beyond this, a hundred million of them overflow.
LARGEST = math.sqrt(float(np.finfo(np.float32).max) / 1e8)
# Far beyond what a model was trained with, far below where a small excess would be the cause.
HUGE = 1000.0
VERIFY = "`bifrost-rt verify DIR` tells whether this machine computes what the builder did"


def problem(array: NDArray[Any], rows: str) -> str | None:
    """Return what is wrong with an array, or None where its values are finite and norms can take
    them.

    Args:
        rows: what the first axis counts, in the singular.
    """
    with np.errstate(invalid="ignore"):  # NaN compares as false
        if array.min() >= -LARGEST and array.max() <= LARGEST:
            return None
        wrong = ~(np.abs(array) <= LARGEST)
    count = int(wrong.sum())
    places = [str(i) for i in range(len(array)) if wrong[i].any()]
    shown = ", ".join(places[:4]) + (" …" if len(places) > 4 else "")
    where = f"{rows}{'s' if len(places) > 1 else ''} {shown}"
    if np.isfinite(array).all():
        return f"reach {np.abs(array).max():.2g}, so that norms overflow ({where})"
    return f"are not finite: {count} of {array.size} values ({where})"


def refuse_infinite(engine: str, name: str, array: NDArray[Any], rows: str) -> None:
    """Refuse what an engine has left where it is not finite, for no request of drawing.

    Args:
        rows: what the first axis counts, in the singular.

    Raises:
        NumericsError: it is not.
    """
    if found := problem(array, rows):
        raise NumericsError(
            f"engine `{engine}`: {name} {found}",
            hint=VERIFY,
        )


class Checks:
    """The checks of one run.

    Args:
        download: gives the host's copy of a buffer.
        replaced: whether a callback may have put values of its own in.
    """

    def __init__(
        self,
        manifest: SetSpec,
        request: Request,
        download: Callable[[Buffer], NDArray[Any]],
        replaced: bool,
    ) -> None:
        self._manifest, self._request = manifest, request
        self._download, self._replaced = download, replaced

    def finite(
        self,
        engine: str,
        name: str,
        array: NDArray[Any],
        rows: str,
        earlier: Mapping[str, Buffer] | None = None,
    ) -> None:
        """Check the values that an engine has left.

        Args:
            earlier: what the engine was given and nobody has looked at, in the order of its making;
                looked at only to name where the fault began.

        Raises:
            NumericsError: one is not finite, or so large that the next engine makes it so.
        """
        if (found := problem(array, rows)) is None:
            return
        first = next(
            (
                given
                for given, buffer in (earlier or {}).items()
                if np.issubdtype(buffer.dtype, np.floating)
                and not np.isfinite(self._download(buffer)).all()
            ),
            None,
        )
        cause = f"; `{first}`, which the engine was given, is not finite" if first else ""
        raise NumericsError(f"engine `{engine}`: {name} {found}{cause}", hint=self._hint(engine))

    def _hint(self, engine: str) -> str:
        values = dataclasses.asdict(self._request.parameters)
        numbers = [name for name, option in OPTIONS.items() if isinstance(option.values, Float)]
        if huge := [f"{name}={values[name]:g}" for name in numbers if abs(values[name]) > HUGE]:
            return f"{' and '.join(huge)}: use a value like the default"
        compute = self._manifest.engine(engine).precision.compute
        computed_in = formats.of_type(compute)
        if computed_in is not None and computed_in.largest is not None:
            return (
                f"`{engine}` computes in {compute}, whose largest number is "
                f"{computed_in.largest:.0f}: build the set with --precision {formats.HALF.name}"
            )
        if self._replaced:
            return "a value that callback_on_step_end returned may be too large"
        return VERIFY
