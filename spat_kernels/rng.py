"""The random states of the host, which code of a model may draw from where a trace or a capture would freeze what it drew."""

import random

import numpy as np
import torch


def states() -> tuple:
    """The states of Python's, torch's and NumPy's global generators."""
    return random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002, models may use that one


def restore(before: tuple) -> bool:
    """Restore `before`, from `states`; return whether anything had been drawn since."""
    (python, torchs, (_, *numpys)), (python_now, torchs_now, (_, *numpys_now)) = before, states()
    if python == python_now and torch.equal(torchs, torchs_now) and all(map(np.array_equal, numpys, numpys_now)):
        return False
    random.setstate(python)
    torch.set_rng_state(torchs)
    np.random.set_state(before[2])  # noqa: NPY002
    return True
