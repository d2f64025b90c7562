"""Seeds derived from where they are used, so that nothing depends on what ran before, and the state of all generators."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derived_seed(*key: object) -> int:
    """63 bits of a hash of `key`. Hashed, because torch's CPU generator takes the low 32 bits."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def model_draws(device: torch.device, *key: object) -> Iterator[None]:
    """Within, torch's global generators are seeded by `key`, for models that draw. Afterwards they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index])
        for generator in generators:  # torch.manual_seed would seed all devices, and only these are restored
            generator.manual_seed(derived_seed(*key))
        yield


def random_state() -> dict:
    """The state of every generator that a model may draw from, in types that torch.load(weights_only=True) reads."""
    state = np.random.get_state(legacy=False)  # noqa: NPY002
    words = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (state["bit_generator"], words, state["state"]["pos"], state["has_gauss"], state["gauss"]),
        "python": random.getstate(),
    }


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
