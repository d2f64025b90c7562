"""SIGTERM and Ctrl-C as a wish that is looked at between two steps."""

import os
import signal
import threading
from contextlib import contextmanager


class Stopped(Exception):
    """The run was asked to stop, and has saved."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class StopWish:
    """Says `text` when it hears one.

    Attributes:
        number: of the signal that came, 0: none.
    """

    def __init__(self, text: str = "spat-train: stopping after this step, to save"):
        self.number, self.text = 0, text

    @contextmanager
    def heard(self):
        """Within, SIGTERM and SIGINT are remembered in `number`; a second Ctrl-C acts as ever.

        A second SIGTERM does not: torchrun and batch systems send it to a process twice, on its own and by its parent.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python delivers signals to the main thread alone
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def hear(number, frame):
            self.number = number
            os.write(2, f"\n{self.text}\n".encode())
            signal.signal(signal.SIGINT, before[signal.SIGINT])

        for number in before:
            signal.signal(number, hear)
        try:
            yield self
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)
