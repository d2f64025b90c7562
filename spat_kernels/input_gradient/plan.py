"""The input-gradient plan: a network that keeps one bit per ReLU, and whose backward goes to its input only.

With BatchNorm frozen, d logits / dx needs the convolutions' weights and the signs at the ReLUs, and nothing else. So a traced
model (trace.py) becomes a list of steps, in channels_last:

    Conv       by cuDNN or oneDNN. A BatchNorm that alone reads its output is folded into its weights.
    Pointwise  everything between convolutions in one pass (ops.scale_shift_relu): residual add, scale and shift, ReLU, mask out;
               backward: mask, scale, and the gradients of the residual branches. With another activation
               (ops.scale_shift_act), its derivative takes the place of the mask.
    PoolLinear the pooling and the linear layer at the end (ops.pool_linear), where its weights are few; backward, it also does
               the pass of a Pointwise in front.
    FusedConv  a Conv with the Pointwise behind it, or with the way back of the one in front, for engines that do both in one
               launch (grouping.py, fused_conv).
    Multiply   squeeze-and-excitation, and other products of two values
    Cat        of values and constants. One that goes on where another ended reads that one, so that dense blocks take few passes
               a layer instead of one for each layer before it.
    Index      parts of a value, whose gradients share one memory
    LayerNorm  with the addition in front, on channels that lie last or first; Attention by PyTorch's kernels (token_steps.py)
    Mean, Linear, Reshape, Permute, Pad, Pool, GroupNorm (its weights are a Pointwise) ..., and Local (other functions,
    differentiated by autograd one by one)

Images [B, C, H, W] in channels_last, their pixels [B, H, W, C] and tokens [B, N, C] are one memory, so that permutes and views
between them move nothing. A layer scale behind a linear layer is folded into its weights, also through such a view.

A pre-activation BatchNorm on a residual stream is not folded forward into the next convolution: zero padding would see its shift.
The plan holds no tensor of the model: weights.py binds its steps to the weights as they are, planned_gradient.py runs them.
"""

from dataclasses import replace
from math import prod

import torch
from torch import nn

from ..ops.pool_linear import MAX_CHANNELS, MAX_WEIGHTS
from . import token_steps
from .grouping import group
from .nodes import Node
from .steps import (
    Conv,
    GroupNorm,
    Index,
    Linear,
    Local,
    Maps,
    Mean,
    Multiply,
    Pad,
    Pointwise,
    Pool,
    PoolLinear,
    Reshape,
    Step,
)

ACTIVATIONS = ("relu", "act")  # kinds of nodes
WORDS: dict[str, type[Step]] = {"reshape": Reshape, "cast": Reshape, "multiply": Multiply}


