"""A layer is written while the next one is begun, and before anything moves that is being written."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from alphaquant.pipeline.behind import Behind


def nothing() -> None:
    pass


def test_apart_it_is_done_by_another_thread_and_told_to_the_one_that_waits() -> None:
    behind, may, told = Behind(), threading.Event(), []

    def work():
        assert may.wait(30)
        worker = threading.current_thread()
        return lambda: told.append((worker, threading.current_thread()))

    with behind.apart():
        behind.do(work)
        assert behind.is_busy
        assert told == []
        may.set()
        behind.wait()
        assert not behind.is_busy
        ((worker, waiter),) = told
        assert worker is not waiter is threading.main_thread()
    behind.do(lambda: lambda: told.append(threading.current_thread()))
    assert told[1:] == [threading.main_thread()]  # at once
    assert not behind.is_busy


def test_one_thing_after_the_other() -> None:
    behind, running, most, told = Behind(), [], [], []

    def work(number):
        running.append(number)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(number)
        return lambda: told.append(number)

    with behind.apart():
        for number in range(5):
            behind.do(lambda number=number: work(number))
    assert most == [1] * 5
    assert told == list(range(5))


def asked(behind: Behind) -> None:
    behind.do(lambda: nothing)


def left(behind: Behind) -> None:
    """The block ends, which waits, too."""


@pytest.mark.parametrize("ask", [Behind.wait, asked, left])
def test_an_error_is_raised_by_whoever_waits(ask) -> None:
    def fail():
        raise OSError("the disk is full")

    def whole():
        behind = Behind()
        with behind.apart():
            behind.do(fail)
            ask(behind)
            assert ask is left, "nobody was told"

    with pytest.raises(OSError, match="full"):
        whole()


def test_an_error_beside_it_lets_it_end() -> None:
    behind, done = Behind(), []

    def work():
        time.sleep(0.05)
        done.append(True)
        return nothing

    def whole():
        with behind.apart():
            behind.do(work)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole()
    assert done
    assert not behind.is_busy


def test_it_takes_none_of_torchs_threads() -> None:
    behind, found = Behind(), []
    with behind.apart():
        behind.do(lambda: found.append(torch.get_num_threads()) or nothing)
    assert found == [1]
