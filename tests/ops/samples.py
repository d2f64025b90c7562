"""Arguments for every op: what the `samples` of the test files give."""

import pkgutil
from importlib import import_module

import torch

from tests import ops


def all_samples(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[tuple[str, tuple]]:
    """(op, arguments), with and without the optional ones."""
    names = [found.name for found in pkgutil.iter_modules(ops.__path__) if found.name.startswith("test_")]
    sources = [getattr(import_module(f"{ops.__name__}.{name}"), "samples", None) for name in names]
    with torch.device(device):
        return [sample for source in sources if source for sample in source(dtype)]
