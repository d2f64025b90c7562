"""A CUDA graph without a GPU, as honest as it can be made: it replays ATen calls on the memory that they were captured with."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# What would have to wait for the device, to tell the host.
SYNCHRONISING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2"}


def captured_and_eager(kind, eps, model, x, y, seed: int = 1, graph: bool | str = True, **settings) -> list:
    """What the attack `kind(eps, **settings)` gives with `graph` and without a graph, from the same seed."""
    found = []
    for choice in (graph, False):
        torch.manual_seed(seed)
        found.append(kind(eps, graph=choice, **settings)(model, x, y))
    return found


class FakeGraph:
    """Stands in for `CudaGraph` on CPU tensors.

    Each call is recorded with aliases of its very arguments and results: a tensor that is pointed to other memory later
    (`p.data = new`) is not followed, Python numbers are what they were, and nothing of Python runs again. Reading a value during
    the capture is an error. Memory that the capture allocated holds NaN before each replay, so that nothing can rely on what the
    capture computed: CUDA computes nothing then.
    """

    device_type = "cpu"

    def __init__(self, device):
        self.calls, self.own = [], []

    @contextmanager
    def here(self):
        yield

    def capture(self, function):
        random = torch.get_rng_state()
        try:
            with _Recorder(self):
                function()
        finally:
            torch.set_rng_state(random)

    def replay(self):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # it has cast already what was recorded
            for t in self.own:
                t.fill_(torch.nan if t.is_floating_point() else 1)
            for function, args, kwargs, results in self.calls:
                for result, value in zip(results, _tensors(function(*args, **kwargs)), strict=True):
                    if result.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                        result.copy_(value)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in SYNCHRONISING:
            raise RuntimeError(f"{function}: operation not permitted when stream is capturing")
        arguments = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        out = function(*args, **kwargs)
        results = [t.detach() for t in _tensors(out)]
        before = {t.untyped_storage().data_ptr() for t in _tensors(arguments)}
        # `lift_fresh` brings in what Python has put into memory already: a constant.
        if function is not torch.ops.aten.lift_fresh.default:
            self.graph.own += [t for t in results if t.untyped_storage().data_ptr() not in before]
        self.graph.calls.append((function, *arguments, results))
        return out


def _tensors(tree) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
