"""Tensors that are no ordinary memory: every op refuses them by name, compiled and as the reference, or both give the same."""

import functools
import gc
import itertools
import weakref

import pytest
import torch

from tests.ops.helpers import ELSEWHERE, OPS, all_samples


def calls(op):
    """The op as it is served on a CPU, and as the reference behind its gate."""
    overload = getattr(torch.ops.spat, op).default
    return overload, lambda *arguments: overload.redispatch(ELSEWHERE, *arguments)


def schema(op):
    """Names of the arguments, and which are written."""
    arguments = getattr(torch.ops.spat, op).default._schema.arguments
    return [a.name for a in arguments], {a.name for a in arguments if a.alias_info and a.alias_info.is_write}


def optional(op):
    return [a.name for a in getattr(torch.ops.spat, op).default._schema.arguments if isinstance(a.type, torch.OptionalType)]


def copied(v):
    return v.clone(memory_format=torch.preserve_format) if isinstance(v, torch.Tensor) else v


@functools.cache
def sample(op):
    """The smallest one with all the optional arguments."""
    given = [a for name, a in all_samples() if name == op]
    return min(
        given, key=lambda a: (-len(a), -sum(v is not None for v in a), sum(v.numel() for v in a if isinstance(v, torch.Tensor)))
    )


def arguments_of(op):
    """By name, in memory of their own."""
    return dict(itertools.zip_longest(schema(op)[0], map(copied, sample(op))))


def with_storage(t, less):
    """`t` as after `untyped_storage().resize_`, which sharded training uses."""
    storage = t.untyped_storage()
    storage.resize_(max(0, storage.nbytes() - less))
    return t


def negative(t):
    return torch._neg_view(t) if t.is_floating_point() else t.to(torch.complex64).conj()


STRANGE = {
    "negative bit": negative,
    "conjugate bit": lambda t: t.to(torch.complex64).conj(),
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "complex": lambda t: t.to(torch.complex64),
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "meta": lambda t: t.to("meta"),
    "no name in the stable ABI": lambda t: t.contiguous().view(torch.uint8).view(torch.bits8),
    "expanded": lambda t: t[:1].expand_as(t) if len(t) > 1 else t.new_empty(()).expand(t.shape),
    "no memory": lambda t: with_storage(t, 2**62),
    "a byte too little": lambda t: with_storage(t, 1),
    "no dimension": lambda t: t.flatten()[0],
    "none": lambda t: None,
}
ALLOWED = {("no dimension", name) for name in ("eps", "step_size", "factor", "negative")}  # one value for all


@pytest.mark.parametrize("op", OPS)
def test_every_strange_tensor_is_refused_by_name(op):
    names, _ = schema(op)
    tensors = [name for name, t in arguments_of(op).items() if isinstance(t, torch.Tensor)]
    for call, name, (kind, strange) in itertools.product(calls(op), tensors, STRANGE.items()):
        arguments = arguments_of(op)
        if arguments[name].numel() == 1 or (kind, name) in ALLOWED or (kind == "none" and name in optional(op)):
            continue
        arguments[name] = strange(arguments[name])
        with pytest.raises(RuntimeError, match=rf"^({'|'.join(names)}) ") as refusal:
            call(*arguments.values())
        assert "\n" not in str(refusal.value), (kind, name)


def laid_over(op, result, other, shift):
    """Arguments whose `result` begins in the memory of `other`, `shift` elements before it; None where they cannot."""
    arguments = arguments_of(op)
    a, b = arguments[result], arguments[other]
    if result == other or a is None or not isinstance(b, torch.Tensor) or a.dtype != b.dtype or min(a.numel(), b.numel()) < 2:
        return None
    memory = a.new_zeros(max(a.numel(), b.numel()) + shift)
    arguments[other] = memory.as_strided(b.shape, b.stride(), shift).copy_(b)
    arguments[result] = memory.as_strided(a.shape, a.stride())
    return arguments


@pytest.mark.parametrize("op", OPS)
def test_results_overlap_nothing_but_images_that_they_may_replace(op):
    names, written = schema(op)
    replaced = set()
    for result, other, shift in itertools.product(sorted(written), names, (0, 1)):
        for call in calls(op):
            if (arguments := laid_over(op, result, other, shift)) is None:
                continue
            apart = {name: copied(v) for name, v in arguments.items()}
            try:
                call(*arguments.values())
            except RuntimeError as error:
                overlaps = (f"{a} overlaps {b} in memory: clone one of them" for a, b in itertools.permutations((result, other)))
                assert str(error) in overlaps
                continue
            assert shift == 0
            assert other not in written
            replaced.add((result, other, call is calls(op)[0]))
            calls(op)[1](*apart.values())
            for name in written:
                torch.testing.assert_close(arguments[name], apart[name], equal_nan=True)
    assert bool(replaced) == op.startswith(("scale_shift_", "layer_norm"))
    assert {r for r in replaced if r[2]} == {(*r[:2], True) for r in replaced}  # both allow the same


def test_a_lazy_copy_is_no_overlap():
    x, grad, eps = torch.rand(4, 8), torch.ones(4, 8), torch.full((1,), 0.125)
    for call in calls("linf_step_"):
        x_adv = torch._lazy_clone(x)
        before = x.tolist()
        call(x_adv, x, grad, eps, eps, -9.0, 9.0, None)
        assert torch.equal(x_adv, x + eps)
        assert x.tolist() == before


def test_numbers_beyond_float32_are_infinite():
    for call in calls("linf_step_"):
        x_adv, x, eps = torch.rand(4, 8), torch.rand(4, 8), torch.full((1,), 0.25)
        call(x_adv, x, x_adv.clone(), eps, eps, -1e280, 1e280, None)
        assert (x_adv - x).abs().max() <= 0.2501
        call(x_adv, x, x_adv.clone(), eps, eps, 1e39, torch.inf, None)
        assert (x_adv == torch.inf).all()


def test_any_numbers_step_alike():
    """NaN where x_adv, x or eps is; a negative eps goes by the formula."""
    numbers = [0.0, 0.3, -1.0, torch.inf, -torch.inf, torch.nan]
    cases = list(itertools.product(numbers, numbers, numbers, [*numbers, -0.1]))
    start, x, grad, eps = (torch.tensor(column)[:, None] for column in zip(*cases, strict=True))
    results = []
    for call in calls("linf_step_"):
        results.append(start.clone())
        call(results[-1], x, grad, eps.flatten(), torch.full((1,), 0.2), -9.0, 9.0, None)
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
    assert results[0][start.isnan() | x.isnan() | eps.isnan()].isnan().all()


def test_refused_arguments_in_a_cycle_are_collected():
    class Box:
        pass

    def refused(op, call):
        box = Box()
        box.itself, box.arguments = box, arguments_of(op)
        name = schema(op)[0][0]
        with pytest.raises(RuntimeError):
            call(*(box.arguments | {name: box.arguments[name].to(torch.complex64)}).values())
        return weakref.ref(box.arguments[name])

    left = [refused(op, call) for op in OPS for call in calls(op)]
    gc.collect()
    assert all(t() is None for t in left)


def test_references_stay_outside_autograd():
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    for call in calls("lsce_grad"):
        dlogits = torch.empty(4, 5)
        call(logits, labels, dlogits, None, 0.0, False, 1.0, False)
        assert not dlogits.requires_grad
