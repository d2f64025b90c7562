"""SIGTERM, SIGHUP (the terminal was closed) and Ctrl-C, remembered until the loop looks between two steps."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..errors import InputError, first_line, is_out_of_memory
from .distributed import PeerError, first_to_say, is_of_a_peer

COPY = 2.0  # seconds: torchrun and batch systems send SIGTERM to a process twice, on its own and by its parent


class Stopped(BaseException):
    """The run was asked to stop, and has saved. Like KeyboardInterrupt, it is no Exception."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class GracefulStop:
    """Prints `text` on the first signal.

    Attributes:
        number: the signal that came, 0 for none.
        heeded: whether a loop looks at `number`; until then a signal raises Stopped where it arrives.
    """

    def __init__(self, text: str = "spat-train: stopping after this step, to save", heeded: bool = True):
        self.number, self.text, self.heeded = 0, text, heeded

    @contextmanager
    def heard(self):
        """Within, SIGTERM, SIGHUP and SIGINT are remembered in `number`; a second Ctrl-C acts as ever.

        SIGHUP is left alone where it is ignored, as by nohup.

        A second SIGTERM, more than COPY after the first, ends the process at once, saved or not: the loop may be
        waiting for something that never comes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python delivers signals to the main thread alone
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]

        def hear(number, frame):
            if self.number:
                return
            self.number = number
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            if not self.heeded:
                raise Stopped(number, f"stopped by signal {number} before the first step: there is nothing to save")
            if first_to_say(self.text):
                with suppress(OSError):  # nobody reads it, as after SIGHUP
                    os.write(2, f"\n{self.text}\n".encode())

        for number in before:
            signal.signal(number, hear)
        try:
            with _second_sigterm_ends():
                yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _second_sigterm_ends():
    """By a thread: while the main one waits for other processes or for a GPU, handlers of Python do not run there."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = os.getpid()

    def watch():
        first = None
        while number := os.read(reading, 1)[0]:
            if number == signal.SIGTERM and first is not None and time.monotonic() - first > COPY:
                os.write(2, b"\nspat-train: ended by a second signal; what was saved before is whole\n")
                os._exit(128 + number)
            if number in (signal.SIGTERM, signal.SIGINT) and first is None:
                first = time.monotonic()
        os.close(reading)

    threading.Thread(target=watch, daemon=True).start()
    outer = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    _watched.append(process)
    try:
        yield
    finally:
        _watched.pop()
        if os.getpid() == process:
            signal.set_wakeup_fd(outer)
            os.write(writing, b"\0")
            os.close(writing)


@contextmanager
def interrupts_kept() -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt if Ctrl-C came: Python drops what is raised in finalizers and callbacks of
    weak references, where a signal that comes during a collection of garbage is heard."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def look() -> None:
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield look
        return

    def hear(number, frame):
        came.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, hear)
    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible(stopped: str, out_of_memory: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Yields `on_progress` for `evaluate`.

    Args:
        stopped: the message where SIGTERM or Ctrl-C stops the evaluation.
        out_of_memory: makes the message where memory does not suffice.

    Raises:
        Stopped: a signal came. InputError: out of memory. PeerError: another process of the job ended.
    """
    stopping = f"spat-train: stopping after this run or part of an attack, whose batch is attacked again: {stopped}"
    with GracefulStop(stopping).heard() as wish:

        def on_progress() -> None:
            if wish.number:
                raise Stopped(wish.number, f"stopped by signal {wish.number}: {stopped}")

        try:
            yield on_progress
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise InputError(out_of_memory()) from error
            if is_of_a_peer(error):
                raise PeerError(f"another process ended, and may say why ({first_line(error)}): {stopped}") from error
            raise


_watched: list[int] = []


os.register_at_fork(after_in_child=lambda: _watched and signal.set_wakeup_fd(-1))  # signals of a forked process are its own
