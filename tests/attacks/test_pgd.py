"""The attacks: equal to their definition written out in eager PyTorch, inside ball and box, and true to their settings."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spat_kernels as sk
from spat_kernels import PGD, losses
from tests.helpers import EPS, Recorder, accuracy, batch, cnn, distance, margin


def eager_pgd(model, x, start, loss, eps, step_size, steps):
    """Eq. 2.7 as everybody writes it. `loss` maps logits to a scalar."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(loss(model(x_adv)), x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def custom(z, y):
    return z.square().sum(1) - z.gather(1, y[:, None])[:, 0]


ALPHA = 0.3
# Our attack of `model, x, y`, given eps and start; and its loss, of the logits z, the clean ones and y.
EAGER = {
    "ls": (
        lambda *task, **how: sk.pgd_ls(*task, alpha=ALPHA, **how),
        lambda z, clean, y: F.cross_entropy(z, y, label_smoothing=ALPHA * 10 / 9),
    ),
    "ce": (sk.pgd, lambda z, clean, y: F.cross_entropy(z, y)),
    "kl": (sk.pgd_kl, lambda z, clean, y: F.kl_div(z.log_softmax(1), clean.softmax(1), reduction="sum")),
    "margin": (
        lambda *task, **how: sk.cw_linf(*task, steps=10, kappa=0.5, **how),
        lambda z, clean, y: margin(z, y).clamp(max=0.5).sum(),
    ),
    "custom": (lambda *task, **how: sk.pgd(*task, loss=custom, **how), lambda z, clean, y: custom(z, y).sum()),
    "targeted": (lambda *task, **how: sk.pgd(*task, targeted=True, **how), lambda z, clean, y: -F.cross_entropy(z, y)),
}


@pytest.mark.parametrize("name", EAGER)
def test_equals_the_eager_loop(name):
    """fp64, where no sign is in doubt: the same images to the last bit of the step (one rounding)."""
    model, (x, y) = cnn().double().eval(), batch()
    x = x.double()
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    attack, loss = EAGER[name]
    ours, clean = attack(model, x, y, eps=EPS, start=start), model(x).detach()
    expected = eager_pgd(model, x, start, lambda z: loss(z, clean, y), EPS, EPS / 4, 10)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-15)
    assert not torch.equal(ours, start)
    if name == "ce":
        expected = eager_pgd(model, x, x, lambda z: loss(z, clean, y), EPS, EPS, 1)
        torch.testing.assert_close(sk.fgsm(model, x, y, EPS), expected, rtol=0, atol=1e-15)
        assert torch.equal(sk.fgsm(model, x, y, EPS, step_size=0.0), x)


def test_targeted_dlr_pulls_away_from_the_runner_up_what_is_at_its_target():
    """Label and target must not be one class there, or the gradient is zero."""
    model, (x, _) = cnn(size=16).eval(), batch(64, size=16)
    target, runner_up = model(x).topk(2, dim=1).indices.T
    gap = lambda z: z.gather(1, target[:, None]) - z.gather(1, runner_up[:, None])  # noqa: E731
    x_adv = sk.pgd(model, x, target, EPS, loss="dlr", targeted=True, random_start=False)
    assert (gap(model(x_adv)) > gap(model(x))).float().mean() > 0.95


def test_default_step_size():
    model, (x, y) = cnn().eval(), batch()
    start = x.clone()
    one_step = sk.pgd(model, x, y, EPS, steps=1, start=start)
    torch.testing.assert_close(one_step, sk.pgd(model, x, y, EPS, steps=1, step_size=EPS / 4, start=start), rtol=0, atol=0)
    for norm in ("l2", "l1"):
        found = [sk.pgd(model, x, y, 1.0, steps=5, step_size=s, norm=norm, start=start) for s in (None, 0.5)]
        torch.testing.assert_close(*found, rtol=0, atol=0)


