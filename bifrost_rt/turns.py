"""One run at a time: who draws with a generator, and what happens to those who also want to."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from bifrost_rt.backends.base import Backend
from bifrost_rt.errors import GeneratorStateError

log = logging.getLogger("bifrost_rt")

# Seconds that another thread waits for a run that is in a callback, before it is told what a
# callback must not do.
PATIENCE = 60.0

_shared: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_shared_guard = threading.Lock()


def lock_of(backend: Backend) -> threading.RLock:
    """Return the lock of what runs on a backend: one for each generator, or one for all of them
    where the backend has one queue of work (a GPU's stream) and was given to several."""
    if backend.opens_in_threads:
        return threading.RLock()
    with _shared_guard:
        return _shared.setdefault(backend, threading.RLock())


class Turns:
    """The turns of one generator. A turn is taken once for a run, and costs nothing per step.

    Args:
        lock: held during a turn.
        patience: see `PATIENCE`.

    Attributes:
        in_callback: whether the run is in its callback now.
    """

    def __init__(self, lock: threading.RLock, patience: float = PATIENCE) -> None:
        self.in_callback = False
        self._lock, self._patience = lock, patience
        self._owner: int | None = None
        self._closed = False

    @contextlib.contextmanager
    def turn(self, call: str) -> Iterator[None]:
        """Wait until no other thread has a turn, and have it.

        Args:
            call: what it is for, as its caller wrote it.

        Raises:
            GeneratorStateError: this thread has one already, or the generator is closed.
        """
        self._refuse_reentry(call)
        self._acquire()
        try:
            self.require_open(call)
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner, self.in_callback = None, False
            self._lock.release()

    @contextlib.contextmanager
    def last(self, call: str) -> Iterator[bool]:
        """Return the turn after which there is none. Gives whether it is the first of its kind.

        Raises:
            GeneratorStateError: this thread has a turn.
        """
        self._refuse_reentry(call)
        self._acquire()
        try:
            first, self._closed = not self._closed, True
            yield first
        finally:
            self._lock.release()

    def require_open(self, call: str) -> None:
        """Refuse what comes after the end.

        Raises:
            GeneratorStateError: the generator is closed.
        """
        if self._closed:
            raise GeneratorStateError(
                f"{call}: this Generator is closed", hint="open the set again: Generator(DIR)"
            )

    def _refuse_reentry(self, call: str) -> None:
        if self._owner == threading.get_ident():
            raise GeneratorStateError(
                f"{call} was called by callback_on_step_end of a run of the same Generator, whose "
                "buffers are in use",
                hint="draw after the run has returned; or draw with a second Generator",
            )

    def _acquire(self) -> None:
        if self._lock.acquire(timeout=self._patience):
            return
        if self.in_callback:
            log.warning(
                "waiting for a run whose callback_on_step_end does not return; if that callback "
                "waits for this thread, neither ever ends: draw with a second Generator there"
            )
        self._lock.acquire()
