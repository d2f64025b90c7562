"""Gradients at the logits: against formulas written with PyTorch's own losses, differentiated by autograd in fp64.

Tolerance (style of flash-attention): at most twice the error that eager PyTorch makes in the same dtype, with a floor of one
rounding of the largest result, or of what the order of a sum costs (`sum_error`).
"""

import decimal
import itertools
from decimal import Decimal

import pytest
import torch
import torch.nn.functional as F

from tests.ops.helpers import acc, reference, sentinels

CLASSES = [2, 3, 4, 10, 17, 100, 1000, 4099]
ALPHA, KAPPA, SCALE = 0.3, 1.5, 4.0


def samples(dtype):
    y, loss = torch.tensor([0, 3, 9, 1] * 4), torch.zeros(16, dtype=acc(dtype))
    for classes, value in ((12, None), (12, loss), (1000, loss), (4096, loss)):  # rows of 48 bytes in fp32, which is packets
        z, dz, q = torch.rand(16, classes).to(dtype), torch.rand(16, classes).to(dtype), torch.rand(16, classes, dtype=acc(dtype))
        yield "lsce_grad", (z, y, dz, value, 0.1, False, 1.0, False)
        yield "lsce_grad", (z, y, dz, value, 0.0, True, 1.0, True)
        yield "kl_grad", (z, q, dz, value, 1.0)
        yield "margin_grad", (z, y, dz, value, 0.0, False, 1.0)
        yield "pma_grad", (z, y, dz, value, False, 1.0, True)
        yield "pma_grad", (z, y, dz, value, True, 1.0, False)
        yield "dlr_grad", (z, y, None, dz, value, 1.0)
        yield "dlr_grad", (z, y, y.flip(0), dz, value, 1.0)


def lsce(z, y, q):
    classes = z.shape[1]
    return F.cross_entropy(z, y, label_smoothing=ALPHA * classes / (classes - 1), reduction="none")


def ce(z, y, q):
    return F.cross_entropy(z, y, reduction="none")


def kl(z, y, q):
    return F.kl_div(z.log_softmax(1), q.to(z.dtype), reduction="none").sum(1)


def best_other(z, y):
    """The largest logit among the other classes, minus that of `y`."""
    return z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -torch.inf).amax(1) - z.gather(1, y[:, None])[:, 0]


def margin(z, y, q):
    return best_other(z, y).clamp(max=KAPPA)


def margin_targeted(z, y, q):
    return (-best_other(z, y)).clamp(max=KAPPA)


def pma(z, y, q):
    p = z.softmax(1)
    return p.masked_fill(F.one_hot(y, z.shape[1]).bool(), -1).amax(1) - p.gather(1, y[:, None])[:, 0]


def dlr(z, y, q):
    s = z.sort(1, descending=True).values
    return best_other(z, y) / (s[:, 0] - s[:, 2] + 1e-12)


def dlr_targeted(z, y, q):
    s = z.sort(1, descending=True).values
    t = (y + 1) % z.shape[1]
    difference = z.gather(1, t[:, None])[:, 0] - z.gather(1, y[:, None])[:, 0]
    return difference / (s[:, 0] - (s[:, 2] + s[:, 3]) / 2 + 1e-12)


# name: (eager loss, fewest classes, the op's call with everything but logits, dlogits and loss)
LOSSES = {
    "ce": (ce, 2, lambda op, z, y, q, d, v: op("lsce_grad")(z, y, d, v, 0.0, False, SCALE, False)),
    "lsce": (lsce, 2, lambda op, z, y, q, d, v: op("lsce_grad")(z, y, d, v, ALPHA, False, SCALE, False)),
    "lsce_targeted": (lambda *a: -lsce(*a), 2, lambda op, z, y, q, d, v: op("lsce_grad")(z, y, d, v, ALPHA, True, SCALE, False)),
    "kl": (kl, 2, lambda op, z, y, q, d, v: op("kl_grad")(z, q, d, v, SCALE)),
    "margin": (margin, 2, lambda op, z, y, q, d, v: op("margin_grad")(z, y, d, v, KAPPA, False, SCALE)),
    "margin_targeted": (margin_targeted, 2, lambda op, z, y, q, d, v: op("margin_grad")(z, y, d, v, KAPPA, True, SCALE)),
    "pma": (pma, 2, lambda op, z, y, q, d, v: op("pma_grad")(z, y, d, v, False, SCALE, False)),
    "pma_targeted": (lambda *a: -pma(*a), 2, lambda op, z, y, q, d, v: op("pma_grad")(z, y, d, v, True, SCALE, False)),
    "dlr": (dlr, 3, lambda op, z, y, q, d, v: op("dlr_grad")(z, y, None, d, v, SCALE)),
    "dlr_targeted": (dlr_targeted, 4, lambda op, z, y, q, d, v: op("dlr_grad")(z, y, (y + 1) % z.shape[1], d, v, SCALE)),
}
SOFTMAX = ("ce", "lsce", "lsce_targeted", "kl", "pma", "pma_targeted")


