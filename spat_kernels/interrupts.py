"""Signals wait while an attack holds something of others: their handlers run at a safe moment, or at its end.

Python runs the handlers of signals in the main thread, between any two bytecodes: in the middle of `__exit__` too, or before its
first line. A handler that raises, as that of Ctrl-C does, can thus leave out whatever was to be put back. No `finally` helps, so
handlers are made to wait: within `deferred`, all that are Python functions are replaced by `_hear`, which only notes the signal.
`check()` and `hearing`, around code of a user's, let them run, as they would without an attack. Whatever a handler raises
there is raised by plain code, which may count on `with` and `finally`: from then on signals wait again.

Signals are the main thread's alone. Elsewhere all this does nothing, nor does it see what other means than signals raise.
Locks that are not to hang in a forked process are made by `lock`.
"""

import os
import sys
import threading
import time
import weakref

# The module `signal` looks each number and handler up in an enum, which is slow.
from _signal import getsignal, signal, valid_signals  # type: ignore[import-not-found]
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 2.0  # seconds after which a signal that comes again waits no longer
_NUMBERS = sorted(valid_signals())
_replaced: dict[int, Any] = {}  # the handlers of others, by signal
_waiting: dict[int, float] = {}  # signals that came, and when
_main = threading.main_thread().ident


class _State:
    """Of the main thread.

    Attributes:
        depth: how many `deferred` are entered.
        open: whether handlers run at once: within `hearing`, until one raises.
        raised: what a handler raised, and whose way out may be hidden by an `except` of ours.
    """

    depth = 0
    open = True
    raised: BaseException | None = None


def _hear(number: int, frame: FrameType | None) -> None:
    """The handler of all signals within `deferred`. Where it is left behind by accident, it does what the one before it did."""
    now = time.monotonic()
    if not _State.open and now - _waiting.setdefault(number, now) < PATIENCE:
        return
    _waiting.pop(number, None)
    _run(number, frame)


def _run(number: int, frame: FrameType | None) -> None:
    was_open, _State.open = _State.open, not _State.depth  # what is raised is not disturbed on its way
    try:
        _replaced[number](number, frame)
    except BaseException as error:
        if _State.depth:
            _State.raised = error
        raise
    if _State.depth:
        _replace(number)  # it may have set another handler
    _State.open = was_open


def _replace(number: int) -> None:
    handler = getsignal(number)
    if callable(handler) and handler is not _hear:
        _replaced[number] = handler
        signal(number, _hear)


def _put_back() -> None:
    for number, handler in list(_replaced.items()):
        if getsignal(number) is _hear:
            signal(number, handler)


class _Deferred(ContextDecorator):
    """Within, signals wait. It may be entered again inside."""

    def __init__(self) -> None:
        self._outer: list[bool] = []  # whether signals waited outside of each

    def __enter__(self) -> None:
        if threading.get_ident() != _main:
            return
        if _State.depth:
            was_open, _State.open = _State.open, False
            self._outer.append(was_open)
            _State.depth += 1
            return
        try:
            for number in [n for n in _NUMBERS if callable(getsignal(n))]:
                _replace(number)
        except BaseException:
            _put_back()
            raise
        _State.open, _State.depth = False, 1

    def __exit__(self, kind, error, trace) -> None:
        if threading.get_ident() != _main:
            return
        if _State.depth > 1:
            was_open = self._outer.pop()
            _State.depth -= 1
            if _State.raised is None:
                _State.open = was_open
            return
        hidden, _State.raised, _State.depth = _State.raised, None, 0
        try:
            _run_waiting(sys._getframe(1))
            if hidden is not None and kind is None:
                raise hidden
        finally:
            _State.open = True
            try:
                _put_back()
            finally:  # a handler that was put back may have raised
                _put_back()


def _run_waiting(frame: FrameType | None) -> None:
    """The handlers of all signals that wait, each also after one that raises."""
    if _waiting:
        number = next(iter(_waiting))
        del _waiting[number]
        try:
            _run(number, frame)
        finally:
            _run_waiting(frame)


def check() -> None:
    """A safe moment: the handlers of signals that wait run here. What one has raised, and an `except` has hidden, comes again."""
    if (_waiting or _State.raised is not None) and threading.get_ident() == _main and _State.depth:
        if _State.raised is not None:
            raise _State.raised
        _run_waiting(sys._getframe(1))


class _Hearing:
    """Within, handlers run when signals come, also inside of `deferred`: for code of a user's, which may take its time."""

    def __enter__(self) -> None:
        if threading.get_ident() == _main and _State.depth:
            check()
            _State.open = True

    def __exit__(self, kind, error, trace) -> None:
        if threading.get_ident() == _main and _State.depth:
            _State.open = False
            if kind is None:
                _State.raised = None  # the user's code has caught it


deferred, hearing = _Deferred(), _Hearing()


# ---- fork

FORK = 5.0  # seconds that a fork waits at most for each lock
_locks: "weakref.WeakValueDictionary[int, threading.RLock]" = weakref.WeakValueDictionary()
_taken: "list[threading.RLock]" = []


def lock() -> "threading.RLock":
    """A lock that is free in forked processes, or held by the thread that forked: a fork waits until other threads let it go."""
    made = threading.RLock()
    _locks[id(made)] = made
    return made


class _Passes(threading.local):
    """Of each thread: `lock` is held while a pass of a model runs."""

    def __init__(self) -> None:
        self.lock = lock()


_passes = _Passes()


def unforked(function: Callable[P, T]) -> Callable[P, T]:
    """Other threads fork before or after a call, not meanwhile: PyTorch's own locks, as oneDNN's, would stay locked there."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _passes.lock:
            return function(*args, **kwargs)

    return call


def acquire(held: "threading.RLock") -> None:
    """Acquire a lock that may be held for long. Signals are heard meanwhile."""
    while not held.acquire(timeout=0.05):
        check()


def _before_fork() -> None:
    _taken.extend(held for ref in _locks.valuerefs() if (held := ref()) is not None and held.acquire(timeout=FORK))


def _after_fork() -> None:
    while _taken:
        _taken.pop().release()


def _after_fork_in_child() -> None:
    """The thread that forked is the main one now. Others did not come along, nor did their attacks."""
    global _main
    for ref in _locks.valuerefs():
        if (held := ref()) is not None and held not in _taken:
            held._at_fork_reinit()  # type: ignore[attr-defined]
    _after_fork()
    if _main != threading.get_ident():
        _main = threading.get_ident()
        _waiting.clear()
        _State.depth, _State.open, _State.raised = 0, True, None
        deferred._outer.clear()
        _put_back()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
