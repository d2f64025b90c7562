"""The blocks of a network, and activation checkpointing by them (Chen et al., arXiv 1604.06174)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .optim import restored

HOLDERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, such as its residual or transformer blocks, none inside of another.

    A block is a composite module in a container, a container being one of torch's, or a module whose children are all composite
    and of one class. What holds a container with two blocks of one class is a stage, and no block itself.
    """
    found: list[nn.Module] = []

    def walk(module: nn.Module, contained: bool) -> None:
        if contained and _is_composite(module) and not any(map(_repeats, module.modules())):
            found.append(module)
            return
        for child in module.children():
            if child not in found:  # shared by two parents
                walk(child, _is_container(module))

    walk(model, False)
    return found


def _is_composite(module: nn.Module) -> bool:
    return not isinstance(module, HOLDERS) and next(module.children(), None) is not None


def _is_container(module: nn.Module) -> bool:
    children = list(module.children())
    return isinstance(module, HOLDERS) or (all(map(_is_composite, children)) and len(set(map(type, children))) == 1)


def _repeats(module: nn.Module) -> bool:
    kinds = [type(child) for child in module.children() if _is_composite(child)]
    return _is_container(module) and len(set(kinds)) < len(kinds)


class Checkpointing:
    """`with Checkpointing(model)():` for a backward the model keeps only the inputs of its blocks, and computes the rest again.

    Forwards are exchanged only within: outside of it the model is what it was, without hooks and under the same names.

    Raises:
        InputError: the model has no blocks.
    """

    def __init__(self, model: nn.Module):
        blocks = find_blocks(model)
        if len(blocks) < 2:
            remedy = "leave it out; --accumulate needs less memory with any network"
            raise InputError(f"--checkpoint-activations True: {type(model).__name__} has no repeated blocks: {remedy}")
        self.forwards = [(block, _checkpointed(block)) for block in blocks]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = [vars(block).get("forward") for block, _ in self.forwards]
        try:
            for block, forward in self.forwards:
                block.forward = forward
            yield
        finally:
            for (block, _), own in zip(self.forwards, before, strict=True):
                if own is None:
                    del block.forward
                else:
                    block.forward = own


def _checkpointed(block: nn.Module) -> Callable:
    forward = block.forward

    def run(*args, **kwargs):
        args, kwargs = tree_map(lambda value: value, (args, kwargs))  # lists that the model goes on to fill (DenseNet)
        buffers = list(block.buffers()) if block.training else []
        before = [b.detach().clone() for b in buffers]

        @contextmanager
        def again():
            with restored(buffers):  # batch norm's statistics move once; spectral norm goes on from the same vectors
                for b, value in zip(buffers, before, strict=True):
                    b.copy_(value)
                yield

        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)

    return run
