"""Which convolutions of a plan carry the passes next to them.

An engine (`fused_conv`) may do a convolution and a pass in one launch. Each pass finds its convolution here, once for a plan:

    forward    the convolution whose output the pass alone reads, if what is added to that was computed before. Of two that are
               added, as with a projection shortcut, the later one. Where the pass adds nothing, others may read the output too:
               the pass can write that as its total.
    way back   the first convolution that reads the pass's value, if no step reads that value or the stream (the sum before scale
               and shift) earlier. Backward it comes last, when all other gradients of value and stream are there.

It is not grouped where it would be wrong, and `alone` or `back_alone` say why. The pass in front of the head stays the head's. A
convolution of values that stay fp32 in half precision reads them in two halves, which a pass does not know: its gradient carries
none.
"""

from dataclasses import fields
from typing import TYPE_CHECKING

from .steps import Conv, FusedConv, Pointwise, Step

if TYPE_CHECKING:
    from .token_steps import LayerNorm

Readers = dict[int, list[int]]  # value -> the steps that read it, in order, as often as they do


def group(steps: list[Step], exact: set[int]) -> None:
    """Replace the convolutions among `steps` that carry a pass by `FusedConv`; `exact` are the values that stay fp32."""
    readers: Readers = {}
    makers: dict[int, int] = {}
    for i, step in enumerate(steps):
        makers.update(dict.fromkeys(made(step), i))
        for j in step.inputs:
            readers.setdefault(j, []).append(i)
    for p, step in enumerate(steps):
        if isinstance(step, Pointwise):
            carrier, step.alone = _forward_carrier(steps, p, step, readers, makers)
            if carrier is not None:
                conv = _fused(steps, carrier)
                conv.behind, conv.shared = p, len(readers[conv.out]) > 1
            carrier, step.back_alone = _gradient_carrier(steps, p, step, readers, exact)
            if carrier is not None:
                _fused(steps, carrier).in_front = p


def made(step: Step) -> list[int]:
    """The values that a step writes."""
    total = getattr(step, "total", None)
    return [step.out] if total is None else [step.out, total]


def stream(step: "Pointwise | LayerNorm") -> int | None:
    """The value before scale and shift, where others may read it."""
    return step.total if len(step.inputs) > 1 else step.inputs[0]


def _forward_carrier(steps: list[Step], p: int, step: Pointwise, readers: Readers, makers: dict[int, int]):
    """The convolution that may do the pass `step`, and "", or None and why there is none."""
    if step.act:
        return None, "its activation is no ReLU"
    sources = {makers[j]: j for j in step.inputs if isinstance(steps[makers.get(j, p)], Conv)}
    if not sources:
        return None, "it reads no convolution"
    conv = max(sources)
    if readers[sources[conv]] != [p] and (len(step.inputs) > 1 or _has_pass(steps[conv])):
        return None, "others read the convolution too"
    if any(makers.get(j, -1) > conv for j in step.inputs):
        return None, "what is added is computed after the convolution"
    return conv, ""


def _has_pass(step: Step) -> bool:
    return isinstance(step, FusedConv) and step.behind is not None


def _gradient_carrier(steps: list[Step], p: int, step: Pointwise, readers: Readers, exact: set[int]):
    """The convolution that may do the way back of `step`, and "", or None and why there is none."""
    if step.act:
        return None, "its activation is no ReLU"
    if step.in_head:
        return None, "the head does it"
    first = min(readers.get(step.out, [p]))
    reader = steps[first]
    if not isinstance(reader, Conv):
        return None, "the first to read it is no convolution"
    if step.out in exact:
        return None, "it stays fp32 in half precision"
    before = stream(step)
    others = [] if before is None else [k for k in readers.get(before, []) if k > p]
    if any(k < first for k in others):
        return None, "others read the sum before the convolution runs"
    if not (step.relu or step.affine or others or len(readers[step.out]) > 1):
        return None, "there is nothing to do"
    return first, ""


def _fused(steps: list[Step], i: int) -> FusedConv:
    """Step i as a `FusedConv`, which it becomes."""
    step = steps[i]
    if not isinstance(step, FusedConv):
        assert isinstance(step, Conv)
        step = steps[i] = FusedConv(**{f.name: getattr(step, f.name) for f in fields(Conv)})
    return step
