"""Keep-best: equal to the reference, element for element."""

import pytest
import torch

from tests.ops.helpers import acc, reference, sentinels

# best loss, its success, new loss, its success, is the new one better (by success, then loss)?
CASES = [
    (1.0, False, 2.0, False, True),
    (2.0, False, 1.0, False, False),
    (1.0, False, 1.0, False, False),
    (9.0, False, 1.0, True, True),
    (1.0, True, 9.0, False, False),
    (1.0, True, 2.0, True, True),
    (float("-inf"), False, float("nan"), False, False),
    (float("-inf"), False, -3.0, False, True),
    (1.0, False, float("inf"), False, True),
]


def samples(dtype):
    best, x = (torch.rand(4, 3, 32, 32).to(dtype) for _ in range(2))
    loss, success = torch.zeros(4, dtype=acc(dtype)), torch.tensor([True, False, True, False])
    yield "keep_best_", (best, loss, success, x, loss + 1, ~success)
    yield "keep_best_", (best, loss, None, x, loss + 1, None)


@pytest.mark.parametrize("by_success", [False, True])
@pytest.mark.parametrize("sample", [(0,), (1,), (127,), (3, 7, 7), (3, 32, 32)], ids=str)
def test_takes_the_better(impl, by_success, sample):
    best_loss, best_success, loss, success, better = (torch.tensor(c, device=impl.device) for c in zip(*CASES, strict=True))
    for dtype in impl.dtypes:
        for offset in impl.offsets:
            best, intact = sentinels((len(CASES), *sample), dtype, impl.device, offset)
            best.copy_(torch.rand(best.shape))
            x_adv = torch.rand(best.shape, device=impl.device).to(dtype)
            state = [best, best_loss.to(acc(dtype), copy=True), best_success.clone() if by_success else None]
            new = [x_adv, loss.to(acc(dtype)), success if by_success else None]
            expected = [None if t is None else t.clone() for t in state]
            reference("keep_best_")(*expected, *new)
            impl("keep_best_")(*state, *new)
            takes = better if by_success else loss > best_loss
            assert torch.equal(expected[0], torch.where(takes.view(-1, *[1] * len(sample)), x_adv, expected[0]))
            for got, want in zip(state, expected, strict=True):
                assert got is None or torch.equal(got, want)
            assert intact()
