"""What a plan reads of a model besides its images: parameters, buffers, and what the model computes of those alone.

All of it is named and never held. A `Computed` is the part of a model's graph that makes, say, a table of relative positions or
standardised weights, and runs again at every `prepare`. Where the model's code asks for the number of samples, as in
cls_token.expand(len(x), -1, -1), it gets 1: such a constant is the same for every sample, and broadcasts.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

if TYPE_CHECKING:
    from .nodes import Network


class CannotPlan(Exception):
    """Why a model does not take the plan."""


@dataclass(frozen=True)
class Ref:
    """A parameter or buffer, as the path of its module and its name there."""

    path: str
    name: str

    def of(self, modules: dict[str, nn.Module]) -> Tensor:
        return getattr(modules[self.path], self.name)

    @staticmethod
    def named(model: nn.Module, target: str) -> "Ref":
        path, _, name = target.rpartition(".")
        if name.startswith("_tensor_constant") and not hasattr(model.get_submodule(path), name):
            raise CannotPlan("a tensor that is no parameter, buffer or attribute of the model takes part")
        return Ref(path, name)


@dataclass(frozen=True)
class Slot:
    """The result of an earlier call of the same program."""

    index: int


@dataclass(frozen=True, eq=False)
class Call:
    """One operation: `target` is a function, the name of a method, or the path of a module."""

    op: str
    target: Any
    args: tuple
    kwargs: dict


@dataclass(frozen=True, eq=False)
class Computed:
    """A program whose last call gives the constant."""

    calls: tuple["Call | Ref | Computed", ...]

    def of(self, modules: dict[str, nn.Module]) -> Tensor:
        results: list = []
        for call in self.calls:
            if not isinstance(call, Call):
                results.append(call.of(modules).detach())
                continue
            args, kwargs = torch.utils._pytree.tree_map(
                lambda a: results[a.index] if type(a) is Slot else a, (call.args, call.kwargs)
            )
            if call.op == "call_method":
                results.append(getattr(args[0], call.target)(*args[1:], **kwargs))
            else:
                function = modules[call.target] if call.op == "call_module" else call.target
                results.append(function(*args, **kwargs))
        return results[-1]


Constant = Ref | Computed


class Single:
    """What each fx node gives for one sample."""

    def __init__(self, module: torch.fx.GraphModule, probe: Tensor):
        interpreter = torch.fx.Interpreter(module, garbage_collect_values=False)
        interpreter.run(probe[:1].clone())
        self._env = interpreter.env

    def value(self, n: torch.fx.Node) -> Any:
        return self._env[n]


def computed(net: "Network", last: torch.fx.Node) -> Computed:
    """The program that makes the constant `last`.

    Raises:
        CannotPlan: it is not the same for all samples.
    """
    calls: list[Call | Ref] = []
    slots: dict[torch.fx.Node, Slot] = {}

    def add(n: torch.fx.Node):
        """The argument that stands for `n`."""
        if n in net.asked:
            return _single(net).value(n)
        value = net.env[n]
        if n.op == "placeholder" or not (isinstance(value, Tensor) or _holds_tensors(value)):
            return value
        if n not in slots:
            if n.op == "get_attr":
                calls.append(Ref.named(net.model, str(n.target)))
            else:
                if n.op == "call_module" and net.model.get_submodule(str(n.target)).training:
                    raise CannotPlan(f"{n.target} computes a constant in training mode")
                arguments = torch.fx.node.map_arg((n.args, n.kwargs), add)
                calls.append(Call(n.op, n.target, *_plain_containers(arguments)))
            slots[n] = Slot(len(calls) - 1)
        return slots[n]

    add(last)
    of_one, of_all = _single(net).value(last), net.env[last]
    count = len(of_all) // max(len(of_one), 1) if of_one.ndim else 1
    alike = of_one if of_one.shape == of_all.shape else of_one.repeat(count, *[1] * (of_one.ndim - 1))
    if alike.shape != of_all.shape or not torch.equal(alike.nan_to_num(), of_all.nan_to_num()):
        raise CannotPlan(f"{last.name} is computed of parameters, but not the same for every sample")
    return Computed(tuple(calls))


def _single(net: "Network") -> Single:
    if net.single is None:
        net.single = Single(net.module, net.probe)
    return net.single


def _holds_tensors(value) -> bool:
    return isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)


def _plain_containers(a):
    """fx's immutable lists and dicts as Python's own."""
    if isinstance(a, dict):
        return {k: _plain_containers(v) for k, v in a.items()}
    if isinstance(a, (list, tuple)) and type(a) is not torch.Size:
        parts = [_plain_containers(v) for v in a]
        return tuple(parts) if isinstance(a, tuple) else parts
    if isinstance(a, slice):
        return slice(*map(_plain_containers, (a.start, a.stop, a.step)))
    return a
