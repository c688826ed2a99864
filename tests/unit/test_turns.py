"""Turns by themselves: what a thread that waits too long is told."""

from __future__ import annotations

import threading
import time

import pytest

from bifrost_rt import GeneratorStateError
from bifrost_rt.turns import Turns


def test_a_wait_for_a_callback_that_may_never_return_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    turns = Turns(threading.RLock(), patience=0)
    done = []

    def wait() -> None:
        with turns.turn("run()"):
            done.append(True)

    with turns.turn("run()"):
        turns.in_callback = True
        waiting = threading.Thread(target=wait)
        waiting.start()
        until = time.monotonic() + 60
        while "neither ever ends" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.005)
        assert not done
    waiting.join()
    assert done


def test_a_wait_for_arithmetic_is_not(caplog: pytest.LogCaptureFixture) -> None:
    turns, inside, go = Turns(threading.RLock(), patience=0), threading.Event(), threading.Event()

    def hold() -> None:
        with turns.turn("run()"):
            inside.set()
            go.wait()

    holding = threading.Thread(target=hold)
    holding.start()
    inside.wait()
    threading.Timer(0.05, go.set).start()
    with turns.turn("run()"):
        holding.join()
    assert caplog.text == ""


def test_the_last_turn_is_given_once() -> None:
    turns = Turns(threading.RLock())
    with turns.last("close()") as first:
        assert first
    with turns.last("close()") as first:
        assert not first
    closed = pytest.raises(GeneratorStateError, match=r"run\(\): this Generator is closed")
    with closed, turns.turn("run()"):
        pass
