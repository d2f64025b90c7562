"""The words that a traced model is written in: nodes, the parameters that they name, and the network that they form.

    input · conv · linear · affine (BatchNorm, normalisation, layer scale) · relu · add · mean (global average pooling)
    layer_norm (over the channels of a pixel or token) · response_norm (of ConvNeXt V2)
    combine (with a constant of any other shape) · cat (of values and constants)
    reshape · permute · index (of dimensions of the sample) · moved (roll) · pad
    attention (scaled_dot_product_attention of three values) · matmul (of two values) · softmax
    normalize (to vectors of length 1)
    cast (to the dtype of the weights: nothing, but in half precision, where fp32 is asked for)
    act (another activation) · multiply (two values, squeeze-and-excitation)
    pool (max, average, nearest and bilinear resizing: a function of ATen, whose gradient is another) · group_norm (no weights)
    local (any other function of a sample's values and of constants: differentiated by autograd, alone)

Nodes name parameters and never hold them, so that a list of nodes keeps no model alive, and stays right when the weights change.
What a model computes of its parameters alone is a `Computed`: a small program that names them too (constants.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import Tensor

from .constants import CannotPlan, Computed, Constant, Ref, Single, computed

__all__ = ["Act", "CannotPlan", "Computed", "Constant", "Form", "Network", "Node", "Norm", "Ref", "Term"]


@dataclass(frozen=True)
class Form:
    """How the model sees a value, whose samples come first in a plan.

    `at` is the batch dimension. `merged`: the first dimension of a sample is merged with it, as in Swin's [B * windows, ...].
    """

    at: int = 0
    merged: bool = False


@dataclass(frozen=True)
class Norm:
    """BatchNorm by its running statistics; `weight` and `bias` may be None."""

    weight: Constant | None
    bias: Constant | None
    mean: Constant
    var: Constant
    eps: float


@dataclass(frozen=True)
class Term:
    """One operation with a constant: "mul", "add", "sub", "div", "rsub" (constant - x)."""

    kind: str
    constant: Constant | float | tuple[float, ...]


@dataclass(frozen=True)
class Act:
    """An activation other than ReLU, as in `ops.scale_shift_act`. `negative` is by what "leaky_relu" multiplies values < 0."""

    name: str
    negative: Constant | float | None = None


@dataclass
class Node:
    """One value of the network. `shape` is that of one sample; `inputs` are indices of earlier nodes."""

    kind: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    weight: Constant | None = None  # conv, linear, layer_norm, response_norm
    bias: Constant | None = None
    conv: dict | None = None  # stride, padding, dilation, groups
    norm: Norm | Term | None = None  # affine, along `channels`; combine
    function: Callable | None = (
        None  # local, pool: the values of `inputs` and the constants -> this value. moved: the value -> this
    )
    act: Act | None = None  # act
    options: dict | None = None  # pad: sides, value; group_norm: groups, eps
    channels: int = 0  # the dimension of a sample that is innermost in memory
    constants: tuple[Constant, ...] = ()  # local, attention
    eps: float = 0.0  # layer_norm, response_norm, normalize
    back: Callable | None = None  # moved: its gradient -> that of the input
    dims: tuple = ()  # mean, permute: dimensions [B, ...]; index: what to index with; cat: along which, and what


class Network:
    """The nodes read so far: what the rules look things up in, and add to.

    A value in the graph is an index of a node where it depends on the images, and plain data where it does not.
    """

    env: dict[torch.fx.Node, Any]  # what each fx node gave for the probe
    probe: Tensor
    module: torch.fx.GraphModule
    result: Tensor  # the value that is being read, as the model makes it of the probe

    def __init__(self, model):
        self.model = model
        self.nodes: list[Node] = []
        self.index: dict[torch.fx.Node, int] = {}  # fx node -> the node that holds its value
        self.form: dict[torch.fx.Node, Form] = {}  # those that are not the usual one
        self.parts: dict[torch.fx.Node, tuple] = {}  # fx node that gives a tuple -> the value, and what each part indexes
        self.asked: set[torch.fx.Node] = set()  # plain data that depends on the images' shape
        self.shape: tuple[int, ...] = ()  # shape of one sample of the value that is being read
        self.single: Single | None = None
        self._constants: dict[torch.fx.Node, Computed] = {}

    def add(self, n: torch.fx.Node, kind: str, *values: torch.fx.Node, form: Form | None = None, **fields) -> None:
        """Fx node `n` is a new node, made of `values`."""
        inputs = tuple(self.index[v] for v in values)
        fields.setdefault("channels", self._channels(inputs))
        self.nodes.append(Node(kind, inputs, self.shape, n.name, **fields))
        self.index[n] = len(self.nodes) - 1
        if form is None and values:
            form = self.form_of(values[0])
        if form is not None and form != Form():
            self.form[n] = form

    def _channels(self, inputs: tuple[int, ...]) -> int:
        """Where the channels of the value that is being read are, by those of its inputs."""
        alike = [self.nodes[i].channels for i in inputs if len(self.nodes[i].shape) == len(self.shape)]
        return 0 if len(self.shape) < 2 or not inputs else min(alike, default=len(self.shape) - 1)

    def same(self, n: torch.fx.Node, source: torch.fx.Node) -> None:
        """`n` is the value of `source`."""
        self.index[n] = self.index[source]
        if source in self.form:
            self.form[n] = self.form[source]

    def shape_of(self, n: torch.fx.Node) -> tuple[int, ...]:
        """The shape of one sample of a value."""
        return self.nodes[self.index[n]].shape

    def channels_of(self, n: torch.fx.Node) -> int:
        return self.nodes[self.index[n]].channels

    def form_of(self, n: torch.fx.Node) -> Form:
        return self.form.get(n, Form())

    def is_value(self, a) -> bool:
        return isinstance(a, torch.fx.Node) and a in self.index

    def is_tensor(self, a) -> bool:
        """Whether an argument is a tensor that does not depend on the images."""
        return isinstance(a, torch.fx.Node) and a not in self.index and isinstance(self.env.get(a), Tensor)

    def plain(self, a) -> Any:
        """The data of an argument that does not depend on the images (sizes included)."""
        return torch.fx.node.map_arg(a, self._plain_node)

    def _plain_node(self, node: torch.fx.Node) -> Any:
        if node in self.index or node in self.parts:
            raise CannotPlan(f"{node.name} is used as an argument that should be constant")
        return self.env[node]

    def ref(self, a) -> Constant | None:
        """The constant that an argument names: a parameter or buffer, or what is computed of some."""
        if a is None:
            return None
        if not self.is_tensor(a):
            raise CannotPlan(f"{a} is computed of the images, where a parameter or buffer of the model should be")
        if a.op == "get_attr":
            return Ref.named(self.model, str(a.target))
        if a not in self._constants:
            self._constants[a] = computed(self, a)
        return self._constants[a]

    def tensor(self, a: torch.fx.Node) -> Tensor:
        """A constant for a batch of one."""
        return self.single.value(a) if self.single is not None and a in self._constants else self.env[a]
