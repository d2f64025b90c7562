"""How fast an attack could be: the operations and bytes of one step on a model, and the time they take at the machine's ceilings.

A step is a forward, the gradient at the input, and the move of the images. The bytes are those of the input-gradient plan: every
kernel reads its inputs once and writes its outputs once.

- A convolution (or linear layer) reads its input and weights and writes its output; its gradient at the input reads the
  output's gradient and the weights. Two operations a multiply-add, as many backwards as forwards.
- A BatchNorm that alone reads a convolution's output is folded into its weights. The element-wise operations and poolings left
  between two convolutions are one kernel: it reads what comes from outside, writes what is read outside, and keeps one bit per
  ReLU. Backwards it reads a gradient from every reader of what it wrote and the bits (for smooth activations their input), and
  writes one gradient per input; the two inputs of an addition share theirs.
- The move reads image, iterate and gradient and writes the iterate, all in fp32.

Two limits follow: `conv`, the operations alone at the measured matrix ceiling, which no step in that precision can beat; and
`roofline`, the sum over kernels of max(operations / ceiling, bytes / copy bandwidth): all kernels ideal, one after another.
(A kernel that fuses a convolution with what follows it can beat the second.) `python -m benchmarks.workmodel` prints the counts
of some models; with --device, measures the ceilings and prints the limits.
"""

import copy
import json
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import tyro
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks import measure
from spat_train.models.registry import create

aten = torch.ops.aten
MATRIX = {aten.convolution.default, aten.addmm.default, aten.mm.default}
BATCH_NORM = {aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints, aten.t.default,
         aten.detach.default, aten.alias.default, aten.expand.default, aten.permute.default}  # fmt: skip
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
RELUS = {aten.relu.default, aten.relu_.default}
POOLS = {aten.avg_pool2d.default, aten._adaptive_avg_pool2d.default, aten.mean.dim, aten.max_pool2d_with_indices.default}
LINEAR = ADDITIONS | BATCH_NORM | POOLS | {aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor}  # need no input backwards


@dataclass(frozen=True)
class Pass:
    """What one kernel does per image, and the weights it reads once a batch."""

    flops: int = 0
    values: int = 0  # activations and gradients moved, in the precision's dtype
    bits: int = 0  # moved whatever the precision: masks, fp32 images
    weights: int = 0

    def bytes(self, batch: int, itemsize: int) -> float:
        return batch * (self.values * itemsize + self.bits / 8) + self.weights * itemsize


@dataclass(frozen=True)
class Conv:
    """x [B, ins, size, size] * w [outs, ins / groups, kernel, kernel]."""

    ins: int
    outs: int
    kernel: int
    stride: int
    padding: int
    groups: int
    size: int


@dataclass(frozen=True)
class Layer:
    name: str
    kind: str  # "conv", "linear", "pointwise" or "step"
    forward: Pass
    backward: Pass
    conv: Conv | None = None


