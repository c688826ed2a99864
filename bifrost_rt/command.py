"""How every command of the project ends: a status, and one line and a hint for an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from bifrost_rt.errors import BifrostError


def run(command: Callable[[], int], *, debug: bool, interrupted: str = "interrupted") -> int:
    """Run a command line. Returns its exit status, 1 for an error, 130 when interrupted, 141 when
    whoever read its output has gone, as `| head` does.

    Args:
        debug: let errors through, with their trace.
        interrupted: what Ctrl-C prints.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except BifrostError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
