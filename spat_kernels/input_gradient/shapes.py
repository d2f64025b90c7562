"""The shapes of traced values, for models that look at them: `if x.shape[-1] < 7`, padding that depends on the size.

Symbols know no sizes. So the graph as far as it is traced is evaluated without data (fake tensors) on two batches of different
size. A dimension that is the same in both is a number to the model's code. One that differs depends on the batch and stays a
symbol, on which no code can branch.
"""

import copy
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Size = tuple[int | None, ...]  # None: depends on the batch


class Shapes:
    """What the nodes of a graph that is being traced give for images like `x` [B, ...].

    Args:
        root: the model.
        x: images; their batch size does not matter.
        batches: two sizes that are unlike other dimensions.
    """

    def __init__(self, root: nn.Module, x: Tensor, batches: tuple[int, int]):
        self.root, self._mode = root, FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._images = [torch.empty(b, *x.shape[1:], dtype=x.dtype, device=x.device) for b in batches]
        self._values: list[dict[torch.fx.Node, Any]] = [{}, {}]
        self._last: list[torch.fx.Node | None] = [None, None]  # the last that was evaluated

    def of(self, node: torch.fx.Node) -> Size | None:
        """The shape of the tensor that `node` gives; None: it gives no tensor, or nothing that is known."""
        first, second = (self._value(k, node) for k in (0, 1))
        if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.ndim != second.ndim:
            return None
        return tuple(a if a == b else None for a, b in zip(first.shape, second.shape, strict=True))

    def parts(self, node: torch.fx.Node) -> int | None:
        """How many values `node` gives, where these are several."""
        first, second = (self._value(k, node) for k in (0, 1))
        several = isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)) and len(first) == len(second)
        return len(first) if several else None

    def _value(self, k: int, node: torch.fx.Node) -> Any:
        values = self._values[k]
        while node not in values:  # in order, since what works in place comes before what reads it
            last = self._last[k]
            n = self._last[k] = next(iter(node.graph.nodes)) if last is None else last.next
            values[n] = self._evaluate(k, n)
        return values[node]

    def _evaluate(self, k: int, n: torch.fx.Node) -> Any:
        """What `n` gives, or None where that fails: what is read of it then stays a symbol."""
        values = self._values[k]
        if n.op == "placeholder":
            return n.args[0] if n.args else self._images[k]
        if n.op == "get_attr":
            path, _, name = str(n.target).rpartition(".")
            return self._fake(getattr(self.root.get_submodule(path), name, None))
        args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), values.get)
        module = self.root.get_submodule(str(n.target)) if n.op == "call_module" else None
        if module is not None and module.training and any(True for _ in module.buffers()):
            module = copy.deepcopy(module)  # it may count
        try:
            with self._mode, torch.no_grad():
                if module is not None:
                    return module.forward(*args, **kwargs)
                if n.op == "call_method":
                    return getattr(args[0], str(n.target))(*args[1:], **kwargs)
                assert callable(n.target)
                return n.target(*args, **kwargs)
        except Exception:  # whatever a model's functions raise: the shape stays a symbol
            return None

    def _fake(self, value: Any) -> Any:
        return self._mode.from_tensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value