def layers(model: nn.Module, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The kernels of one attack step on `model`, in eval mode, on images [B, *image_shape].

    Nothing is computed: a copy of the model is traced on the meta device.
    """
    on_meta = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad():
        graph = make_fx(on_meta)(torch.empty(1, *image_shape, device="meta")).graph
    flow = _Flow(graph)
    found = [flow.matrix_layer(node) for node in flow.nodes if node.target in MATRIX]
    found += [flow.pointwise_layer(kernel) for kernel in flow.pointwise]
    numel = torch.Size(image_shape).numel()
    return [*found, Layer("step", "step", Pass(), Pass(bits=4 * 32 * numel))]


class _Flow:
    """The part of an aten graph that depends on the images: `source` leads from a node to the one whose values it holds."""

    def __init__(self, graph: fx.Graph):
        self.source: dict[fx.Node, fx.Node] = {}
        self.nodes: list[fx.Node] = []
        self.numel: dict[fx.Node, int] = {}
        depth: dict[fx.Node, int] = {}  # matrix operations on the longest path from the images
        inputs: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self.source[node], depth[node], self.numel[node] = node, 0, node.meta["val"].numel()
            sources = [self.source[n] for n in node.all_input_nodes if n in self.source]
            if not sources or node.op == "output":
                continue
            if node.target in VIEWS or "getitem" in node.name or self._is_folded(node):
                self.source[node] = sources[0]  # of a BatchNorm's three results only the first is ever read
                continue
            value = node.meta["val"]
            self.source[node], inputs[node] = node, sources
            self.numel[node] = (value[0] if isinstance(value, (tuple, list)) else value).numel()
            depth[node] = max(depth[n] for n in sources) + (node.target in MATRIX)
            self.nodes.append(node)
        self.inputs, self.depth = inputs, depth
        self.readers: dict[fx.Node, set] = defaultdict(set)
        for node in self.nodes:
            for n in inputs[node]:
                self.readers[n].add(node)
        logits = next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]
        self.readers[self.source[logits]].add(None)  # the loss
        self.kernel = {node: frozenset([node]) for node in self.nodes} | {None: frozenset()}
        for node in self.nodes:
            self._join(node)
        self.pointwise = list(dict.fromkeys(self.kernel[node] for node in self.nodes if node.target not in MATRIX))

    def _join(self, node: fx.Node) -> None:
        """One kernel of `node` and the pointwise kernels that feed it, where no matrix operation lies between."""
        if node.target in MATRIX:
            return
        near = [n for n in self.inputs[node] if n in self.kernel and n.target not in MATRIX and self.depth[n] == self.depth[node]]
        joined = self.kernel[node].union(*(self.kernel[n] for n in near))
        self.kernel.update(dict.fromkeys(joined, joined))

    def _contributions(self, node: fx.Node) -> int:
        """How many kernels read `node`, which is the number of gradients to add up."""
        return len({self.kernel[reader] for reader in self.readers[node]} - {self.kernel.get(node)})

    def _is_folded(self, node: fx.Node) -> bool:
        if node.target not in BATCH_NORM:
            return False
        producer = self.source[node.args[0]]
        return producer.target is aten.convolution.default and len(node.args[0].users) == 1

    def matrix_layer(self, node: fx.Node) -> Layer:
        source, outs = self.inputs[node][0], self.numel[node]
        weight = next(n for n in node.args if n not in self.source and n is not None and n.meta["val"].ndim > 1)
        shape = weight.meta["val"].shape
        if node.target is aten.convolution.default:
            _, _, _, stride, padding, _, _, _, groups = node.args
            size = node.args[0].meta["val"].shape[2]
            conv = Conv(shape[1] * groups, shape[0], shape[2], stride[0], padding[0], groups, size)
            name = f"conv {conv.kernel}x{conv.kernel} {conv.ins}->{conv.outs} /{conv.stride} @{size}"
            flops = 2 * outs * shape[1:].numel()
        else:
            conv, name, flops = None, f"linear {shape[0]}->{shape[1]}", 2 * shape.numel()
        forward = Pass(flops, self.numel[source] + outs, weights=shape.numel())
        backward = Pass(flops, self.numel[source] + outs * self._contributions(node), weights=shape.numel())
        return Layer(name, "conv" if conv else "linear", forward, backward, conv)

    def pointwise_layer(self, inside: frozenset[fx.Node]) -> Layer:
        group = [node for node in self.nodes if node in inside]
        outside = {n for node in group for n in self.inputs[node]} - inside
        written = [n for n in group if self.readers[n] - inside]
        bits = sum(self.numel[n] for n in group if n.target in RELUS)
        smooth = sum(self.numel[self.inputs[n][0]] for n in group if n.target not in LINEAR | RELUS)
        gradients = {self._gradient(n, inside): self.numel[n] for n in outside}
        read = sum(self.numel[n] * self._contributions(n) for n in written)
        forward = Pass(values=sum(self.numel[n] for n in outside | set(written)), bits=bits)
        backward = Pass(values=read + smooth + sum(gradients.values()), bits=bits)
        return Layer(f"pointwise {'+'.join(n.name.rstrip('_0123456789') for n in group)}", "pointwise", forward, backward)

    def _gradient(self, node: fx.Node, inside: frozenset[fx.Node]) -> fx.Node:
        """The node whose gradient is also that of `node` inside this group: that of the addition that alone reads it."""
        here = self.readers[node] & inside
        reader = next(iter(here)) if len(here) == 1 else None
        return self._gradient(reader, inside) if reader is not None and reader.target in ADDITIONS else node


@dataclass(frozen=True)
class Work:
    """One attack step on a batch in one precision: operations, bytes, and their time at the ceilings of `measure.ceilings`."""

    layers: list[Layer] = field(repr=False)
    batch: int
    precision: str

    def _passes(self) -> list[Pass]:
        return [p for layer in self.layers for p in (layer.forward, layer.backward)]

    @property
    def flops(self) -> int:
        return self.batch * sum(p.flops for p in self._passes())

    @property
    def bytes(self) -> float:
        return sum(p.bytes(self.batch, self._itemsize) for p in self._passes())

    @property
    def _itemsize(self) -> int:
        return measure.DTYPES[self.precision].itemsize

    def limits(self, ceilings: dict) -> dict[str, float]:
        """Seconds: "conv" and "roofline", as in the module."""
        flops_rate, byte_rate = 1e12 * ceilings["tflops"][self.precision], 1e9 * ceilings["copy_gbps"]
        kernels = [(self.batch * p.flops / flops_rate, p.bytes(self.batch, self._itemsize) / byte_rate) for p in self._passes()]
        return {"conv": sum(flops for flops, _ in kernels), "roofline": sum(max(times) for times in kernels)}


def main(
    models: list[str] = ["wrn-34-10", "wrn-28-10", "preactresnet-18", "resnet-18", "resnet-50"],  # noqa: B006  tyro reads it
    batch: int = 256,
    device: str | None = None,
    precisions: list[str] = ["fp32", "bf16"],  # noqa: B006
) -> None:
    """Print the work of one attack step on each model and, if a device is given, its ceilings and the limits that follow.

    Args:
        models: names of `spat_train.models.registry.create`, for images of 32x32.
        batch: images, by which the weights' share of the bytes goes.
        device: "cpu" or "cuda".
        precisions: of ceilings and limits.
    """
    ceilings = measure.ceilings(device, precisions) if device else None
    found = {}
    for name in models:
        kernels = layers(create(name), (3, 32, 32))
        work = {precision: Work(kernels, batch, precision) for precision in precisions}
        found[name] = {
            "gflop_forward_per_image": 1e-9 * sum(layer.forward.flops for layer in kernels),
            "mb_per_image": {precision: 1e-6 * w.bytes / batch for precision, w in work.items()},
            "step_limits_s": {precision: w.limits(ceilings) for precision, w in work.items()} if device else None,
        }
    print(json.dumps({"batch": batch, "ceilings": ceilings, "models": found}, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