def test_degenerate_settings_mean_what_they_say():
    model, (x, y) = cnn().eval(), batch()
    for norm in ("linf", "l2", "l1"):
        assert torch.equal(sk.pgd(model, x, y, 0.0, norm=norm), x), "eps=0"
        state = torch.get_rng_state()
        same = sk.pgd(model, x, y, EPS, steps=0, random_start=False, norm=norm)
        assert torch.equal(torch.get_rng_state(), state), "without a random start nothing is drawn"
        assert torch.equal(same, x), "steps=0"
        assert same.data_ptr() != x.data_ptr()
        start = sk.pgd(model, x, y, EPS, steps=0, norm=norm)
        assert not torch.equal(start, x), "steps=0 returns the random start"
        far = sk.pgd(model, x, y, EPS, steps=0, start=x + 1, norm=norm)
        assert distance(far, x, norm).max() <= EPS + 1e-6, "steps=0 still projects a given start"


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_radius_and_step_per_sample(norm):
    """A sample is attacked as it is alone. fp64, since a convolution's rounding depends on the batch size."""
    model, (x, y) = cnn().double().eval(), batch(4)
    x, eps = x.double(), torch.tensor([0.0, 0.01, 0.02, 0.04])
    together = PGD(eps, norm=norm, random_start=False)(model, x, y)
    for i, e in enumerate(eps.tolist()):
        alone = PGD(e, norm=norm, random_start=False)(model, x[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)
    steps = PGD(0.1, norm=norm, steps=1, step_size=eps, random_start=False)(model, x.clamp(0.2, 0.8), y) - x.clamp(0.2, 0.8)
    torch.testing.assert_close(distance(steps, torch.zeros(()), norm), eps.double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("select", ["success", "loss"])
@pytest.mark.parametrize(
    "loss",
    ["ce", "kl", "margin", "dlr", "pma", losses.LabelSmoothedCE(0.2), lambda z, y: F.cross_entropy(z, y, reduction="none")],
)
def test_restarts_keep_the_best_of_the_same_runs(loss, select):
    model, (x, y) = cnn().eval(), batch(32)
    generator = torch.Generator().manual_seed(3)
    runs = [PGD(EPS, loss=loss, steps=2, generator=generator)(model, x, y) for _ in range(4)]
    best = PGD(EPS, loss=loss, steps=2, restarts=4, select=select, generator=generator.manual_seed(3))(model, x, y)
    objective = losses.as_loss(loss)

    def judged(model, x, images):
        reference = objective.reference(y, model(x).detach() if objective.needs_clean_logits else None, False)
        logits, value = model(images).detach(), torch.empty(len(x), dtype=x.dtype)
        objective.gradient(logits, reference, torch.empty_like(logits), value, targeted=False, scale=1.0)
        return value.double(), logits.argmax(1) != y

    values, successes = map(torch.stack, zip(*(judged(model, x, run) for run in runs), strict=True))
    double = copy.deepcopy(model).double()
    *exact, best_value = (judged(double, x.double(), images.double())[0] for images in [*runs, best])
    exact = torch.stack(exact)
    # The attack compares values of its own path, each with at most twice eager's error.
    rounding = 4 * (values - exact).abs().max()
    if select == "success":
        assert torch.equal(judged(model, x, best)[1], successes.any(0))
        exact = torch.where(successes | ~successes.any(0), exact, -torch.inf)
    assert (best_value >= exact.amax(0) - rounding).all()
    assert all(any(torch.equal(b, r[i]) for r in runs) for i, b in enumerate(best)), "each image is one of the runs'"


def test_costs_no_more_forwards_than_steps():
    x, y = batch()
    for kwargs, forwards in [({}, 10), ({"loss": "kl"}, 11), ({"steps": 0}, 0), ({"restarts": 3, "steps": 2}, 9)]:
        model = Recorder(cnn())
        sk.pgd(model, x, y, EPS, **kwargs)
        assert len(model.inputs) == forwards, kwargs


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_model_sees_the_layout_of_the_images(norm, layout):
    model, (x, y) = Recorder(cnn()), batch()
    x = x.contiguous(memory_format=layout)
    sk.pgd(model, x, y, EPS, norm=norm)
    assert {s for _, s, _ in model.inputs} == {x.stride()}, "no copies on the way"


# ---- losses whose gradient ends at the boundary


def breakable(n: int = 300):
    """A network, images and their classes by it: about half can be broken within 0.05 (L-infinity), 0.4 (L2) or 2 (L1)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    x = torch.rand(n, 1, 8, 8)
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("input_gradient", ["auto", "autograd"])
@pytest.mark.parametrize("norm, eps", [("linf", 0.05), ("l2", 0.4), ("l1", 2.0)])
def test_a_broken_image_stays_broken_where_its_gradient_is_zero(norm, eps, input_gradient):
    """The margin with kappa = 0 is flat beyond the boundary: more steps must not walk back, with any number of restarts."""
    model, x, y = breakable()
    how = {"norm": norm, "input_gradient": input_gradient}

    def left(attack) -> float:
        torch.manual_seed(1)
        return accuracy(model, attack(model, x, y), y)

    few = left(PGD(eps, loss="margin", steps=5, **how))
    for steps in (20, 100):
        beyond = left(PGD(eps, loss=losses.Margin(1.0), steps=steps, **how))
        assert left(PGD(eps, loss="margin", steps=steps, **how)) <= min(beyond + 0.02, few)
    assert 0.1 < beyond < 0.9, "some of both"
    for attack in (
        PGD(eps, loss="margin", steps=20, restarts=3, **how),
        PGD(eps, loss=lambda z, y: margin(z, y).clamp(max=0), steps=20, **how),
        lambda *a: sk.cw_linf(*a, eps, kappa=0, **how),
        sk.APGD(eps, loss="margin", steps=20, **how),
    ):
        assert left(attack) <= few


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_is_wrong_already_is_left_alone_by_a_flat_loss(norm):
    model, x, y = breakable(20)
    assert torch.equal(sk.fgsm(model, x, (y + 1) % 4, 0.4, norm=norm, loss="margin"), x)
    assert not torch.equal(sk.fgsm(model, x, y, 0.4, norm=norm, loss="margin"), x)


# ---- launched


@pytest.mark.parametrize("settings", [{}, {"norm": "l2"}, {"loss": "kl"}, {"restarts": 2}, {"input_gradient": "autograd"}])
def test_a_launched_attack_is_the_same(settings):
    model, (x, y) = cnn(), batch()
    images = []
    for attack in (sk.PGD(EPS, **settings), sk.PGD(EPS, **settings).launch):
        torch.manual_seed(1)
        images.append(attack(model, x, y))
    expected, (found, nan_seen) = images
    assert torch.equal(found, expected)
    assert nan_seen.tolist() == [0] * len(x)


def test_a_launched_attack_tells_of_unusable_gradients_and_does_not_warn():
    x, y = batch()
    model = lambda x: x.flatten(1)[:, :10] * torch.where(torch.arange(len(x)) == 2, torch.nan, 1.0)[:, None]  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, nan_seen = sk.PGD(EPS).launch(model, x, y)
    assert nan_seen.tolist() == [0, 0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="y must have shape"):
        sk.PGD(EPS).launch(model, x, y[:2])
    x_adv, nan_seen = sk.PGD(EPS).launch(model, x[:0], y[:0])
    assert x_adv.shape == x[:0].shape
    assert nan_seen.shape == (0,)


def test_names_of_other_libraries():
    """An argument that is not known is an error of the function that was called, with the name that it has here."""
    model, x, y = nn.Flatten(), torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    for call, message in (
        (lambda: sk.pgd(model, x, y, EPS, alpha=2 / 255), r"pgd\(\) got an unexpected keyword argument 'alpha': use step_size"),
        (lambda: sk.pgd_kl(model, x, None, EPS, x_init=x), r"pgd_kl\(\) .*'x_init': use start"),
        (lambda: sk.fgsm(model, x, y, EPS, precison="bf16"), r"fgsm\(\) .*'precison': use precision"),
        (lambda: sk.cw_linf(model, x, y, EPS, zzz=1), r"cw_linf\(\) .*'zzz': see help\(spat_kernels.cw_linf\)"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.warns(RuntimeWarning, match="alpha=0.00784314 is a label smoothing.*step_size"):
        sk.pgd_ls(model, x, y, EPS, alpha=2 / 255)
    with pytest.warns(RuntimeWarning, match="step_size=2 exceeds the width"):
        sk.pgd(model, x, y, EPS, step_size=2)


@pytest.mark.parametrize(("bn_mode", "running"), [("train", True), ("keep", True), ("eval", False)])
@pytest.mark.parametrize("loss", ["ce", "pma"])
def test_batch_statistics_mix_gradients_of_their_true_lengths(loss, bn_mode, running):
    """Samples that the model is sure of, and others: a factor of a sample's own would change the signs of all."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(6, track_running_stats=running)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Softplus(), nn.Flatten(), nn.Linear(6 * 36, 10)).double()
    model[-1].weight.data *= 20
    x, y = torch.rand(12, 3, 8, 8).double(), torch.randint(10, (12,))

    def value(z):
        p = z.softmax(1)
        return F.cross_entropy(z, y) if loss == "ce" else margin(p, y).sum()

    ours = sk.pgd(model, x, y, EPS, loss=loss, steps=1, start=x, bn_mode=bn_mode)
    expected = eager_pgd(copy.deepcopy(model), x, x, value, EPS, EPS / 4, 1)
    assert (ours != expected).double().mean() < 0.002  # gradients that all but cancel


def test_dropout_in_train_mode_leaves_confident_samples_their_gradient():
    """It mixes no samples, so the factor 1 - p_y, which is 0 in fp32 here, may be left out."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Dropout(), nn.Linear(64, 10)).eval()
    model[2].train()
    model[3].bias.data[3] += 200.0
    x, y = batch(4)[0], torch.full((4,), 3)
    assert (sk.pgd(model, x, y, EPS, steps=1, start=x, bn_mode="keep") != x).flatten(1).any(1).all()
