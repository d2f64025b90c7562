"""Random networks by the plan and by autograd: batches of all sizes, other weights, and the way back more than once."""

import pytest
import torch

from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.nodes import CannotPlan
from spat_kernels.input_gradient.plan_cache import plan_and_dtype
from spat_kernels.input_gradient.planned_gradient import PlannedGradient
from tests.input_gradient.random_networks import network, shuffle

BATCHES = 2, 1, 5, 3


def by_autograd(model, x, dlogits):
    """Logits and gradient. A single image is computed twice: for one, torch 2.11's BatchNorm misreads a transposed gradient."""
    count = len(x)
    x, dlogits = (t.repeat(2, *[1] * (t.ndim - 1)) if count == 1 else t for t in (x, dlogits))
    reference = InputGradient(model)
    logits = reference.forward(x)
    return logits[:count], reference.backward(dlogits)[:count]


def assert_right(model, gradient, x, generator):
    dlogits = torch.randn(len(x), 5, generator=generator, dtype=x.dtype)
    logits, expected = by_autograd(model, x, dlogits)
    before = x.clone()

    def close(ours, theirs):  # gradients may be 0 but for rounding, as behind InstanceNorm and the mean
        assert (ours - theirs).abs().max() <= 1e-10 * max(float(theirs.abs().max()), 1e-4)

    close(gradient.logits(x), logits)
    close(gradient.forward(x), logits)
    for keep in (True, True, False):
        close(gradient.backward(dlogits, keep=keep), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("seed", range(24))
@torch.no_grad()
def test_random_networks_equal_autograd(seed):
    model, shape = network(seed, steps=2 + seed % 8)
    generator = torch.Generator().manual_seed(seed)
    try:
        plan, dtype = plan_and_dtype(model, torch.rand(2, *shape, generator=generator, dtype=torch.float64), None)
    except CannotPlan as reason:  # a random walk may work in place where autograd does not let it, or make gradients of 0
        assert "in place" in str(reason) or "gradients" in str(reason)
        return
    gradient = PlannedGradient(plan, model, torch.float64, dtype, max(BATCHES))
    for trained in (False, True):
        if trained:  # vectors were ones: what mistakes one dimension for another of the same length shows now
            shuffle(model, seed)
        gradient.prepare()
        for count in BATCHES:
            x = torch.rand(2 * count, *shape, generator=generator, dtype=torch.float64)
            x = {1: x[:1], 3: x[:3].contiguous(memory_format=torch.channels_last)}.get(count, x[::2])
            assert_right(model, gradient, x, generator)
