"""The input-gradient plan: a network that keeps one bit per ReLU, and whose backward goes to its input only.

With BatchNorm frozen, d logits / dx needs the convolutions' weights and the signs at the ReLUs, and nothing else. So a traced
model (trace.py) becomes a list of steps, in channels_last:

    Conv       by cuDNN or oneDNN. A BatchNorm that alone reads its output is folded into its weights.
    Pointwise  everything between convolutions in one pass (ops.scale_shift_relu): residual add, scale and shift, ReLU, mask out;
               backward: mask, scale, and the gradients of the residual branches.
    PoolLinear the pooling and the linear layer at the end (ops.pool_linear), where its weights are few; backward, it also does
               the pass of a Pointwise in front.
    Mean, Linear, Reshape, and Local (other functions, differentiated by autograd one by one)

A pre-activation BatchNorm on a residual stream is not folded forward into the next convolution: zero padding would see its shift.
The plan holds no tensor of the model. `prepare` folds the weights as they are now, in a few launches, so that a training loop may
change them between attacks.

In half precision (fp16, bf16) the image is not rounded: the first convolution reads it as two halves (ops.split_image). From the
pooled features on, values are fp32, and there the gradient of each sample is scaled to a largest element of 1: samples are
independent, only directions count, and neither the factors 1/B and 1 - p_y nor small weights can push it out of fp16's range.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._common import acc_dtype
from ..ops.pool_linear import MAX_CHANNELS, MAX_WEIGHTS
from ..precision import HALVES, arithmetic
from .autograd import check_logits
from .trace import Node, Norm, Ref, Term

CHANNELS_LAST = torch.channels_last
ALIGNED = 4  # scales and shifts start at multiples of 4 values, 16 bytes of fp32, which CUDA kernels read at once


@dataclass
class Step:
    """One step: reads the values `inputs`, writes the value `out`. `frees` are the values that nobody reads after it."""

    inputs: tuple[int, ...]
    out: int
    name: str
    shape: tuple[int, ...]  # of one sample of `out`
    frees: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Conv(Step):
    weight: Ref
    bias: Ref | None
    conv: dict
    before: tuple = ()  # affine maps of the image, done while it is read
    after: tuple = ()  # affine maps folded into weight and bias
    shift_moves: bool = False  # the folded bias is added by the Pointwise that reads `out`


@dataclass
class Pointwise(Step):
    affine: tuple = ()
    relu: bool = False
    total: int | None = None  # the value inputs[0] (+ inputs[1]), where somebody else reads it
    shifts: tuple[int, ...] = ()  # steps whose bias moved here
    in_place: bool = False  # inputs[0] is a convolution's output that nobody else reads
    in_head: bool = False  # its way back is done by the PoolLinear behind it


@dataclass(kw_only=True)
class Linear(Step):
    weight: Ref
    bias: Ref | None


@dataclass(kw_only=True)
class PoolLinear(Linear):
    pointwise: int | None = None  # the step whose way back is done here


@dataclass
class Mean(Step):
    pass


@dataclass
class Reshape(Step):
    pass


@dataclass(kw_only=True)
class Local(Step):
    function: Callable[..., Tensor]


Saved = Any  # what a step's forward keeps for its backward
Grads = list[list[tuple[Tensor, bool]]]  # for each value: what its readers contribute, and whether that memory may be written to


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
        self.nodes = nodes
        self.last = len(nodes) - 1
        self.users: list[list[int]] = [[] for _ in nodes]
        for i, node in enumerate(nodes):
            for j in node.inputs:
                self.users[j].append(i)
        self.exact, self.no_half = self._find_exact()
        self.all_exact = len(self.exact) == len(nodes)
        self.half_errors: dict[torch.dtype, str | None] = {}  # what trying a half precision showed
        self.steps: list[Step] = []
        self._made: dict[int, Conv] = {}  # value -> the convolution that makes it
        done: set[int] = {0}
        for i in range(len(nodes)):
            if i not in done:
                done |= self._add_step(i)
        self._fuse_head()
        self._move_shifts()
        self._note_frees()
        self.reads_rows = any(0 in s.inputs and isinstance(s, (Conv, Pointwise)) for s in self.steps)

    # -- building -------------------------------------------------------------------------------------------------------------

    def _find_exact(self) -> tuple[set[int], str | None]:
        before_conv: set[int] = set()  # values from which a convolution is reached
        for i in range(self.last, -1, -1):
            if self.nodes[i].kind == "conv" or i in before_conv:
                before_conv.update(self.nodes[i].inputs)
        front, head, crossings, reason = {0}, set(), 0, None
        for i, node in enumerate(self.nodes[1:], 1):
            parts = {"front" if j in front else "head" if j in head else "middle" for j in node.inputs}
            if node.conv is not None:
                if parts == {"front"} and node.conv["groups"] > 1:
                    reason = f"{node.name} is grouped and reads the image, which would be rounded"
                continue
            pools = (node.kind == "mean" and i not in before_conv) or (node.kind == "linear" and i == self.last)
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

    def _add_step(self, i: int) -> set[int]:
        """Append the step that begins with node i; returns the nodes that it does."""
        node = self.nodes[i]
        if node.conv is not None:
            return self._add_conv(i, node.conv)
        if node.kind in ("add", "affine", "relu"):
            return self._add_pointwise(i)
        what = node.inputs, i, node.name, node.shape
        if node.weight is not None:
            self.steps.append(Linear(*what, weight=node.weight, bias=node.bias))
        elif node.function is not None:
            self.steps.append(Local(*what, function=node.function))
        else:
            self.steps.append({"mean": Mean, "reshape": Reshape}[node.kind](*what))
        return {i}

    def _add_conv(self, i: int, conv: dict) -> set[int]:
        node, affines = self.nodes[i], self._affines_after(i)
        out = affines[-1] if affines else i
        assert node.weight is not None
        step = Conv(node.inputs, out, node.name, node.shape, weight=node.weight, bias=node.bias, conv=conv)
        step.after = tuple(self.nodes[k].norm for k in affines)
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
            and not previous.relu
            and len(self.users[previous.out]) == 1
        )

    def _affines_after(self, i: int) -> list[int]:
        """The affine nodes that follow node i, with no other reader between."""
        found = []
        while len(self.users[i]) == 1 and self.nodes[self.users[i][0]].kind == "affine":
            (i,) = self.users[i]
            found.append(i)
        return found

    def _add_pointwise(self, i: int) -> set[int]:
        """Fuse [add] [affine ...] [relu] as far as they follow one another."""
        node, fused, total = self.nodes[i], [i], None
        if node.kind == "add":
            followers = [u for u in self.users[i] if self.nodes[u].kind in ("affine", "relu")]
            fused += followers[:1]
            total = i if followers and len(self.users[i]) > 1 else None
        if self.nodes[fused[-1]].kind == "affine":
            fused += self._affines_after(fused[-1])
            if [self.nodes[u].kind for u in self.users[fused[-1]]] == ["relu"]:
                fused += self.users[fused[-1]]
        step = Pointwise(node.inputs, fused[-1], node.name, node.shape, total=total)
        step.affine = tuple(self.nodes[k].norm for k in fused if self.nodes[k].kind == "affine")
        step.relu = self.nodes[fused[-1]].kind == "relu"
        step.in_place = node.inputs[0] in self._made and self.users[node.inputs[0]] == [i]
        self.steps.append(step)
        return set(fused)

    def _fuse_head(self) -> None:
        """Mean, Reshape ..., Linear at the end become one step, where the weights are few.

        Nobody else reads what lies between them, nor what a Pointwise in front reads or makes: that would not reach the logits,
        and dead code has no node.
        """
        first = len(self.steps) - 2
        while first >= 0 and isinstance(self.steps[first], Reshape):
            first -= 1
        if first < 0 or not (isinstance(self.steps[first], Mean) and isinstance(self.steps[-1], Linear)):
            return
        mean, linear = self.steps[first], self.steps[-1]
        channels, classes = mean.shape[0], linear.shape[0]
        exact = mean.inputs[0] in self.exact  # then its gradient is, in half precision, which the fused one would round
        if exact or channels > MAX_CHANNELS or channels * classes > MAX_WEIGHTS:
            return
        head = PoolLinear(mean.inputs, linear.out, linear.name, linear.shape, weight=linear.weight, bias=linear.bias)
        before = self.steps[first - 1] if first > 0 else None
        if isinstance(before, Pointwise):
            head.pointwise, before.in_head = first - 1, True
        self.steps[first:] = [head]

    def _move_shifts(self) -> None:
        """A convolution's folded bias moves into the ReLU pass behind it, where it costs nothing."""
        for step in self.steps:
            if isinstance(step, Pointwise) and step.relu and not step.affine and step.total is None:
                for value in set(step.inputs):
                    made = self._made.get(value)
                    if made and len(self.users[value]) == 1 and (made.after or made.bias):
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

    # -- describing -----------------------------------------------------------------------------------------------------------

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
            "left to autograd": sum(isinstance(s, Local) for s in self.steps),
            "mask bytes per image": sum(prod(s.shape[1:]) * -(-s.shape[0] // 8) for s in passes if s.relu),
        }


class PlannedGradient:
    """A `Plan` bound to a model's weights: the interface of `InputGradient`, for one attack in one thread.

    Args:
        plan: made for this model and image size.
        model: where the weights are read, at every `prepare`.
        image: dtype of the images.
        dtype: of the convolutions.
        precision: as the caller asked for it, for the TF32 switches.
        highest_label: the largest class that the labels name, to be checked against the number of classes.

    Attributes:
        factor: [B], by which samples of the last `backward` are to be multiplied where lengths count; None is 1.
        keep: whether that `backward` may be called again.
    """

    independent_samples = deterministic = True
    factor: Tensor | None = None
    keep = False

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        image: torch.dtype,
        dtype: torch.dtype,
        precision: str | None = None,
        highest_label: int = -1,
    ):
        self.plan, self.image_dtype, self.dtype = plan, image, dtype
        self.precision, self.highest_label = precision, highest_label
        self.logits_dtype = acc_dtype(dtype)
        self.device = next(model.parameters()).device
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._saved: list = [None] * len(plan.steps)
        self._constants: dict = {}  # made at the first `prepare`: a captured one cannot copy from the host

    def arithmetic(self, device_type: str):
        """The context that `prepare`, `logits`, `forward` and `backward` are called in."""
        return arithmetic(self.precision, device_type, autocast=False)

    def laid_out(self, x: Tensor) -> Tensor:
        """Images in the memory format in which the plan reads them fastest."""
        return _rows(x) if self.plan.reads_rows else x

    def release(self) -> None:
        """Forget the model, but nothing that kernels launched so far read or write: a capture of them lives on."""
        self._modules = {}

    # -- weights --------------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Fold and cast the weights as they are now."""
        maps = [m for s in self.plan.steps for kind in ("before", "after", "affine") for m in getattr(s, kind, ())]
        self._norms = self._fold_norms([m for m in maps if isinstance(m, Norm)])
        self.bound: list = [None] * len(self.plan.steps)
        for i, step in enumerate(self.plan.steps):
            if isinstance(step, Conv):
                self.bound[i] = self._bind_conv(step)
            elif isinstance(step, Linear):
                dtype = acc_dtype(self.dtype) if step.out in self.plan.exact else self.dtype
                bias = None if step.bias is None else self._of(step.bias).to(dtype).contiguous()
                self.bound[i] = self._of(step.weight).to(dtype).contiguous(), bias
        for i, step in enumerate(self.plan.steps):
            if isinstance(step, Pointwise):
                scale, shift = self._scale_shift(step.affine, self._channels(step))
                for j in step.shifts:
                    moved = self.bound[j][1]
                    shift = moved if shift is None else shift if moved is None else shift + moved
                self.bound[i] = scale, shift

    def _of(self, ref: Ref) -> Tensor:
        return ref.of(self._modules).detach()

    def _channels(self, step: Step) -> int:
        return self.plan.nodes[step.inputs[0]].shape[0]

    def _fold_norms(self, norms: list[Norm]) -> dict[Norm, tuple[Tensor, Tensor]]:
        """scale = weight / sqrt(var + eps) and shift = bias - mean * scale of every BatchNorm, all at once."""
        if not norms:
            return {}
        acc = acc_dtype(self.dtype)
        means = [self._of(n.mean) for n in norms]
        sizes = [len(m) for m in means]
        padded = [-(-size // ALIGNED) * ALIGNED for size in sizes]  # else what follows odd channels would be read one by one
        padding = self._constant("padding", lambda: torch.zeros(ALIGNED, dtype=means[0].dtype))

        def joined(refs, absent):
            parts = [torch.full_like(m, absent) if r is None else self._of(r) for r, m in zip(refs, means, strict=True)]
            rests = [padding[: n - size] for n, size in zip(padded, sizes, strict=True)]
            return torch.cat([t for pair in zip(parts, rests, strict=True) for t in pair if len(t)]).to(acc)

        each = [n.eps for n in norms]
        eps = self._constant("eps", lambda: torch.tensor(each, dtype=acc).repeat_interleave(torch.tensor(padded)))
        scale = (joined([n.var for n in norms], 1.0) + eps).rsqrt_() * joined([n.weight for n in norms], 1.0)
        shift = joined([n.bias for n in norms], 0.0) - joined([n.mean for n in norms], 0.0) * scale
        parts = ([t[:size] for t, size in zip(joint.split(padded), sizes, strict=True)] for joint in (scale, shift))
        return dict(zip(norms, zip(*parts, strict=True), strict=True))

    def _constant(self, key, make) -> Tensor:
        """What `make()` gave the first time, on the model's device."""
        if key not in self._constants:
            self._constants[key] = make().to(self.device)
        return self._constants[key]

    def _scale_shift(self, maps: tuple[Norm | Term, ...], channels: int) -> tuple[Tensor | None, Tensor | None]:
        """The maps one after the other as one scale and one shift [C]; None for 1 and 0."""
        scale = shift = None
        for m in maps:
            s, t = self._norms[m] if isinstance(m, Norm) else self._term(m, channels)
            if scale is None and shift is None:
                scale, shift = s, t
                continue
            if shift is not None and s is not None:
                shift = shift * s
            shift = t if shift is None else shift if t is None else shift + t
            scale = s if scale is None else scale if s is None else scale * s
        return scale, shift

    def _term(self, term: Term, channels: int) -> tuple[Tensor | None, Tensor | None]:
        acc = acc_dtype(self.dtype)
        if isinstance(term.constant, Ref):
            c = self._of(term.constant).to(self.device, acc).reshape(-1).expand(channels).contiguous()
        else:
            value = partial(torch.tensor, term.constant, dtype=torch.float64)
            c = self._constant((term, channels), lambda: value().to(acc).reshape(-1).expand(channels).contiguous())
        if term.kind in ("mul", "div"):
            return (c if term.kind == "mul" else 1 / c), None
        if term.kind == "rsub":
            return torch.full_like(c, -1.0), c
        return None, (c if term.kind == "add" else -c)

    def _bind_conv(self, step: Conv):
        weight = self._of(step.weight)
        scale, shift = self._scale_shift(step.after, len(weight))
        if step.bias is not None:
            bias = self._of(step.bias).to(acc_dtype(self.dtype))
            bias = bias if scale is None else bias * scale
            shift = bias if shift is None else bias + shift
        memory_format = self.layout(step)
        if scale is None:
            bound = weight.to(self.dtype, memory_format=memory_format)
        else:
            bound = torch.empty_like(weight, dtype=self.dtype, memory_format=memory_format)
            torch.mul(weight, scale.view(-1, 1, 1, 1), out=bound)
        if self._splits(step):
            bound = _twice(bound)
        inside = None if shift is None or step.shift_moves else shift.to(self.dtype)
        return bound, shift, inside, *self._scale_shift(step.before, weight.shape[1])

    def layout(self, step: Conv) -> torch.memory_format:
        """channels_last, but for fp32 on CPUs with few pixels: there oneDNN reads all weights anew for every image.

        512 channels at 4x4, batch 64: 18.4 ms in channels_last, 10.8 ms with both conversions; at 8x8, 256: 10.3 and 13.1.
        """
        few = self.device.type == "cpu" and self.dtype not in HALVES and prod(step.shape[1:]) <= 16
        return torch.contiguous_format if few else CHANNELS_LAST

    def _splits(self, step: Conv) -> bool:
        """Does this convolution read fp32 values in half precision?"""
        return self.dtype in HALVES and self.image_dtype == torch.float32 and step.inputs[0] in self.plan.exact

    # -- forward and backward -------------------------------------------------------------------------------------------------

    def logits(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K]; nothing is kept."""
        return self._forward(x, keep=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x`, contiguous [B, K]; what `backward` needs is kept."""
        return self._forward(x, keep=True)

    def _forward(self, x: Tensor, keep: bool) -> Tensor:
        values: list = [None] * len(self.plan.nodes)  # Tensors, as long as a step still reads them
        values[0] = x
        for i, step in enumerate(self.plan.steps):
            result, saved = FORWARD[type(step)](self, step, self.bound[i], values, keep)
            values[step.out] = result
            if keep:
                self._saved[i] = saved
            for j in step.frees:
                values[j] = None
        logits = values[self.plan.last]
        logits = logits.to(self.logits_dtype).contiguous()
        return check_logits(logits, x, self.highest_label)

    def backward(self, dlogits: Tensor, keep: bool = False) -> Tensor:
        """Gradient at the x of the last `forward`, to be multiplied by `factor`; what was kept is dropped, unless `keep`."""
        self.factor, self.keep = None, keep
        grads: Grads = [[] for _ in self.plan.nodes]
        grads[self.plan.last] = [(dlogits if self.plan.last in self.plan.exact else self.into_network(dlogits), False)]
        for i in reversed(range(len(self.plan.steps))):
            step, saved = self.plan.steps[i], self._saved[i]
            if not keep:
                self._saved[i] = None
            BACKWARD[type(step)](self, step, self.bound[i], saved, grads)
        return take(grads, 0)[0]

    def kept_bytes(self) -> int:
        """Bytes that the last `forward` keeps for `backward`."""
        return sum(t.numel() * t.element_size() for s in self._saved for t in _tensors(s))

    def enters(self, step: Step) -> bool:
        """Does the gradient leave the fp32 head behind this step?"""
        return step.out in self.plan.exact and step.inputs[0] not in self.plan.exact

    def into_network(self, grad: Tensor) -> Tensor:
        """A gradient [B, ...] that leaves the fp32 head: in half precision each sample is scaled to a largest element of 1."""
        if self.dtype not in HALVES:
            return grad
        largest = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        self.factor = largest
        return (grad / largest.view(-1, *[1] * (grad.ndim - 1))).to(self.dtype)


# ---- the steps --------------------------------------------------------------------------------------------------------------


def _twice(weight: Tensor) -> Tensor:
    """Weights [O, C, h, w] for an image in two halves: the same for both, [O, P, h, w], zeros up to a multiple P of 8."""
    out, channels, *kernel = weight.shape
    shape = out, -(-2 * channels // 8) * 8, *kernel
    wide = torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=CHANNELS_LAST).zero_()
    wide[:, :channels] = weight
    wide[:, channels : 2 * channels] = weight
    return wide


def _rows(t: Tensor) -> Tensor:
    """`t` with its channels innermost in memory."""
    return t.contiguous(memory_format=CHANNELS_LAST) if t.ndim == 4 else t.contiguous()


def take(grads: Grads, value: int) -> tuple[Tensor, bool]:
    """The gradient of `value`, summed over its readers, and whether its memory may be written to. It is dropped from `grads`."""
    contributions, grads[value] = grads[value], []
    return _sum(contributions)


def _sum(contributions: list[tuple[Tensor, bool]]) -> tuple[Tensor, bool]:
    if len(contributions) == 1:
        return contributions[0]
    total = contributions[0][0] + contributions[1][0]
    for grad, _ in contributions[2:]:
        total += grad
    return total, True


def _tensors(saved) -> list[Tensor]:
    if isinstance(saved, Tensor):
        return [saved]
    return [t for s in saved for t in _tensors(s)] if isinstance(saved, (tuple, list)) else []


def _conv_forward(run, step: Conv, bound, values, keep):
    weight, _, bias, scale, shift = bound
    x = _rows(values[step.inputs[0]])
    if run._splits(step):
        shape = len(x), weight.shape[1], *x.shape[2:]
        wide = torch.empty(shape, dtype=run.dtype, device=x.device, memory_format=CHANNELS_LAST)
        x = ops.split_image(x, wide, scale=scale, shift=shift)
    elif scale is not None or shift is not None:
        x = ops.scale_shift_relu(x, torch.empty_like(x), scale=scale, shift=shift, relu=False)
    x = x.to(run.dtype, memory_format=run.layout(step))
    c = step.conv
    y = torch.conv2d(x, weight, bias, c["stride"], c["padding"], c["dilation"], c["groups"])
    return _rows(y), x.shape


def _conv_backward(run, step: Conv, bound, shape, grads):
    weight, _, _, scale, _ = bound
    split = run._splits(step)
    layout = run.layout(step)
    grad = take(grads, step.out)[0].contiguous(memory_format=layout)
    c = step.conv
    unread = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    dx, _, _ = torch.ops.aten.convolution_backward(
        grad, unread, weight, None, c["stride"], c["padding"], c["dilation"], False, [0, 0], c["groups"], [True, False, False]
    )
    if split:
        dx = dx[:, : run.plan.nodes[step.inputs[0]].shape[0]]
    if scale is not None:
        dx = dx * scale.view(-1, 1, 1).to(dx.dtype)
    if step.inputs[0] != 0 and step.inputs[0] in run.plan.exact:
        dx = dx.to(run.image_dtype)  # other gradients meet it there
    grads[step.inputs[0]].append((dx, not split))


def _pointwise_forward(run, step: Pointwise, bound, values, keep):
    scale, shift = bound
    a, b = values[step.inputs[0]], values[step.inputs[1]] if len(step.inputs) > 1 else None
    a, b = _rows(a), b if b is None else _rows(b)
    mask = None
    if keep and step.relu:
        rows = a.numel() // a.shape[1]
        mask = torch.empty(rows, -(-a.shape[1] // 8), dtype=torch.uint8, device=a.device)
    total = None
    if step.total is not None:
        total = a if step.in_place else torch.empty_like(a)
        values[step.total] = total
    out = a if step.in_place and total is None else torch.empty_like(a)
    ops.scale_shift_relu(a, out, b=b, scale=scale, shift=shift, total=total, mask=mask, relu=step.relu)
    return out, mask


def _pointwise_backward(run, step: Pointwise, bound, mask, grads):
    if step.in_head:
        return
    scale, _ = bound
    outs, grads[step.out] = grads[step.out], []
    if len(outs) > 2:
        outs = [_sum(outs[1:]), outs[0]]
    stream = step.total if len(step.inputs) > 1 else step.inputs[0]  # the value before scale and shift
    residual, residual_fresh = take(grads, stream) if stream is not None and grads[stream] else (None, False)
    outs = [(_rows(g), fresh) for g, fresh in outs]
    if mask is None and scale is None and residual is None and len(outs) == 1:
        dx, fresh = outs[0]  # a bare addition
    else:
        (grad, _), grad2 = outs[0], outs[1][0] if len(outs) > 1 else None
        reusable = [g for g, fresh in outs if fresh]
        if residual is not None:
            residual = _rows(residual)
            reusable += [residual] * residual_fresh
        target = reusable[0] if reusable else torch.empty_like(grad)
        dx, fresh = ops.scale_shift_relu_grad(grad, target, grad2=grad2, mask=mask, scale=scale, residual=residual), True
    _give(step, dx, fresh, grads)


def _give(step: Step, dx: Tensor, fresh: bool, grads: Grads) -> None:
    """The gradient of the sum, before scale and shift, is that of each of its inputs."""
    for j in step.inputs:
        grads[j].append((dx, fresh and len(step.inputs) == 1))


def _linear_forward(run, step: Linear, bound, values, keep):
    weight, bias = bound
    x = values[step.inputs[0]]
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias), None


def _linear_backward(run, step: Linear, bound, saved, grads):
    grad, _ = take(grads, step.out)
    dx = grad @ bound[0]
    grads[step.inputs[0]].append((run.into_network(dx) if run.enters(step) else dx, True))


def _pool_linear_forward(run, step: PoolLinear, bound, values, keep):
    weight, bias = bound
    x = _rows(values[step.inputs[0]])
    logits = torch.empty(len(x), len(weight), dtype=weight.dtype, device=x.device)
    return ops.pool_linear(x, weight, logits, bias=bias), (x.shape, x.dtype)


def _pool_linear_backward(run, step: PoolLinear, bound, saved, grads):
    shape, dtype = saved
    grad = take(grads, step.out)[0].contiguous()
    dx = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=CHANNELS_LAST)
    if run.dtype in HALVES and run.enters(step):  # scaled as in `into_network`
        run.factor = torch.empty(len(grad), dtype=grad.dtype, device=grad.device)
    if step.pointwise is None:
        ops.pool_linear_grad(grad, bound[0], dx, factor=run.factor)
        grads[step.inputs[0]].append((dx, True))
    else:
        mask, (scale, _) = run._saved[step.pointwise], run.bound[step.pointwise]
        ops.pool_linear_grad(grad, bound[0], dx, mask=mask, scale=scale, factor=run.factor)
        _give(run.plan.steps[step.pointwise], dx, True, grads)


def _mean_forward(run, step: Mean, bound, values, keep):
    x = values[step.inputs[0]]
    dtype = acc_dtype(x.dtype) if step.out in run.plan.exact else x.dtype
    return x.mean((2, 3), dtype=dtype).view(len(x), *step.shape), x.shape


def _mean_backward(run, step: Mean, bound, shape, grads):
    grad, _ = take(grads, step.out)
    grad = grad.reshape(shape[0], shape[1], 1, 1)
    # The factor 1 / (H W) is one of those that do not count where each sample is scaled anyway.
    scaled = run.dtype in HALVES and run.enters(step)
    pixels = shape[2] * shape[3]
    if scaled:
        grad = run.into_network(grad)
        run.factor = run.factor / pixels
    else:
        grad = grad / pixels
    grads[step.inputs[0]].append((grad.expand(shape).contiguous(memory_format=CHANNELS_LAST), True))


def _reshape_forward(run, step: Reshape, bound, values, keep):
    x = values[step.inputs[0]]
    return x.reshape(len(x), *step.shape), x.shape


def _reshape_backward(run, step: Reshape, bound, shape, grads):
    grad, _ = take(grads, step.out)
    grads[step.inputs[0]].append((grad.reshape(shape), False))


def _local_forward(run, step: Local, bound, values, keep):
    inputs = [values[j] for j in step.inputs]
    if not keep:
        return step.function(*inputs), None
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = step.function(*leaves)
    return y.detach(), (leaves, y)


def _local_backward(run, step: Local, bound, saved, grads):
    leaves, y = saved
    grad, _ = take(grads, step.out)
    for j, dx in zip(step.inputs, torch.autograd.grad(y, leaves, grad, retain_graph=run.keep), strict=True):
        grads[j].append((dx, False))


# (run, step, what is bound to it, values, whether to keep what the backward needs) -> the step's value, what was kept
FORWARD: dict[type[Step], Callable[..., tuple[Tensor, Saved]]] = {
    Conv: _conv_forward, Pointwise: _pointwise_forward, Linear: _linear_forward, PoolLinear: _pool_linear_forward,
    Mean: _mean_forward, Reshape: _reshape_forward, Local: _local_forward,
}  # fmt: skip
# (run, step, what is bound to it, what was kept, grads) -> None; the gradients of the step's inputs are added to grads
BACKWARD: dict[type[Step], Callable[..., None]] = {
    Conv: _conv_backward, Pointwise: _pointwise_backward, Linear: _linear_backward, PoolLinear: _pool_linear_backward,
    Mean: _mean_backward, Reshape: _reshape_backward, Local: _local_backward,
}  # fmt: skip
