"""SIGTERM and Ctrl-C as a wish that is looked at between two steps."""

import signal
import threading
from contextlib import contextmanager


class Stopped(Exception):
    """The run was asked to stop, and has saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class StopWish:
    number = 0  # of the signal that came, 0: none

    @contextmanager
    def heard(self):
        """Within, the first SIGTERM or SIGINT is remembered in `number`; a second one acts as ever."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python delivers signals to the main thread alone
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def hear(number, frame):
            self.number = number
            for n, handler in before.items():
                signal.signal(n, handler)

        for number in before:
            signal.signal(number, hear)
        try:
            yield self
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)