def eager(loss, z, y, q):
    z = z.detach().requires_grad_()
    value = loss(z, y, q)
    (grad,) = torch.autograd.grad(value.sum(), z)
    return grad.double() * SCALE, value.detach().double()


def sum_error(name, classes, dtype):
    """The relative error of p_k that adding up a row of e^(z - max) accounts for, where the loss has a softmax.

    A lane of the CUDA kernel adds classes / 32 terms one after another, then five shuffles add the lanes. A sum of n positive
    terms has a relative error of at most n unit roundoffs, and of about sqrt(n) as they come (Higham and Mary, SIAM J. Sci.
    Comput. 41, 2019): 11.6 with 4099 classes, where 10.2 were seen. Eager PyTorch spreads a long row over more threads on a GPU.
    The gradient of the probability margin has the sum three times as a factor, and a product of five other rounded terms.
    """
    sums, others = (3, 5) if name.startswith("pma") else (1, 0)
    return (sums * (classes / 32 + 5) ** 0.5 + others) * torch.finfo(acc(dtype)).eps / 2 if name in SOFTMAX else 0.0


def assert_as_good(ours, rival, exact, floor):
    error, rivals_error = (ours - exact).abs().max(), (rival - exact).abs().max()
    assert error <= max(2 * rivals_error, floor), f"error {error:.2e}, eager {rivals_error:.2e}, floor {floor:.2e}"


def logits_without_ties(rows, classes, dtype, device):
    """Random logits whose four largest differ: equal ones have no derivative (test_ties_go_by_index)."""
    z = 3 * torch.randn(rows, classes)
    places = torch.rand(rows, classes).argsort(1)[:, :4]
    return z.scatter(1, places, z.amax() + 1 + torch.arange(places.shape[1]).expand_as(places)).to(device, dtype)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", LOSSES)
def test_matches_autograd(impl, name, classes):
    loss, fewest, call = LOSSES[name]
    if classes < fewest:
        pytest.skip(f"{name} needs {fewest} classes")
    rows = 7
    for dtype in impl.dtypes:
        z = logits_without_ties(rows, classes, dtype, impl.device)
        y = torch.randint(classes, (rows + 1,), device=impl.device)[1:]  # not 16-byte aligned
        y[0] = z[0].argmax()
        q = torch.randn(rows, classes, device=impl.device).to(acc(dtype)).softmax(1)
        for offset in impl.offsets:
            logits, _ = sentinels((rows, classes), dtype, impl.device, offset)
            logits.copy_(z)
            dlogits, intact = sentinels((rows, classes), dtype, impl.device, offset)
            value, value_intact = sentinels((rows,), acc(dtype), impl.device, offset)
            call(impl, logits, y, q, dlogits, value)
            assert intact()
            assert value_intact()
            assert torch.equal(logits, z)

            exact, exact_value = eager(loss, z.double(), y, q.double())
            grad, eager_value = eager(loss, z, y, q)
            roundings = 64 if dtype == torch.float64 else 1  # in fp64 the rival is the yardstick itself
            accuracy = max(roundings * torch.finfo(dtype).eps, sum_error(name, classes, dtype))
            assert_as_good(dlogits.double(), grad, exact, accuracy * exact.abs().max())
            # a loss is a difference of terms as large as the logits: four roundings of those
            largest = max(z.abs().max(), exact_value.abs().max())
            assert_as_good(value.double(), eager_value, exact_value, 4 * roundings * largest * torch.finfo(acc(dtype)).eps)

            # as aligned as dlogits: on a GPU Triton lays out a tile, and so orders its sums, by the alignment of what it writes
            alone, _ = sentinels((rows, classes), dtype, impl.device, offset)
            call(impl, logits, y, q, alone, None)
            assert torch.equal(alone, dlogits), "the gradient must not depend on whether the value is asked for"


