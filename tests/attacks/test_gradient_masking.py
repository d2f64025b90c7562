"""What AutoAttack warns of: as its authors' code does, and nothing on honest models."""

import warnings

import pytest
import torch

from spat_kernels import AutoAttack
from spat_kernels.attacks import gradient_masking
from spat_kernels.predictions import predictions
from tests.helpers import Around, classified, linear
from tests.test_predictions import Overflows

EPS = 0.1


class ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, grad):
        return torch.zeros_like(grad)


class Masking(Around):
    def forward(self, x):
        return self.net(ZeroGradient.apply(x))


class Noisy(Around):
    def forward(self, x):
        return self.net(x + 0.3 * torch.randn_like(x))


class Softmax(Around):
    def forward(self, x):
        return (5 * self.net(x)).softmax(1)


def said(model, version="standard", x=None, y=None, **how) -> list[str]:
    """The warnings; without images, of 60 that the network inside classifies correctly."""
    if x is None:
        x, y = classified(getattr(model, "net", model), 60, (3, 8, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoAttack(0.05, version=version, **({"steps": 5, "queries": 100} | how)).run(model.eval(), x, y)
    assert all(w.category is RuntimeWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_autoattack_says_what_its_authors_say():
    net = linear(192)
    assert said(net) == []
    assert said(Noisy(net), "rand") == []
    (random,) = said(Noisy(net), ("apgd-ce",))
    assert "seems to draw random numbers" in random
    assert "version='rand'" in random
    (determined,) = said(net, "rand")
    assert "draws no random numbers: version='standard'" in determined
    assert any("probabilities" in text for text in said(Softmax(net), ("apgd-ce",)))
    zero, beaten = said(Masking(net), ("apgd-ce", "square"))
    assert "the gradient of the margin is 0 or NaN at 60 of the first 60 images" in zero
    assert beaten.startswith("Square, which needs no gradients, broke")
    assert "of 60 images" in beaten
    assert said(Masking(net), ("square",)) == []
    assert any("are NaN" in text for text in said(Overflows(linear(192, 4)), ("apgd-ce",)))


def test_exhaustive_breaks_what_gradients_do_not():
    model = Masking(linear(192)).eval()
    x, y = classified(model.net, 20, (3, 8, 8))
    with pytest.warns(RuntimeWarning, match="is 0 or NaN.*without being so: use exhaustive=True"):
        fast, both = (
            AutoAttack(0.05, version="fast", exhaustive=exhaustive, steps=2, queries=100).run(model, x, y)
            for exhaustive in (False, True)
        )
    assert fast.robust.sum() > both.robust.sum()
    assert (both.broken_by == both.names.index("square")).any()


def test_autoattack_looks_at_all_batches_and_at_what_it_attacks():
    net = linear(192, 4)

    class NaNAt(Around):
        def forward(self, x):
            return self.net(x).masked_fill((x[:, 0, 0, 0] > 2)[:, None], torch.nan)

    x, y = classified(net, 6, (3, 8, 8))
    x[4, 0, 0, 0] = 2.5
    how = {"version": ("apgd-ce",), "x": x, "y": y, "steps": 2, "bounds": (0, 3)}
    for batch_size in (None, 2):
        nan = "the logits of 1 of 6 images are NaN, which counts as misclassified"
        assert said(NaNAt(net), batch_size=batch_size, **how) == [nan]
    y[:2] = (y[:2] + 1) % 4  # wrong as they are
    (random,) = said(Noisy(net), batch_size=1, **how)
    assert "random numbers" in random

    class FlatAt(Around):
        """Without a gradient at images that are misclassified."""

        def forward(self, x):
            return torch.where((x[:, 0, 0, 0] > 2)[:, None], self.net(x.round()), self.net(x))

    x[:2, 0, 0, 0] = 2.5
    y.copy_(predictions(FlatAt(net)(x)))
    y[[0, 1, 4]] = (y[[0, 1, 4]] + 1) % 4
    assert said(FlatAt(net), **how) == []


def test_the_check_for_randomness_draws_nothing_of_the_callers():
    x, y = classified(linear(192), 8, (3, 8, 8))
    found = []
    for difference in (gradient_masking.logit_difference, lambda *logits: (0.0, 1.0)):
        torch.manual_seed(3)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(gradient_masking, "logit_difference", difference)
            AutoAttack(EPS, version=("apgd-ce",), steps=2).run(Noisy(linear(192)), x, y)
        found.append(torch.rand(1))
    assert torch.equal(*found)


def test_differences_of_logits():
    difference, rounding = gradient_masking.logit_difference, gradient_masking.ROUNDING
    a = torch.tensor([[1.0, torch.nan], [torch.inf, -2.0], [-1e9, 0.0]])
    assert difference(a, a.clone()) == (0.0, 0.0)
    b = torch.tensor([[1.0, torch.nan], [torch.inf, -2.5], [-1e9, 0.0]])
    assert difference(a, b) == (0.5, 2 * rounding), "what rules a class out does not count"
    assert difference(a.bfloat16(), b.bfloat16()) == (0.5, 4 * torch.finfo(torch.bfloat16).eps)
    small = torch.tensor([[20.0, 0.1, -3.0]])
    assert difference(small, small + torch.tensor([0.0, 1e-6, 0.0]))[1] == 20 * rounding, "the largest is no mask"
    assert difference(a[:2], torch.tensor([[torch.nan, torch.nan], [torch.inf, -2.0]]))[0] == torch.inf


def test_probabilities():
    logits = torch.randn(5, 7)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert gradient_masking.are_probabilities(logits.softmax(1).to(dtype))
        assert not gradient_masking.are_probabilities(logits.to(dtype))
        assert not gradient_masking.are_probabilities(logits.sigmoid().to(dtype))
