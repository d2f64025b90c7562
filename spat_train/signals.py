"""SIGTERM and Ctrl-C as a wish that is looked at between two steps."""

import os
import signal
import threading
import time
from contextlib import contextmanager

COPY = 2.0  # seconds: torchrun and batch systems send SIGTERM to a process twice, on its own and by its parent
LONGEST = 30.0  # seconds that such a pair leaves for the save, as torchrun and Slurm do before they send SIGKILL


class Stopped(BaseException):
    """The run was asked to stop, and has saved. Like KeyboardInterrupt, no `except Exception` takes it for a fault."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


class StopWish:
    """Says `text` when it hears one.

    Attributes:
        number: of the signal that came, 0: none.
        heeded: whether a loop looks at `number`; until then a signal raises Stopped where it arrives.
    """

    def __init__(self, text: str = "spat-train: stopping after this step, to save", heeded: bool = True):
        self.number, self.text, self.heeded = 0, text, heeded

    @contextmanager
    def heard(self):
        """Within, SIGTERM and SIGINT are remembered in `number`; a second Ctrl-C acts as ever.

        A second SIGTERM ends the process at once, saved or not: the loop may wait for something that never comes. One within COPY
        is taken for the same wish, and ends it after LONGEST.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python delivers signals to the main thread alone
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        first = 0.0

        def end(number):
            os.write(2, b"\nspat-train: ended by a second signal; what was saved before is whole\n")
            os._exit(128 + number)

        later = threading.Timer(LONGEST, end, [signal.SIGTERM])
        later.daemon = True

        def hear(number, frame):
            nonlocal first
            if self.number:
                if time.monotonic() - first > COPY:
                    end(number)
                elif not later.ident:
                    later.start()
                return
            self.number, first = number, time.monotonic()
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            if not self.heeded:
                raise Stopped(number, f"stopped by signal {number} before the first step: there is nothing to save")
            os.write(2, f"\n{self.text}\n".encode())

        for number in before:
            signal.signal(number, hear)
        try:
            yield self
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)
            later.cancel()
