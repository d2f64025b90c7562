"""Random numbers: drawing them beside captures, and the states of generators before and after."""

import random
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from . import interrupts

# Held while random numbers are drawn, and during a capture: torch forbids other threads to draw from a generator meanwhile.
rng_lock = interrupts.lock()


def draw(method: str, *size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Random numbers [*size] on `device` by the in-place `method`, from `generator` wherever it lives (None: the device's)."""
    empty = torch.empty(size, dtype=dtype, device=device if generator is None else generator.device)
    with rng_lock:
        return getattr(empty, method)(generator=generator).to(device)


def default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextmanager
def rewound_on_error(*generators: torch.Generator | None):
    """Within: whatever raises leaves the states of `generators` as they were before."""
    with interrupts.deferred:
        with rng_lock:
            states = [(g, g.get_state()) for g in generators if g is not None]
        try:
            yield
            interrupts.check()
        except BaseException:
            with rng_lock:
                for generator, state in states:
                    generator.set_state(state)
            raise


def states() -> tuple:
    """The states of Python's, torch's and NumPy's global generators on the host.

    Code of a model may draw from them. A trace or a capture would freeze what it drew.
    """
    return random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002, models may use that one


def restore(before: tuple) -> bool:
    """Restore `before`, from `states`. Return whether anything was drawn since."""
    (python, torchs, (_, *numpys)), (python_now, torchs_now, (_, *numpys_now)) = before, states()
    if python == python_now and torch.equal(torchs, torchs_now) and all(map(np.array_equal, numpys, numpys_now)):
        return False
    random.setstate(python)
    torch.set_rng_state(torchs)
    np.random.set_state(before[2])  # noqa: NPY002
    return True