@pytest.mark.parametrize("name", LOSSES)
def test_empty_batch(impl, name):
    z, y, value = torch.empty(0, 10), torch.empty(0, dtype=torch.int64), torch.empty(0)
    LOSSES[name][2](impl, *(t.to(impl.device) for t in (z, y, z.clone(), z.clone(), value)))


def test_confident_samples_do_not_cancel(impl):
    """p_y - 1 is 0 in fp32 when 1 - p_y = 1e-9; the op keeps its full relative precision, and the loss too."""
    z = torch.tensor([[20.0, 0.0, -1.0], [0.0, 30.0, 1.0]], device=impl.device)
    y = torch.tensor([0, 1], device=impl.device)
    dlogits, value = torch.empty_like(z), torch.empty(2, device=impl.device)
    impl("lsce_grad")(z, y, dlogits, value, 0.0, False, 1.0, False)
    p = z.double().softmax(1)
    exact = p.clone()
    exact[0, 0], exact[1, 1] = -(p[0, 1] + p[0, 2]), -(p[1, 0] + p[1, 2])
    torch.testing.assert_close(dlogits.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(value.double(), -exact.gather(1, y[:, None])[:, 0], rtol=1e-6, atol=0)  # -log(1 - s) = s + s^2/2


def normalized(z, y):
    """softmax over the other classes, and -1 at y."""
    others = z.double().scatter(1, y[:, None], -torch.inf)
    return others.softmax(1).scatter(1, y[:, None], -1.0)


@pytest.mark.parametrize("classes", CLASSES)
def test_normalized_gradient(impl, classes):
    """It is dL/dz / (1 - p_y) where that can be computed, has the same loss to the bit, and one layout's rim."""
    for dtype in impl.dtypes:
        z = (3 * torch.randn(9, classes)).to(impl.device, dtype)
        y = torch.randint(classes, (9,), device=impl.device)
        y[0], y[1] = z[0].argmax(), z[1].argmin()
        for targeted, offset in ((False, 0), (True, 1)):
            scale = -SCALE if targeted else SCALE
            logits, _ = sentinels(z.shape, dtype, impl.device, offset)
            logits.copy_(z)
            dlogits, intact = sentinels(z.shape, dtype, impl.device, offset)
            plain, _ = sentinels(z.shape, dtype, impl.device, offset)  # as aligned as dlogits: see test_matches_autograd
            value, plain_value = (torch.full_like(z[:, 0], torch.nan, dtype=acc(dtype)) for _ in range(2))
            impl("lsce_grad")(logits, y, dlogits, value, 0.0, targeted, SCALE, True)
            impl("lsce_grad")(logits, y, plain, plain_value, 0.0, targeted, SCALE, False)
            assert intact()
            assert torch.equal(value, plain_value)
            assert (dlogits.gather(1, y[:, None]) == -scale).all(), "exactly"
            exact = scale * normalized(z, y)
            accuracy = {torch.float64: 1e-13, torch.float32: 4e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
            torch.testing.assert_close(dlogits.double(), exact, rtol=accuracy, atol=torch.finfo(dtype).smallest_normal)
            doubt = (1 - z.double().softmax(1).gather(1, y[:, None])).clamp(min=1e-3)
            torch.testing.assert_close(
                (dlogits.double() * doubt)[doubt[:, 0] > 1e-3],
                plain.double()[doubt[:, 0] > 1e-3],
                rtol=4 * max(accuracy, 1e-9),
                atol=SCALE * torch.finfo(dtype).eps,
            )


def test_normalized_gradient_of_certain_samples(impl):
    """z_y - z_k = 1e4, where every p_k underflows in fp64 too; and the other way round; and with classes masked out."""
    inf = torch.inf
    for dtype in set(impl.dtypes) & {torch.float32, torch.float64}:
        rows = [
            [1e4, 0.0, 1.0, -1.0],
            [1e4, -1e4, -1e4, -1e4 - 1],
            [-1e4, 0.0, 1.0, -1.0],
            [0.0, 1e4, -1e4, 1e4],
            [5.0, -inf, 2.0, -inf],
        ]
        z = torch.tensor(rows + [[-inf, 0.0, 1.0, 2.0]], dtype=dtype, device=impl.device)
        y = torch.zeros(len(z), dtype=torch.int64, device=impl.device)
        dlogits = torch.full_like(z, torch.nan)
        impl("lsce_grad")(z, y, dlogits, None, 0.0, False, 1.0, True)
        torch.testing.assert_close(dlogits.double(), normalized(z, y), rtol=1e-6, atol=0)
        assert (dlogits[:, 0] == -1).all()
        assert dlogits[4].tolist() == [-1.0, 0.0, 1.0, 0.0]


def test_normalized_gradient_without_a_direction(impl):
    """All other logits -inf: 0. NaN or +inf among the logits: NaN, in that row alone."""
    inf, nan = torch.inf, torch.nan
    rows = [
        [1.0, -inf, -inf],
        [-inf, -inf, -inf],
        [nan, 0.0, 1.0],
        [0.0, nan, 1.0],
        [inf, 0.0, 1.0],
        [0.0, inf, 1.0],
        [0.0, 1.0, 2.0],
    ]
    z = torch.tensor(rows, device=impl.device)
    y, value = torch.zeros(len(z), dtype=torch.int64, device=impl.device), torch.empty(len(z), device=impl.device)
    for op in (impl("lsce_grad"), reference("lsce_grad")):
        dlogits = torch.full_like(z, 7.0)
        op(z, y, dlogits, value, 0.0, False, 1.0, True)
        assert (dlogits[:2] == 0).all()
        assert value[0] == 0
        assert dlogits[2:6].isnan().any(1).all()
        assert dlogits[6].isfinite().all()


def exact_pma(row, y):
    """L, its gradient and that without its largest element as a factor, of one row of floats, written out in 60 digits or more.

    1 - p_k is 1 at 60 digits when p_k = 1e-4343, so sums of the other probabilities stand for it, and products for differences.
    """
    with decimal.localcontext(prec=60, Emin=-(10**9)):
        z = [Decimal(v) for v in row]
        m = max((k for k in range(len(z)) if k != y), key=lambda k: (z[k], -k))
        top = max(z)
        p = [(v - top).exp() for v in z]
        total = sum(p)
        p = [v / total for v in p]
        gap = (z[m] - z[y]).copy_abs()
        ahead = max(p[m], p[y]) * (1 - (-gap).exp() if gap > Decimal("1e-30") else gap)  # |p_m - p_y|
        ahead = ahead.copy_sign(z[m] - z[y])
        grad = [-p[k] * ahead for k in range(len(z))]
        grad[m] = p[m] * (sum(p[k] for k in range(len(z)) if k != m) + p[y])
        grad[y] = -p[y] * (sum(p[k] for k in range(len(z)) if k != y) + p[m])
        largest = max(v.copy_abs() for v in grad)
        return float(ahead), [float(v) for v in grad], [float(v / largest) for v in grad]


GAPS = [0.0, 1e-6, 1e-3, 0.1, 0.24, 0.26, 1.0, 17.0, 40.0, 90.0, 104.0, 800.0, 1e4]


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("wrong", [False, True])
def test_probability_margin_at_every_gap(impl, wrong, targeted):
    """Label first, then its rival by each gap, and others near and far: element by element, to a few roundings."""
    sign = -1.0 if targeted else 1.0
    for dtype in impl.dtypes:
        up = [-gap for gap in GAPS] if wrong else GAPS
        rows = [[gap, 0.0, *others] for gap in up for others in ([-3.0, -0.5], [-30.0, -1e4], [-2e-3, -200.0], [-1e4, -1e4])]
        z = torch.tensor(rows, dtype=torch.float64).to(dtype).to(impl.device)
        y = torch.zeros(len(z), dtype=torch.int64, device=impl.device)
        exact = [exact_pma(row, 0) for row in z.double().tolist()]
        values, grads, directions = (
            torch.tensor(part, dtype=torch.float64, device=impl.device) for part in zip(*exact, strict=True)
        )
        roundings = 16 * torch.finfo(acc(dtype)).eps
        reach = 1 + z.double().abs().amax(1, keepdim=True).clamp(max=745)  # rounding x changes e^x by a share of |x| eps / 2
        for normalize, expected in ((False, grads), (True, directions)):
            dlogits, value = torch.full_like(z, torch.nan), torch.full_like(y, torch.nan, dtype=acc(dtype))
            impl("pma_grad")(z, y, dlogits, value, targeted, 1.0, normalize)
            error = (dlogits.double() - sign * expected).abs()
            smallest = torch.finfo(dtype).smallest_normal + torch.finfo(acc(dtype)).smallest_normal
            assert (error <= (roundings * reach + torch.finfo(dtype).eps) * expected.abs() + smallest).all(), (dtype, normalize)
            assert ((value.double() - sign * values).abs() <= roundings * values.abs()).all(), dtype
        ahead = z[:, :2].argmax(1, keepdim=True)
        assert (dlogits.gather(1, ahead) == sign * (2 * ahead - 1)).all(), "exactly"
        assert (dlogits[:, 1] * sign > 0).all()


def test_probability_margin_needs_a_softmax(impl):
    """All logits but the largest -inf: 0, and the value is exact. NaN, +inf or all -inf: NaN, in that row alone."""
    inf, nan = torch.inf, torch.nan
    rows = [[1.0, -inf, -inf], [-inf, 2.0, -inf], [-inf, 0.0, 1.0], [nan, 0.0, 1.0], [0.0, nan, 1.0], [0.0, 1.0, nan], [nan] * 3]
    rows += [[inf, 0.0, 1.0], [0.0, inf, 1.0], [0.0, 1.0, inf], [inf, inf, 0.0], [-inf] * 3, [0.0, 1.0, 2.0], [0.0, -3e38, 3e38]]
    for dtype in set(impl.dtypes) & {torch.float32, torch.float64}:
        z = torch.tensor(rows, dtype=dtype, device=impl.device)
        y = torch.zeros(len(z), dtype=torch.int64, device=impl.device)
        for op, normalize in itertools.product((impl("pma_grad"), reference("pma_grad")), (False, True)):
            dlogits, value = torch.full_like(z, 7.0), torch.full_like(z[:, 0], 7.0)
            op(z, y, dlogits, value, False, 1.0, normalize)
            assert (dlogits[:2] == 0).all()
            assert value[:2].tolist() == [-1.0, 1.0]
            assert dlogits[2].sign().tolist() == [0.0, -1.0, 1.0]
            assert dlogits[3:12].isnan().all()
            assert value[3:12].isnan().all()
            assert dlogits[12:].isfinite().all()
            assert value[13] == 1
            if normalize:
                assert dlogits[2].tolist() == [0.0, -1.0, 1.0]
                assert dlogits[13].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("lift", [0.0, -9.0])
@pytest.mark.parametrize(("kappa", "value", "slope"), [(0.0, 0.0, 0.0), (2.0, 2.0, 1.0), (1.99, 1.99, 0.0), (50.0, 2.0, 1.0)])
def test_margin_stops_beyond_kappa(impl, kappa, value, slope, lift):
    """The other class is the best among the others, not 0, which (1 - onehot) * z would take of negative logits."""
    z = torch.tensor([[1.0, 3.0, 0.0]], device=impl.device) + lift
    dlogits, got = torch.empty_like(z), torch.empty(1, device=impl.device)
    impl("margin_grad")(z, torch.tensor([0], device=impl.device), dlogits, got, kappa, False, 1.0)
    assert got.item() == pytest.approx(value)
    assert dlogits.tolist() == [[-slope, slope, 0.0]]


def test_an_infinite_scale_leaves_zeros(impl):
    z = torch.tensor([[1.0, 3.0, 0.0], [3.0, 1.0, 0.0]], device=impl.device)
    y = torch.zeros(2, dtype=torch.int64, device=impl.device)
    for op in (impl("margin_grad"), reference("margin_grad")):
        dlogits = torch.empty_like(z)
        op(z, y, dlogits, None, 0.0, False, torch.inf)
        assert dlogits.tolist() == [[0.0, 0.0, 0.0], [-torch.inf, torch.inf, 0.0]]


def test_ties_go_by_index(impl):
    z = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]], device=impl.device)
    y = torch.tensor([3], device=impl.device)
    dlogits = torch.empty_like(z)
    impl("margin_grad")(z, y, dlogits, None, 50.0, False, 1.0)
    assert dlogits.tolist() == [[1.0, 0.0, 0.0, -1.0, 0.0]]
    value = torch.empty(1, device=impl.device)
    impl("pma_grad")(z, y, dlogits, None, False, 1.0, True)
    assert dlogits.tolist() == [[1.0, 0.0, 0.0, -1.0, 0.0]]
    impl("dlr_grad")(z, y, None, dlogits, value, 1.0)
    assert value.item() == 0
    assert dlogits.isfinite().all()
    assert dlogits[0].sign().tolist() == [1.0, 0.0, 0.0, -1.0, 0.0]


