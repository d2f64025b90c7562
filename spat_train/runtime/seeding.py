"""Seeds that are functions of where they are used, so that nothing depends on what ran before."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*key: object) -> int:
    """63 bits of a hash of `key`. Hashed, because torch's CPU generator takes the low 32 bits."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def model_draws(device: torch.device, *key: object) -> Iterator[None]:
    """Within: what a model on `device` draws from torch's global generators is a function of `key`. Then they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index])
        for generator in generators:  # torch.manual_seed would seed all devices, and only these are restored
            generator.manual_seed(derived_seed(*key))
        yield