class Plan:
    """The recipe for one architecture and image size, as `trace` read it.

    Attributes:
        steps: in the order of the forward.
        last: index of the value that holds the logits.
        reads_rows: whether images are read with their channels innermost in memory.
        exact: values that stay fp32 in half precision: what is read off the image before the first convolution, and the head.
        all_exact: nothing would run in half precision: there is no convolution.
        no_half: why half precision is not possible, or None.
    """

    def __init__(self, nodes: list[Node]):
        _chain_cats(nodes)
        self.nodes = nodes
        self.last = len(nodes) - 1
        self._note_users()
        self._scale_before_views()
        self.exact, self.no_half = self._find_exact(tokens=True)
        if self.no_half:
            self.exact, self.no_half = self._find_exact(tokens=False)
        self.all_exact = len(self.exact) == len(nodes)
        self.half_errors: dict[torch.dtype, str | None] = {}  # what trying a half precision showed
        self.steps: list[Step] = []
        self._made: dict[int, Conv | Linear] = {}  # value -> the convolution or linear layer of tokens that makes it
        done: set[int] = {0}
        for i in range(len(nodes)):
            if i not in done:
                done |= self._add_step(i)
        self._fuse_head()
        self._pair_gates()
        self._move_shifts()
        self._group_parts()
        group(self.steps, self.exact)
        self._note_frees()
        self.reads_rows = any(0 in s.inputs and isinstance(s, (Conv, Pointwise)) for s in self.steps)

    def _note_users(self) -> None:
        self.users: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for j in node.inputs:
                self.users[j].append(i)

    def _scale_before_views(self) -> None:
        """layer, view, scale becomes layer, scale, view, where the scale can be folded into the layer's weights."""
        for i in range(len(self.nodes)):
            views = self._views_to_layer(i)
            for view in views:
                node, other = self.nodes[i], self.nodes[view]
                source = self.nodes[other.inputs[0]]
                self.nodes[view] = replace(node, inputs=other.inputs, shape=source.shape, channels=source.channels)
                self.nodes[i] = replace(other, inputs=(view,))
                i = view

    def _views_to_layer(self, i: int) -> list[int]:
        """The views between a convolution or linear layer and the affine node i, from that on, which nobody else reads."""
        views: list[int] = []
        while self.nodes[i].kind == "affine" or views:
            node = self.nodes[i]
            if not node.inputs or self.users[node.inputs[0]] != [i]:
                return []
            (i,) = node.inputs
            source = self.nodes[i]
            if source.kind in ("conv", "affine") or (source.kind == "linear" and len(source.shape) > 1):
                return views if self._keeps_channels(node, source) else []
            if source.kind not in ("permute", "reshape") or not self._keeps_channels(node, source):
                return []
            views.append(i)
        return []

    def _keeps_channels(self, node: Node, source: Node) -> bool:
        if node.kind == "affine" and node.channels != source.channels:
            return False  # along another dimension, which may well be as long
        ends = {(n.channels == 0, n.channels == len(n.shape) - 1) for n in (node, source)}
        alike = node.shape[node.channels] == source.shape[source.channels]
        return alike and (node.kind != "reshape" or len(ends) == 1)

    def _find_exact(self, tokens: bool) -> tuple[set[int], str | None]:
        """The values that stay fp32, and why half precision is not possible. `tokens`: the head may begin with one token."""
        before_conv: set[int] = set()  # values from which a convolution is reached, or another layer of many products
        for i in range(self.last, -1, -1):
            if self._is_heavy(i) or i in before_conv:
                before_conv.update(self.nodes[i].inputs)
        front, crossings, reason = {0}, 0, None
        head: set[int] = set()
        for i, node in enumerate(self.nodes[1:], 1):
            parts = {"front" if j in front else "head" if j in head else "middle" for j in node.inputs}
            if node.conv is not None:
                if parts == {"front"} and node.conv["groups"] > 1:
                    reason = f"{node.name} is grouped and reads the image, which would be rounded"
                continue
            picks = tokens and node.kind == "index" and len(node.shape) == 1
            pools = (node.kind in ("mean", "cast") or picks) and i not in before_conv and self._apart(i, head)
            pools = pools or (node.kind == "linear" and i == self.last)
            if len(parts) > 1:
                reason = f"{node.name} joins values from before, inside and behind the half-precision part"
            elif parts == {"front"}:
                front.add(i)
            elif parts == {"head"} or pools:
                head.add(i)
                crossings += parts == {"middle"}
        exact = front | head
        if crossings + (self.last not in exact) > 1:
            reason = "several branches are pooled on their own, so no one place can scale the gradient"
        return exact, reason

    def _apart(self, i: int, head: set[int]) -> bool:
        """Whether what is made of value i is made of nothing else, but for what is in the head."""
        made = {i}
        for k in range(i + 1, len(self.nodes)):
            inputs = self.nodes[k].inputs
            if made.intersection(inputs):
                made.add(k)
                if not made.union(head).issuperset(inputs):
                    return False
        return True

    def _is_heavy(self, i: int) -> bool:
        node = self.nodes[i]
        return node.kind in ("conv", "attention", "matmul") or (node.kind == "linear" and len(node.shape) > 1)

    def _add_step(self, i: int) -> set[int]:
        """Append the step that begins with node i; returns the nodes that it does."""
        node = self.nodes[i]
        if node.conv is not None:
            return self._add_conv(i, node.conv)
        if node.kind in ("add", "affine", "relu", "act"):
            return self._add_pointwise(i)
        what = node.inputs, i, node.name, node.shape
        if step := token_steps.make(node, i):
            self.steps.append(step)
        elif node.weight is not None:
            return self._add_linear(i)
        elif isinstance(node.function, nn.Module) and node.kind == "pool":
            self.steps.append(Pool(*what, pool=node.function))
        elif node.options is not None:
            self.steps.append({"pad": Pad, "group_norm": GroupNorm}[node.kind](*what, **node.options))
        elif node.function is not None:
            self.steps.append(Local(*what, function=node.function, constants=node.constants))
        elif node.kind == "mean":
            self.steps.append(Mean(*what, dims=node.dims or (2, 3)))
        else:
            self.steps.append(WORDS[node.kind](*what))
        return {i}

    def _add_linear(self, i: int) -> set[int]:
        node = self.nodes[i]
        assert node.weight is not None
        affines = self._affines_after(i) if len(node.shape) > 1 else []
        out = affines[-1] if affines else i
        step = Linear(node.inputs, out, node.name, node.shape, weight=node.weight, bias=node.bias, after=self._maps(affines))
        self.steps.append(step)
        if len(node.shape) > 1:
            self._made[out] = step
        return {i, *affines}

    def _add_conv(self, i: int, conv: dict) -> set[int]:
        node, affines = self.nodes[i], self._affines_after(i)
        out = affines[-1] if affines else i
        assert node.weight is not None
        step = Conv(node.inputs, out, node.name, node.shape, weight=node.weight, bias=node.bias, conv=conv)
        step.after = self._maps(affines)
        previous = self.steps[-1] if self.steps else None
        if isinstance(previous, Pointwise) and conv["groups"] == 1 and self._normalises_image(previous, i):
            self.steps.pop()
            step.before, step.inputs = previous.affine, previous.inputs
        self.steps.append(step)
        self._made[out] = step
        return {i, *affines}

    def _normalises_image(self, previous: Pointwise, conv: int) -> bool:
        return (
            previous.inputs == (0,)
            and previous.out in self.nodes[conv].inputs
            and not (previous.relu or previous.act)
            and len(self.users[previous.out]) == 1
        )

    def _affines_after(self, i: int) -> list[int]:
        """The affine nodes along the same channels that follow node i, with no other reader between."""
        found, channels = [], self.nodes[i].channels
        while len(self.users[i]) == 1 and self.nodes[self.users[i][0]].kind == "affine":
            if self.nodes[self.users[i][0]].channels != channels:
                break
            (i,) = self.users[i]
            found.append(i)
        return found

    def _maps(self, nodes: list[int]) -> Maps:
        return tuple(norm for k in nodes if (norm := self.nodes[k].norm))

    def _add_pointwise(self, i: int) -> set[int]:
        """Fuse [add] [affine ...] [relu or act] as far as they follow one another, or [add] [layer_norm]."""
        node, fused, total = self.nodes[i], [i], None
        if node.kind == "add":
            if norms := [u for u in self.users[i] if self.nodes[u].kind == "layer_norm"]:
                return self._add_layer_norm(i, norms[0])
            followers = [u for u in self.users[i] if self.nodes[u].kind in ("affine", *ACTIVATIONS)]
            followers = [u for u in followers if self.nodes[u].channels == node.channels]
            fused += followers[:1]
            total = i if followers and len(self.users[i]) > 1 else None
        if self.nodes[fused[-1]].kind == "affine":
            fused += self._affines_after(fused[-1])
            users = [self.nodes[u] for u in self.users[fused[-1]]]
            if [u.kind in ACTIVATIONS and u.channels == node.channels for u in users] == [True]:
                fused += self.users[fused[-1]]
        step = Pointwise(node.inputs, fused[-1], node.name, node.shape, total=total, channels=node.channels)
        step.affine = self._maps(fused)
        step.relu, step.act = self.nodes[fused[-1]].kind == "relu", self.nodes[fused[-1]].act
        step.in_place = node.inputs[0] in self._made and self.users[node.inputs[0]] == [i]
        self.steps.append(step)
        return set(fused)

    def _add_layer_norm(self, i: int, norm: int) -> set[int]:
        step = token_steps.make(self.nodes[norm], norm)
        assert isinstance(step, token_steps.LayerNorm)
        step.inputs, step.total = self.nodes[i].inputs, i if len(self.users[i]) > 1 else None
        self.steps.append(step)
        return {i, norm}

    def _group_parts(self) -> None:
        """Note where all that reads a value are parts of it that make it up, as q, k and v."""
        for i, users in enumerate(self.users):
            parts = [s for s in self.steps if isinstance(s, Index) and s.inputs == (i,)]
            if len(users) > 1 and len(parts) == len(users) and token_steps.make_up(parts, self.nodes[i].shape):
                for part in parts:
                    part.group = len(parts)

    def _fuse_head(self) -> None:
        """Mean, Reshape ..., Linear at the end become one step, where the weights are few.

        Nobody else reads what lies between them, nor what a Pointwise in front reads or makes: that would not reach the logits,
        and dead code has no node.
        """
        first = len(self.steps) - 2
        while first >= 0 and isinstance(self.steps[first], Reshape):
            first -= 1
        mean, linear = self.steps[first], self.steps[-1]
        if first < 0 or not (isinstance(mean, Mean) and isinstance(linear, Linear)):
            return
        if mean.dims != (2, 3) or len(self.nodes[mean.inputs[0]].shape) != 3:
            return
        channels, classes = mean.shape[0], linear.shape[0]
        exact = mean.inputs[0] in self.exact  # then its gradient is, in half precision, which the fused one would round
        if exact or channels > MAX_CHANNELS or channels * classes > MAX_WEIGHTS:
            return
        head = PoolLinear(mean.inputs, linear.out, linear.name, linear.shape, weight=linear.weight, bias=linear.bias)
        before = self.steps[first - 1] if first > 0 else None
        if isinstance(before, Pointwise) and before.of_images and not before.act:
            head.pointwise, before.in_head = first - 1, True
        self.steps[first:] = [head]

    def _pair_gates(self) -> None:
        """x * gate(mean of x): the gradient of x is written once, with both parts."""
        means = {s.inputs[0]: s for s in self.steps if isinstance(s, Mean)}
        for step in self.steps:
            mean = means.get(step.inputs[0])
            if isinstance(step, Multiply) and mean is not None and mean.gates is None and mean.out < step.out:
                x, gate = step.inputs
                step.pooled = x != gate and mean.dims == (2, 3) and len(step.shape) == 3 and step.shape == self.nodes[x].shape
                mean.gates = step.out if step.pooled else None

    def _move_shifts(self) -> None:
        """A convolution's folded bias moves into the pass with an activation behind it, where it costs nothing."""
        for step in self.steps:
            if isinstance(step, Pointwise) and (step.relu or step.act) and not step.affine and step.total is None:
                for value in set(step.inputs):
                    made = self._made.get(value)
                    if isinstance(made, Conv) and len(self.users[value]) == 1 and (made.after or made.bias):
                        made.shift_moves = True
                        step.shifts += (self.steps.index(made),)

    def _note_frees(self) -> None:
        last_use = {}
        for i, step in enumerate(self.steps):
            for j in step.inputs:
                last_use[j] = i
        for j, i in last_use.items():
            if j != self.last:
                self.steps[i].frees.append(j)

    def summary(self) -> dict[str, int]:
        """Counts of what the plan consists of."""
        convolutions = [s for s in self.steps if isinstance(s, Conv)]
        passes = [s for s in self.steps if isinstance(s, Pointwise)]
        return {
            "convolutions": len(convolutions),
            "folded into convolutions": sum(bool(s.after) for s in convolutions),
            "fused pointwise passes": len(passes),
            "linear layers": sum(isinstance(s, Linear) for s in self.steps),
            "of them with the pooling": sum(isinstance(s, PoolLinear) for s in self.steps),
            "products": sum(isinstance(s, Multiply) for s in self.steps),
            "layer norms": sum(isinstance(s, token_steps.LayerNorm) for s in self.steps),
            "attentions": sum(isinstance(s, token_steps.Attention) for s in self.steps),
            "left to autograd": sum(type(s) is Local for s in self.steps),
            "mask bytes per image": sum(prod(s.shape[1:]) * -(-s.shape[0] // 8) for s in passes if s.relu),
            "derivatives per image": sum(prod(s.shape) for s in passes if s.act),
        }


def _chain_cats(nodes: list[Node]) -> None:
    """[a, b, c] reads [a, b] and c, where [a, b] is there."""
    cats: dict[tuple[int, ...], int] = {}  # dimension and parts -> the value
    for i, node in enumerate(nodes):
        if node.kind == "cat" and len(node.dims) == 1 + len(node.inputs):  # without constants
            whole = (node.dims[0], *node.inputs)
            for n in range(len(whole) - 1, 2, -1):
                if whole[:n] in cats:
                    node.inputs = (cats[whole[:n]], *whole[n:])
                    node.dims = (whole[0], *range(len(node.inputs)))
                    break
            cats[whole] = i
