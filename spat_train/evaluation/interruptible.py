"""Signals and lack of memory during an evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import InputError, is_out_of_memory
from ..runtime.signals import EVALUATING, GracefulStop, Stopped


@contextmanager
def interruptible(stopped: str, out_of_memory: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yields `on_progress` for `evaluate`.

    Args:
        stopped: the message where SIGTERM or Ctrl-C stops the evaluation.
        out_of_memory: makes the message where memory does not suffice.

    Raises:
        Stopped: a signal came. InputError: out of memory.
    """
    with GracefulStop(EVALUATING).heard() as wish:

        def on_progress() -> None:
            if wish.number:
                raise Stopped(wish.number, f"stopped by signal {wish.number}: {stopped}")

        try:
            yield on_progress
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(out_of_memory()) from error
