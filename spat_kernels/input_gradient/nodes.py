"""The words that a traced model is written in: nodes, the parameters that they name, and the network that they form.

    input · conv · linear · affine (BatchNorm, normalisation) · relu · add · mean (global average pooling) · reshape
    cast (to the dtype of the weights: nothing, but in half precision, where fp32 is asked for)
    act (another activation) · multiply (two values, squeeze-and-excitation) · cat and slice (of channels) · pad
    pool (max, average, nearest and bilinear resizing: a function of ATen, whose gradient is another) · group_norm (no weights)
    local (any other function of a sample's values without parameters of its own: differentiated by autograd, alone)

Nodes name parameters and never hold them, so that a list of nodes keeps no model alive, and stays right when the weights change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import Tensor, nn


class CannotPlan(Exception):
    """Why a model does not take the plan."""


@dataclass(frozen=True)
class Ref:
    """A parameter or buffer, as the path of its module and its name there."""

    path: str
    name: str

    def of(self, modules: dict[str, nn.Module]) -> Tensor:
        return getattr(modules[self.path], self.name)


@dataclass(frozen=True)
class Norm:
    """BatchNorm by its running statistics; `weight` and `bias` may be None."""

    weight: Ref | None
    bias: Ref | None
    mean: Ref
    var: Ref
    eps: float


@dataclass(frozen=True)
class Term:
    """One operation with a constant: "mul", "add", "sub", "div", "rsub" (constant - x)."""

    kind: str
    constant: Ref | float | tuple[float, ...]


@dataclass(frozen=True)
class Act:
    """An activation other than ReLU, as in `ops.scale_shift_act`. `negative` is by what "leaky_relu" multiplies values < 0."""

    name: str
    negative: Ref | float | None = None


@dataclass
class Node:
    """One value of the network. `shape` is that of one sample; `inputs` are indices of earlier nodes."""

    kind: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    weight: Ref | None = None  # conv, linear
    bias: Ref | None = None
    conv: dict | None = None  # stride, padding, dilation, groups
    norm: Norm | Term | None = None  # affine
    function: Callable | None = None  # local, pool: the values of `inputs` -> this value
    act: Act | None = None  # act
    options: dict | None = None  # slice: first, last; pad: sides, value; group_norm: groups, eps


class Network:
    """The nodes read so far: what the rules look things up in, and add to.

    A value in the graph is an index of a node where it depends on the images, and plain data where it does not.
    """

    env: dict[torch.fx.Node, Any]  # what each fx node gave for the probe

    def __init__(self, model: nn.Module):
        self.model = model
        self.nodes: list[Node] = []
        self.index: dict[torch.fx.Node, int] = {}  # fx node -> the node that holds its value
        self.shape: tuple[int, ...] = ()  # shape of one sample of the value that is being read
        self.split: dict[torch.fx.Node, tuple] = {}  # fx node that gives several parts of a value -> how (cnn_rules)

    def add(self, n: torch.fx.Node, kind: str, *values: torch.fx.Node, **fields) -> None:
        """Fx node `n` is a new node, made of `values`."""
        self.nodes.append(Node(kind, tuple(self.index[v] for v in values), self.shape, n.name, **fields))
        self.index[n] = len(self.nodes) - 1

    def same(self, n: torch.fx.Node, source: torch.fx.Node) -> None:
        """`n` is the value of `source`."""
        self.index[n] = self.index[source]

    def shape_of(self, n: torch.fx.Node) -> tuple[int, ...]:
        """The shape of one sample of a value."""
        return self.nodes[self.index[n]].shape

    def is_value(self, a) -> bool:
        return isinstance(a, torch.fx.Node) and a in self.index

    def plain(self, a) -> Any:
        """The data of an argument that does not depend on the images (sizes included)."""
        return torch.fx.node.map_arg(a, self._plain_node)

    def _plain_node(self, node: torch.fx.Node) -> Any:
        if node in self.index:
            raise CannotPlan(f"{node.name} is used as an argument that should be constant")
        return self.env[node]

    def ref(self, a) -> Ref | None:
        """The parameter that an argument names."""
        if a is None:
            return None
        if not isinstance(a, torch.fx.Node) or a.op != "get_attr" or not isinstance(a.target, str):
            raise CannotPlan(f"{a} is computed and no parameter or buffer of the model")
        path, _, name = a.target.rpartition(".")
        if name.startswith("_tensor_constant") and not hasattr(self.model.get_submodule(path), name):
            raise CannotPlan("a tensor that is no parameter, buffer or attribute of the model takes part")
        return Ref(path, name)
