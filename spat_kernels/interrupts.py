"""Safe moments of attacks, for which signals and forks wait.

Python runs the handlers of signals in the main thread, between any two bytecodes: in the middle of `__exit__` too, or before its
first line. A handler that raises, as that of Ctrl-C does, can thus leave out whatever was to be put back, and no `finally`
helps. So handlers wait within `deferred`, until a forward begins (`check`), or until the end.

Promised: Ctrl-C, and whatever else the handlers of signals raise, leaves models, PyTorch and random numbers as they were. That
may take as long as a forward and a backward, or the making of a plan, a compilation or a capture.
Not promised: a safe moment for a signal that comes again after `PATIENCE`, since that waits no longer. Real-time signals, and
what debuggers and other threads raise in this one, never wait.

A forked process has the locks of other threads, in PyTorch and oneDNN too, as they were, and nobody to unlock them. So a fork
waits until the attacks of all other threads are at a safe moment, but not for longer than `FORK`.
"""

import os
import signal as signals
import sys
import threading
import time
from _signal import getsignal, signal  # type: ignore[import-not-found]  # those of `signal` look everything up in an enum
from contextlib import ContextDecorator
from threading import get_ident
from types import FrameType
from typing import Any

PATIENCE = 1.0  # seconds after which a signal that comes again waits no longer
FORK = 5.0  # seconds
_NUMBERS = [int(number) for number in sorted(signals.valid_signals()) if number < getattr(signals, "SIGRTMIN", signals.NSIG)]
_main = threading.main_thread().ident
_depths: dict[int, int] = {}  # how many `deferred` each thread is in
_replaced: dict[int, Any] = {}  # the handlers of others, by signal
_waiting: dict[int, float] = {}  # signals that came, and when
_raised: Exception | None = None  # by a handler in `check`
_forking: set[int] = set()  # threads
_resting: set[int] = set()  # threads at a safe moment


class _Deferred(ContextDecorator):
    """Within, signals wait. It may be entered again inside."""

    def __enter__(self) -> None:
        me = get_ident()
        depth = _depths[me] = _depths.get(me, 0) + 1
        if depth > 1:
            return
        try:
            if me == _main:
                _replace_handlers()
            _let_others_fork(me)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error) -> None:
        global _raised
        me = get_ident()
        if _depths[me] > 1:
            _depths[me] -= 1
        elif me != _main:
            del _depths[me]
        else:
            try:
                _put_handlers_back()
            finally:
                _raised = None
                del _depths[me]
                _run_waiting()


deferred = _Deferred()


def check() -> None:
    """A safe moment: signals that wait are handled, and other threads may fork."""
    if (_waiting or _forking) and (me := get_ident()) in _depths:
        if me == _main:
            _handle_waiting()
        _let_others_fork(me)


def reraise(error: Exception) -> None:
    """Raise `error` again if a handler raised it in `check`: then it is no fault of the model's."""
    if error is _raised:
        raise error


def _replace_handlers() -> None:
    for number in _NUMBERS:
        handler = getsignal(number)
        if callable(handler) and handler is not _hear:
            _replaced[number] = handler
            signal(number, _hear)


def _put_handlers_back() -> None:
    """A handler that was put back may raise before the others are."""
    try:
        for number, handler in _replaced.items():
            if getsignal(number) is _hear:
                signal(number, handler)
    finally:
        for number, handler in _replaced.items():
            if getsignal(number) is _hear:
                signal(number, handler)


def _hear(number: int, frame: FrameType | None) -> None:
    """The handler of all signals within `deferred`. Where it is left behind by accident, it does what the one before it did."""
    now = time.monotonic()
    if _main not in _depths or now - _waiting.setdefault(number, now) > PATIENCE:
        _waiting.pop(number, None)
        _replaced[number](number, frame)


def _handle_waiting() -> None:
    global _raised
    try:
        _run_waiting()
    except Exception as error:
        _raised = error
        raise
    finally:
        _replace_handlers()  # one may have set others


def _run_waiting() -> None:
    """The handlers of all signals that wait, each also after one that raises."""
    if not _waiting:
        return
    number = next(iter(_waiting))
    del _waiting[number]
    try:
        _replaced[number](number, sys._getframe(1))
    finally:
        _run_waiting()


# ---- fork


def lock() -> "threading.RLock":
    """A lock that is free in forked processes, unless the thread that forked holds it."""
    made = threading.RLock()
    os.register_at_fork(after_in_child=lambda: made._is_owned() or made._at_fork_reinit())  # type: ignore[attr-defined]
    return made


def _let_others_fork(me: int) -> None:
    if _forking:
        _resting.add(me)
        try:
            while _forking:
                time.sleep(0.001)
        finally:
            _resting.discard(me)


def _before_fork() -> None:
    me, end = get_ident(), time.monotonic() + FORK
    _forking.add(me)
    _resting.add(me)
    while not _resting.issuperset(_depths) and time.monotonic() < end:
        time.sleep(0.001)


def _after_fork() -> None:
    _forking.discard(get_ident())
    _resting.discard(get_ident())


def _after_fork_in_child() -> None:
    """The thread that forked is the main one now. Others did not come along, nor did their attacks."""
    global _main
    me = get_ident()
    for other in _depths.keys() - {me}:
        del _depths[other]
    for left in (_forking, _resting, _waiting):
        left.clear()
    if _main != me:
        _main = me
        _put_handlers_back()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
