"""What is still to be done with a layer while the next one is begun: writing it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alphaquant.compiled import leave_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

__all__ = ["Behind"]


class Behind:
    """Does one thing at a time in a thread of its own, while `apart` holds; else at once."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._work: Future[Callable[[], None]] | None = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is given within the block goes to a thread; the block ends when all of it is done.

        What an error in the block leaves undone is done, too; what that raises then is lost.
        """
        with ThreadPoolExecutor(1, initializer=leave_threads) as pool:
            self._pool = pool
            try:
                yield
                self.wait()
            finally:
                self._pool, self._work = None, None

    def do(self, work: Callable[[], Callable[[], None]]) -> None:
        """Do it after what was given before; what it returns is called by the thread that waits for it.

        Raises:
            Exception: what the work before it has raised.
        """
        self.wait()
        if self._pool is None:
            work()()
        else:
            self._work = self._pool.submit(work)

    @property
    def is_busy(self) -> bool:
        """Whether something was given that nobody has waited for."""
        return self._work is not None

    def wait(self) -> None:
        """Return when all is done.

        Raises:
            Exception: what the work has raised.
        """
        work, self._work = self._work, None
        if work is not None:
            work.result()()