@pytest.mark.parametrize("possible", [1, 2, 3, 4])
@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_of_few_possible_classes_is_the_margin(impl, possible, targeted):
    """-inf rules classes out: with fewer left than the denominator takes, it counts as 1."""
    for dtype in impl.dtypes:
        z = torch.full((2, 7), -torch.inf, dtype=dtype, device=impl.device)
        z[:, [5, 0, 3, 2][:possible]] = torch.tensor([1.0, 3.0, -2.0, 0.5], dtype=dtype, device=impl.device)[:possible]
        y, t = (torch.tensor(labels, device=impl.device) for labels in ([0, 5], [5, 0]))
        if possible == 1:
            y, t = torch.full_like(y, 5), torch.full_like(t, 0)
        dlogits, value = torch.full_like(z, torch.nan), torch.empty(2, dtype=acc(dtype), device=impl.device)
        impl("dlr_grad")(z, y, t if targeted else None, dlogits, value, 1.0)
        margin = torch.where(y == 0, -2.0, 2.0) if possible > 1 else torch.tensor([-torch.inf] * 2, device=impl.device)
        if possible < (4 if targeted else 3):
            assert torch.equal(value, margin.to(value))
            assert torch.equal(dlogits.gather(1, y[:, None]), -torch.ones_like(z[:, :1]))
            assert (dlogits == 1).sum() == 2
            assert (dlogits == 0).sum() == 10
        else:
            assert value.isfinite().all()
            assert (value.sign() == margin.sign()).all()
            assert dlogits.isfinite().all()


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_of_a_label_that_is_ruled_out_is_finite(impl, targeted):
    for dtype in impl.dtypes:
        z = torch.tensor([[1.0, 3.0, -2.0, 0.5, -torch.inf]], dtype=dtype, device=impl.device)
        y, t = (torch.tensor([label], device=impl.device) for label in (4, 1))
        dlogits, value = torch.full_like(z, torch.nan), torch.empty(1, dtype=acc(dtype), device=impl.device)
        impl("dlr_grad")(z, y, t if targeted else None, dlogits, value, 1.0)
        assert value.item() == torch.inf
        assert dlogits.isfinite().all()
        assert dlogits[0].sign().tolist() == [0.0, 1.0, 0.0, 0.0, -1.0]


