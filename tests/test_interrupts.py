"""Signals whose handlers raise, at any moment of an attack, and forks while another thread attacks."""

import os
import random
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import spat_kernels
from spat_kernels import interrupts
from spat_kernels.interrupts import check, deferred
from spat_kernels.model_state.borrow import borrowed

X, Y = torch.rand(6, 3, 12, 12), torch.randint(10, (6,))
CALL, GET = nn.Module.__call__, nn.Module.__getattr__
SOON = 20.0  # seconds within which a child must end


class Stop(KeyboardInterrupt):
    pass


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )


def state(m: nn.Module) -> tuple:
    """What an attack borrows: of the model, of torch, and of nn.Module."""
    of_model = [q.training for q in m.modules()], [p.requires_grad for p in m.parameters()], [id(b) for b in m.buffers()]
    of_torch = torch.is_grad_enabled(), torch._C._len_torch_function_stack(), torch.is_autocast_enabled("cpu")
    return of_model, of_torch, nn.Module.__call__ is CALL, nn.Module.__getattr__ is GET


@contextmanager
def handling(handler, *numbers: int):
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop(number, frame):
    raise Stop


@pytest.mark.parametrize("kind", ["PGD", "APGD", "Square", "FAB", "ADT"])
def test_random_numbers_are_rewound(kind):
    """A signal at the second forward, when the start is drawn, and one that waits for the end of the call's last forward."""
    m, forwards = model().eval(), []
    y = m(X).argmax(1)
    attack = getattr(spat_kernels, kind)(0.05, input_gradient="autograd", generator=torch.Generator())
    with handling(stop, signal.SIGUSR1):
        for nth in (2, 1):

            def signalled(x, nth=nth):
                forwards.append(len(x))
                if len(forwards) == nth or nth == 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                return m(x)

            forwards.clear()
            before = torch.get_rng_state(), attack.generator.get_state()
            with pytest.raises(Stop):
                attack(signalled, X, y)
            assert torch.equal(before[0], torch.get_rng_state())
            assert torch.equal(before[1], attack.generator.get_state())


@pytest.mark.parametrize("path", ["auto", "autograd"])
def test_a_handler_that_raises_at_any_moment_leaves_nothing_changed(path):
    rng, landed = random.Random(0), 0
    began = time.perf_counter()
    spat_kernels.pgd(model(), X, Y, 0.05, steps=2, input_gradient=path)
    longest = time.perf_counter() - began
    with handling(stop, signal.SIGALRM):
        for _ in range(40):
            m = model()
            before = state(m)
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, longest))
            try:
                spat_kernels.pgd(m, X, Y, 0.05, steps=2, input_gradient=path)
            except Stop:
                landed += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert state(m) == before
            assert signal.getsignal(signal.SIGALRM) is stop
            assert not interrupts._depths
    assert landed > 0


def test_signals_wait_until_a_safe_moment():
    with handling(stop, signal.SIGUSR1):
        reached = []
        with pytest.raises(Stop), deferred:
            os.kill(os.getpid(), signal.SIGUSR1)
            reached.append("after the signal")
            check()
            reached.append("after the check")
        assert reached == ["after the signal"]
        assert signal.getsignal(signal.SIGUSR1) is stop


def test_at_the_end_all_handlers_run_also_after_one_that_raises():
    heard = []

    def hear(number, frame):
        heard.append(number)
        raise Stop

    with handling(hear, signal.SIGUSR1, signal.SIGUSR2):
        with pytest.raises(Stop), deferred, deferred:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            assert not heard
        assert sorted(heard) == sorted([signal.SIGUSR1, signal.SIGUSR2])


def test_a_timeout_of_the_users_is_no_fault_of_the_model():
    """An ordinary exception of a handler, in the first forward, which a plan is made in: no plan is given up for it."""

    def late(number, frame):
        raise TimeoutError("enough")

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.kills = model(), True

        def forward(self, x):
            if self.kills:
                os.kill(os.getpid(), signal.SIGUSR1)
            return self.net(x)

    m = Slow()
    with handling(late, signal.SIGUSR1), pytest.raises(TimeoutError, match="enough"):
        spat_kernels.pgd(m, X, Y, 0.05, steps=1)
    m.kills = False
    assert spat_kernels.explain(m, X).path == "plan"


def test_a_signal_that_comes_again_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(interrupts, "PATIENCE", 0.01)
    with handling(stop, signal.SIGUSR1), pytest.raises(Stop), deferred:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR1)
        pytest.fail("it waits")


def test_a_handler_may_set_another():
    with handling(lambda number, frame: signal.signal(signal.SIGUSR1, stop), signal.SIGUSR1):
        with pytest.raises(Stop), deferred:
            os.kill(os.getpid(), signal.SIGUSR1)
            check()
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signal.getsignal(signal.SIGUSR1) is stop


def forked(function) -> int:
    """The exit status of a child that calls `function`; it is killed where it hangs."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_attacks_what_another_thread_attacks():
    m, ends = model().eval(), threading.Event()
    spat_kernels.pgd(m, X, Y, 0.05, steps=1)  # plans are made with autograd, which forked processes must not use

    def attack() -> bool:
        return spat_kernels.pgd(m, X, Y, 0.05, steps=2).shape == X.shape

    def until_the_end():
        while not ends.is_set():
            attack()

    thread = threading.Thread(target=until_the_end)
    thread.start()
    try:
        assert [forked(attack) for _ in range(4)] == [0] * 4
    finally:
        ends.set()
        thread.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_waits_for_a_safe_moment_and_others_wait_for_the_fork():
    locks, held, seen = [threading.Lock(), interrupts.lock()], threading.Event(), []

    def attack():
        with deferred:
            with locks[0]:
                held.set()
                time.sleep(0.1)  # as in a pass
            with locks[1]:  # as while a plan is made
                for _ in range(200):
                    check()
                    seen.append(bool(interrupts._forking))
                    time.sleep(0.001)

    thread = threading.Thread(target=attack)
    thread.start()
    held.wait()
    assert forked(lambda: all(lock.acquire(timeout=1) for lock in locks)) == 0
    thread.join()
    assert seen
    assert not any(seen)
    assert [interrupts._depths, interrupts._forking, interrupts._resting] == [{}, set(), set()]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_signals_that_wait_are_those_of_the_process_that_got_them():
    with handling(stop, signal.SIGUSR1), pytest.raises(Stop), deferred:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert forked(lambda: check() or True) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_back_what_another_thread_has_borrowed(monkeypatch):
    monkeypatch.setattr(interrupts, "FORK", 0.01)
    m, has_it, ends = model(), threading.Event(), threading.Event()

    def hold():
        with borrowed(m, "eval"):
            has_it.set()
            ends.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    has_it.wait()
    try:
        assert forked(lambda: all(q.training for q in m.modules()) and all(p.requires_grad for p in m.parameters())) == 0
        assert not m.training, "the parent's is still lent"
    finally:
        ends.set()
        thread.join()
