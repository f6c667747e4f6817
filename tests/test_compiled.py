"""Loops in C share torch's own threads."""

import os
import signal
import threading
import time

import pytest
import torch

from alphaquant import compiled
from alphaquant.models import native
from alphaquant.pipeline.walk import _ahead

pytestmark = pytest.mark.skipif(compiled.library(native._SOURCE) is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """However little the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(compiled, "_WORTH_A_THREAD", 1)
    yield
    torch.set_num_threads(before)


def normed():
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        return native.rms_norm(x, torch.ones(64).bfloat16(), 1e-5)


def test_openmp_does_what_a_pool_does(monkeypatch):
    if compiled._openmp() is None:
        pytest.skip("torch has no OpenMP here")
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_threads", lambda: pytest.fail("a pool beside torch's threads"))
        by_team = normed()
    monkeypatch.setattr(compiled, "_openmp", lambda: None)
    pools = []
    monkeypatch.setattr(compiled, "_threads", lambda make=compiled._threads: pools.append(make()) or pools[0])
    assert torch.equal(by_team, normed())
    assert pools


def test_all_parts_are_done_whoever_does_them(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)  # more than there are rows in the last shares
    several = normed()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert torch.equal(several, normed())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_a_fork():
    expected = normed()  # OpenMP's threads are there now, and are not in a child
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(normed(), expected) else 1)
    end = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child waits for threads that it does not have")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0


def test_a_thread_that_reads_ahead_takes_none_of_torchs_threads():
    def read(layer):
        return layer, threading.current_thread(), torch.get_num_threads()

    found = list(_ahead(read, range(3), reads_ahead=True))
    assert [layer for layer, _, _ in found] == [0, 1, 2]
    assert all(thread is not threading.main_thread() for _, thread, _ in found)
    assert [threads for _, _, threads in found] == [1, 1, 1]
    assert torch.get_num_threads() == 2