def test_masked_logits(impl):
    """-inf for classes that a model masks out: probability 0, finite gradients, and no NaN in the unsmoothed loss."""
    z = torch.tensor([[2.0, -torch.inf, 1.0, -torch.inf]], device=impl.device)
    y, q = torch.tensor([0], device=impl.device), torch.tensor([[0.5, 0.0, 0.5, 0.0]], device=impl.device)
    for name in ("ce", "kl", "pma"):
        dlogits, value = torch.empty_like(z), torch.empty(1, device=impl.device)
        LOSSES[name][2](impl, z, y, q, dlogits, value)
        assert dlogits.isfinite().all(), name
        assert value.isfinite().all(), name
        assert dlogits[0, 1] == 0
        assert dlogits[0, 3] == 0


def test_large_logits_do_not_overflow(impl):
    z = torch.tensor([[1e4, -1e4, 9.99e3], [-3e4, 3e4, 0.0]], device=impl.device)
    y = torch.tensor([1, 1], device=impl.device)
    for name in ("ce", "lsce"):
        dlogits, value = torch.empty_like(z), torch.empty(2, device=impl.device)
        LOSSES[name][2](impl, z, y, None, dlogits, value)
        exact, exact_value = eager(LOSSES[name][0], z.double(), y, None)
        torch.testing.assert_close(dlogits.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_labels_and_nan_logits_stay_in_their_rows(impl, name):
    """Both make gradient and loss NaN, and touch nothing else. Targets are (y + 1) % K here, valid for y = -1."""
    z, y = torch.randn(6, 10, device=impl.device), torch.tensor([1, 2, 3, 4, 5, 6], device=impl.device)
    q = torch.full((6, 10), 0.1, device=impl.device)
    bad_z, bad_y = z.clone(), y.clone()
    bad_z[3, 4], bad_y[1], bad_y[4] = torch.nan, -1, 10
    dlogits, bad_dlogits = torch.empty_like(z), torch.empty_like(z)
    value, bad_value = z.new_empty(6), z.new_empty(6)
    LOSSES[name][2](impl, z, y, q, dlogits, value)
    LOSSES[name][2](impl, bad_z, bad_y, q, bad_dlogits, bad_value)
    good = [0, 2, 5] if name != "kl" else [0, 1, 2, 4, 5]  # which has no labels
    bad = [i for i in range(6) if i not in good]
    assert bad_dlogits[bad].isnan().all()
    assert bad_value[bad].isnan().all()
    assert torch.equal(bad_dlogits[good], dlogits[good])
    assert torch.equal(bad_value[good], value[good])
