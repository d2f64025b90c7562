"""Models that could fool an attack into calling them robust: the attack is not fooled, raises, or says so."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import spat_kernels as sk
from spat_kernels import APGD, FAB, PGD, AutoAttack, Square, signs
from spat_kernels.predictions import model_logits, other_classes, predictions

EPS = 0.1
GRADIENT_ATTACKS = {
    "pgd": PGD(EPS),
    "pgd-l2": PGD(0.5, norm="l2"),
    "restarts": PGD(EPS, restarts=2),
    "apgd": APGD(EPS, steps=5),
    "apgd-t": APGD(EPS, steps=5, loss="dlr", targets=3),
    "fab": FAB(EPS, steps=5, targets=None),
    "fab-t": FAB(EPS, steps=5),
    "autoattack": AutoAttack(EPS, version=("square", "apgd-ce"), steps=5, queries=5),
}
gradient_attacks = pytest.mark.parametrize("attack", GRADIENT_ATTACKS.values(), ids=GRADIENT_ATTACKS)


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


def linear(pixels: int = 48, classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).eval()


def attackable(net, n: int = 16, shape=(3, 4, 4)):
    x = torch.rand(n, *shape)
    return x, net(x).argmax(1)


def accuracy(model, x, y) -> float:
    return (predictions(model(x)) == y).float().mean().item()


# ---- a gradient that is not there


def cut_off(kind: str, net):
    """A callable whose logits need a gradient, that of its parameters, but not through x."""

    class Module(Around):
        def forward(self, x):
            return self.net(x.detach()) + self.net[1].bias

    class Unregistered(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                x = x * 1.0
            return net(x)

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, grad):
            return None

    return {
        "detach": lambda x: net(x.detach()),
        "numpy": lambda x: net(torch.from_numpy(x.detach().numpy())),
        "8 bits": lambda x: net((x * 255).round().to(torch.uint8).float() / 255),
        "function": lambda x: net(NoGradient.apply(x)),
        "module": Module(net).eval(),
        "unregistered": Unregistered().eval(),
        "constant": lambda x: net[1].bias.expand(len(x), -1),
    }[kind]


@gradient_attacks
@pytest.mark.parametrize("kind", ["detach", "numpy", "8 bits", "function", "module", "unregistered", "constant"])
def test_logits_cut_off_from_the_images_are_an_error(kind, attack):
    net = linear()
    x, y = attackable(net)
    model = cut_off(kind, net)
    with pytest.raises(ValueError, match="do not depend on x"):
        attack(model, x, predictions(model(x)))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_quantised_layers_are_an_error():
    class Int8(torch.autograd.Function):
        """As torch.ao's dynamically quantised layers: no backward."""

        @staticmethod
        def forward(context, x, weight):
            context.mark_non_differentiable(out := F.linear(x, weight).round())
            return out

        @staticmethod
        def backward(context, grad):
            raise AssertionError("never called")

    head, scale = torch.randn(10, 48), nn.Parameter(torch.ones(10))
    x = torch.rand(4, 3, 4, 4)
    with pytest.raises(ValueError, match="do not depend on x"):
        sk.pgd(lambda x: Int8.apply(x.flatten(1), head) * scale, x, torch.zeros(4, dtype=torch.int64), EPS)


def test_attacks_without_gradients_run_all_the_same():
    net = linear()
    x, y = attackable(net)
    x_adv = Square(EPS, queries=200, generator=torch.Generator().manual_seed(0))(cut_off("8 bits", net), x, y)
    assert accuracy(net, x_adv, y) < 0.7
    alone = AutoAttack(EPS, version=("square",), queries=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not alone.run(cut_off("detach", net), x, y).robust.all()
        assert torch.equal(sk.pgd(cut_off("detach", net), x, y, EPS, steps=0, random_start=False), x)


@gradient_attacks
def test_a_gradient_that_is_zero_by_arithmetic_is_one(attack):
    class Flat(Around):
        def forward(self, x):
            return self.net(x.round())

    model = Flat(linear())
    x, _ = attackable(model)
    y = model(x).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AutoAttack's, which are tested below
        x_adv = attack(model, x, y)
    assert x_adv.shape == x.shape and x_adv.isfinite().all()


@pytest.mark.parametrize("registered", [True, False])
def test_reentrant_checkpoints(registered):
    net = linear()
    x, y = attackable(net)

    class Detached(Around):
        def forward(self, x):
            return checkpoint(self.net, x.detach().requires_grad_(), use_reentrant=True)

    if registered:
        with pytest.raises(ValueError, match="do not depend on x"):
            sk.pgd(Detached(net), x, y, EPS)
    else:  # whose backward would write .grad
        with pytest.raises(ValueError, match="re-entrant checkpoints.*use_reentrant=False"):
            sk.pgd(lambda x: checkpoint(net, x, use_reentrant=True), x, y, EPS)
    assert all(p.grad is None for p in net.parameters())


def test_losses_cut_off_from_the_logits_are_an_error():
    x, y = attackable(linear())
    weight = torch.ones(10, requires_grad=True)
    for loss in (lambda z, y: z.detach().sum(1), lambda z, y: (z.detach() * weight).sum(1)):
        with pytest.raises(ValueError, match="does not depend on the logits by differentiable operations"):
            sk.pgd(linear(), x, y, EPS, loss=loss)


def test_a_loss_that_writes_on_the_logits_does_not_change_predictions():
    def writes(z, y):
        loss = F.cross_entropy(z.clone(), y, reduction="none")
        z.data.zero_()
        return loss

    net = linear()
    x, y = attackable(net)
    found = []
    for loss in (writes, lambda z, y: F.cross_entropy(z, y, reduction="none")):
        torch.manual_seed(1)
        found.append(sk.APGD(EPS, loss=loss, steps=10)(net, x, y))
    assert torch.equal(*found)


@pytest.mark.parametrize("x_dtype, model_dtype", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("layer", [nn.Linear(48, 10), nn.Sequential(nn.Conv2d(3, 10, 4), nn.Flatten())])
def test_images_in_another_dtype_than_the_models(layer, x_dtype, model_dtype):
    model = (layer if isinstance(layer, nn.Sequential) else nn.Sequential(nn.Flatten(), layer)).to(model_dtype)
    x, y = torch.rand(4, 3, 4, 4, dtype=x_dtype), torch.zeros(4, dtype=torch.int64)
    state = torch.get_rng_state()
    for attack in (PGD(EPS), APGD(EPS), FAB(EPS), Square(EPS), AutoAttack(EPS)):
        with pytest.raises(
            ValueError, match=rf"x must be {model_dtype} like the model, got {x_dtype}: use x.to\({model_dtype}\)"
        ):
            attack(model, x, y)
    assert torch.equal(torch.get_rng_state(), state)

    class Casts(Around):
        def forward(self, x):
            return self.net(x.to(model_dtype))

    assert PGD(EPS)(Casts(model), x, y).dtype == x_dtype


class Recurrent(nn.Module):
    """Rows of the image, one after the other."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.lstm(x.transpose(1, 2).flatten(2))[0][:, -1])


@pytest.mark.gpu
def test_recurrent_layers_on_cudnn_are_told_a_way():
    model, x, y = Recurrent().cuda().eval(), torch.rand(4, 3, 4, 4).cuda(), torch.zeros(4, dtype=torch.int64).cuda()
    with pytest.raises(ValueError, match="recurrent layers in eval mode.*cudnn.flags.*bn_mode='train'"):
        sk.pgd(model, x, y, EPS)
    with torch.backends.cudnn.flags(enabled=False):
        one = sk.pgd(model, x, y, EPS, random_start=False)
    other = sk.pgd(model, x, y, EPS, random_start=False, bn_mode="train")
    assert (one != x).any() and torch.allclose(one, other, atol=1e-5)


def test_recurrent_layers_on_the_cpu():
    model, x, y = Recurrent().eval(), torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64)
    assert (sk.pgd(model, x, y, EPS) != x).any()

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, grad):
            raise RuntimeError("cudnn RNN backward can only be called in training mode")

    with pytest.raises(ValueError, match="recurrent layers in eval mode"):
        sk.pgd(lambda x: model(Refuses.apply(x)), x, y, EPS)


# ---- models that write on what they are given


def writing(how: str, net):
    class Writes(Around):
        def forward(self, x):
            if how == "data":
                x.data.mul_(0.8)
            elif how == "numpy":
                x.detach().numpy()[...] *= 0.8
            else:
                with torch.no_grad():
                    x.mul_(0.8)
            return self.net(x)

    class Reads(Around):
        def forward(self, x):
            return self.net(x * 0.8)

    return Writes(net).eval(), Reads(net).eval()


@pytest.mark.filterwarnings("ignore:model changes its input in place where autograd does not see it")
@pytest.mark.parametrize("how", ["data", "numpy", "no_grad"])
@gradient_attacks
def test_models_that_write_on_their_input_write_on_a_copy(how, attack):
    """By the sign of the gradient they are attacked as the model that does the same without writing."""
    torch.manual_seed(0)
    writes, reads = writing(how, linear(192))
    x, y = attackable(reads, 60, (3, 8, 8))
    before, found = x.clone(), []
    for model in (writes, reads):
        torch.manual_seed(1)
        found.append(attack(model, x, y))
    assert torch.equal(x, before)
    for x_adv in found:
        moved = (x_adv - x).flatten(1)
        norm = moved.norm(dim=1) if getattr(attack, "norm", "") == "l2" else moved.abs().amax(1)
        assert norm.max() <= (0.5 if getattr(attack, "norm", "") == "l2" else EPS) + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1
    if not isinstance(attack, FAB):  # which goes by the length of the gradient too
        assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("how", ["data", "numpy", "no_grad"])
def test_writing_where_autograd_does_not_see_it_is_said(how):
    writes, reads = writing(how, linear())
    x, y = attackable(reads)
    for attack in (PGD(EPS, input_gradient="autograd"), FAB(EPS, steps=2)):
        with pytest.warns(RuntimeWarning, match="changes its input in place where autograd does not see it"):
            attack(writes, x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attack(reads, x, y)


def test_predictions_leave_the_images_alone():
    writes, reads = writing("no_grad", linear())
    x, _ = attackable(reads)
    before = x.clone()
    assert torch.equal(model_logits(writes, x), model_logits(reads, x)) and torch.equal(x, before)


# ---- what is no prediction, and what is no class


def test_a_nan_is_no_prediction():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan, nan, nan], [1, nan, 2], [nan, 1, 2], [1, 3, 2], [-inf, -inf, 0], [1, inf, 2], [2, 2, 1]])
    assert predictions(logits).tolist() == [-1, -1, -1, 1, 2, 1, 0]
    assert predictions(logits.half()).tolist() == [-1, -1, -1, 1, 2, 1, 0]


class Overflows(Around):
    """NaN away from grey, and class 0 there."""

    def forward(self, x):
        far = ((x - 0.5).abs().flatten(1).amax(1) > 0.01)[:, None]
        return (self.net(x) + 50 * F.one_hot(torch.tensor(0), 4)).masked_fill(far, torch.nan)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "attack",
    [
        PGD(EPS), PGD(EPS, restarts=3), APGD(EPS, steps=3), APGD(EPS, steps=3, restarts=2), AutoAttack(EPS, steps=3),
        APGD(EPS, steps=3, targets=2, eot=2), Square(EPS, queries=20), Square(1.0, norm="l2", queries=20),
        AutoAttack(EPS, version=("square",), queries=20),
    ],
    ids=lambda attack: f"{type(attack).__name__}-{getattr(attack, 'restarts', 1)}-{attack.norm}",
)  # fmt: skip
def test_images_with_nan_logits_are_not_robust(attack):
    model, x, y = Overflows(linear(192, 4)).eval(), torch.full((6, 3, 8, 8), 0.5), torch.zeros(6, dtype=torch.int64)
    assert (predictions(model(attack(model, x, y))) == -1).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_images_whose_logits_are_nan_as_they_are_count_as_misclassified():
    model, x, y = Overflows(linear(192, 4)).eval(), torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.int64)
    assert (AutoAttack(EPS, steps=3, queries=5).run(model, x, y).broken_by == 0).all()
    for attack in (APGD(EPS, steps=3), FAB(EPS, steps=3), Square(EPS, queries=5)):
        assert torch.equal(attack(model, x, y), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_classes_are_never_the_label(dtype):
    inf = torch.inf
    logits = torch.tensor([[1, -inf, 2, -inf], [-inf, -inf, 1, -inf], [inf, 1, inf, 0], [0, 0, 0, 0]], dtype=dtype)
    for label in range(4):
        y = torch.full((4,), label)
        others, possible = other_classes(logits, y)
        assert torch.equal(torch.cat((others, y[:, None]), 1).sort(1).values, torch.arange(4).expand(4, 4))
        values = logits.gather(1, others)
        assert (values[:, :-1] >= values[:, 1:]).all() and torch.equal(possible, values > -inf)


class Masked(Around):
    """Of 10 classes 5 are ruled out, as in subsets of ImageNet."""

    def forward(self, x):
        return self.net(x).masked_fill(torch.arange(10) >= 5, -torch.inf)


class Subset(Around):
    def forward(self, x):
        return self.net(x)[:, :5]


@pytest.mark.parametrize(
    "attack",
    [
        FAB(EPS, steps=10, targets=None), FAB(EPS, steps=10, targets=4), FAB(0.5, steps=10, targets=None, norm="l2"),
        APGD(EPS, steps=10, targets=4), APGD(EPS, steps=10, loss="dlr", targets=4), APGD(EPS, steps=10),
        PGD(EPS, restarts=2, loss="margin"), PGD(EPS, loss="kl"),
    ],
    ids=lambda attack: f"{type(attack).__name__}-{type(getattr(attack, 'loss', None)).__name__}-{attack.norm}",
)  # fmt: skip
def test_classes_that_are_ruled_out_change_nothing(attack):
    """Neither what is found, nor what is said."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    x = torch.rand(40, 1, 8, 8, dtype=torch.float64)
    y, found = Subset(net)(x).argmax(1), []
    for model in (Subset(net).eval(), Masked(net).eval()):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(attack(model, x, y))
    assert torch.equal(found[0], found[1]) and accuracy(Subset(net), found[0], y) < 0.9


def test_more_targets_than_classes_that_are_possible():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    x = torch.rand(40, 1, 8, 8)
    y = Subset(net)(x).argmax(1)
    for kind in (FAB, APGD):
        left = []
        for targets, model in ((4, Subset(net).eval()), (9, Masked(net).eval())):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                left.append(accuracy(Subset(net), kind(EPS, steps=10, targets=targets)(model, x, y), y))
        assert abs(left[0] - left[1]) < 0.1 and max(left) < 0.9


# ---- what AutoAttack says


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


def said(model, version="standard", eps=0.05) -> list[str]:
    net = getattr(model, "net", model)
    x, y = attackable(net, 60, (3, 8, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoAttack(eps, version=version, steps=5, queries=100).run(model.eval(), x, y)
    assert all(w.category is RuntimeWarning and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_autoattack_says_what_its_authors_say():
    net = linear(192)
    assert said(net) == [] and said(Noisy(net), "rand") == []
    (random,) = said(Noisy(net), ("apgd-ce",))
    assert "seems to draw random numbers" in random and "version='rand'" in random
    (determined,) = said(net, "rand")
    assert "draws no random numbers: version='standard'" in determined
    assert any("probabilities" in text for text in said(Softmax(net), ("apgd-ce",)))
    zero, beaten = said(Masking(net), ("apgd-ce", "square"))
    assert "the gradient of the margin is 0 or NaN at 60 of the first 60 images" in zero
    assert beaten.startswith("Square, which needs no gradients, broke") and "of 60 images" in beaten
    assert said(Masking(net), ("square",)) == []
    assert any("are NaN" in text for text in said(Overflows(linear(192, 4)), ("apgd-ce",)))


def test_the_check_for_randomness_draws_nothing_of_the_callers():
    x, y = attackable(linear(192), 8, (3, 8, 8))
    found = []
    for difference in (signs.difference, lambda *logits: (0.0, 1.0)):
        torch.manual_seed(3)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(signs, "difference", difference)
            AutoAttack(EPS, version=("apgd-ce",), steps=2).run(Noisy(linear(192)), x, y)
        found.append(torch.rand(1))
    assert torch.equal(*found)


def test_differences_of_logits():
    a = torch.tensor([[1.0, torch.nan], [torch.inf, -2.0], [-1e9, 0.0]])
    assert signs.difference(a, a.clone()) == (0.0, 0.0)
    b = torch.tensor([[1.0, torch.nan], [torch.inf, -2.5], [-1e9, 0.0]])
    assert signs.difference(a, b) == (0.5, 2 * signs.ROUNDING), "what rules a class out does not count"
    assert signs.difference(a.bfloat16(), b.bfloat16()) == (0.5, 4 * torch.finfo(torch.bfloat16).eps)
    small = torch.tensor([[20.0, 0.1, -3.0]])
    assert signs.difference(small, small + torch.tensor([0.0, 1e-6, 0.0]))[1] == 20 * signs.ROUNDING, "the largest is no mask"
    a = a[:2]
    assert signs.difference(a, torch.tensor([[torch.nan, torch.nan], [torch.inf, -2.0]]))[0] == torch.inf


def test_probabilities():
    logits = torch.randn(5, 7)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert signs.are_probabilities(logits.softmax(1).to(dtype))
        assert not signs.are_probabilities(logits.to(dtype)) and not signs.are_probabilities(logits.sigmoid().to(dtype))


# ---- before a run begins


def test_evaluate_says_so_before_any_work():
    pytest.importorskip("tqdm")
    from spat_train.evaluate import evaluate
    from spat_train.images import InputError

    net = linear(192)
    x, y = attackable(net, 8, (3, 8, 8))

    class Detached(Around):
        def forward(self, x):
            return self.net(x.detach())

    for spec in ("pgd-10", "fgsm", "apgd", "fab-t", "autoattack"):
        with pytest.raises(InputError, match="model: the model's logits do not depend on x"):
            evaluate(Detached(net).eval(), (x, y), f"noise,{spec}", eps=EPS, bar=None)
        evaluate(Detached(net).eval(), (x, y), "noise,square:queries=2", eps=EPS, bar=None)
    with pytest.raises(InputError, match="source: the model's logits do not depend on x"):
        evaluate(net, (x, y), "fgsm", eps=EPS, source=Detached(net).eval(), bar=None)
    evaluate(Detached(net).eval(), (x, y), "fgsm", eps=EPS, source=net, bar=None)


# ---- neighbours


def test_square_goes_on_where_logits_overflow_together():
    """Two logits of +inf are a tie, as predictions have it, and no NaN."""

    class Bright(Around):
        def forward(self, x):
            z = self.net(x)
            return torch.cat((z[:, :2].masked_fill(x.flatten(1).mean(1, keepdim=True) > 0.5, torch.inf), z[:, 2:]), 1)

    torch.manual_seed(0)
    model = Bright(linear(192)).eval()
    x = torch.rand(64, 3, 8, 8)
    y = predictions(model(x))
    x_adv = Square(EPS, queries=100, generator=torch.Generator().manual_seed(0))(model, x, y)
    moved = (x_adv != x).flatten(1).any(1)
    assert moved.any() and torch.equal(moved, predictions(model(x_adv)) != y)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_labels_that_are_ruled_out_are_misclassified_in_silence(loss):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    x, y = torch.rand(8, 1, 8, 8), torch.full((8,), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x_adv = sk.pgd(Masked(net).eval(), x, y, EPS, loss=loss)
    assert x_adv.isfinite().all()


@pytest.mark.parametrize("possible", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "attack", [APGD(0.3, loss="dlr", steps=20), PGD(0.3, loss="dlr"), APGD(0.3, loss="dlr", steps=20, targets=9)]
)
def test_dlr_of_few_possible_classes_is_the_margin(attack, possible):
    class Few(Around):
        def forward(self, x):
            return self.net(x).masked_fill(torch.arange(10) >= possible, -torch.inf)

    torch.manual_seed(0)
    net = linear(192)
    model, x = Few(net).eval(), torch.rand(40, 3, 8, 8)
    y = predictions(model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left = accuracy(model, attack(model, x, y), y)
    assert left == 1 if possible == 1 else left < 0.5


def test_autoattack_looks_at_all_batches_and_at_what_it_attacks():
    net = linear(192, 4)

    class NaNAt(Around):
        def forward(self, x):
            return self.net(x).masked_fill((x[:, 0, 0, 0] > 2)[:, None], torch.nan)

    def said_of(model, x, y, **how):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            AutoAttack(0.05, version=("apgd-ce",), steps=2, bounds=(0, 3), **how).run(model.eval(), x, y)
        return [str(w.message) for w in caught]

    x, y = attackable(net, 6, (3, 8, 8))
    x[4, 0, 0, 0] = 2.5
    for batch_size in (None, 2):
        assert said_of(NaNAt(net), x, y, batch_size=batch_size) == [
            "the logits of 1 of 6 images are NaN, which counts as misclassified"
        ]
    y[:2] = (y[:2] + 1) % 4  # wrong as they are
    (random,) = said_of(Noisy(net), x, y, batch_size=1)
    assert "random numbers" in random

    class FlatAt(Around):
        """Without a gradient at images that are misclassified."""

        def forward(self, x):
            return torch.where((x[:, 0, 0, 0] > 2)[:, None], self.net(x.round()), self.net(x))

    x[:2, 0, 0, 0] = 2.5
    y = predictions(FlatAt(net)(x))
    y[[0, 1, 4]] = (y[[0, 1, 4]] + 1) % 4
    assert said_of(FlatAt(net), x, y) == []


def test_errors_that_have_nothing_to_do_with_the_dtype_stay_what_they_are():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear().to(torch.bfloat16)

        def forward(self, x):
            raise KeyError("unknown block type 'foo'")

    x, y = attackable(linear())
    with pytest.raises(KeyError, match="unknown block type"):
        sk.pgd(Wrapper(), x, y, EPS)


def test_models_exported_for_one_number_of_images():
    x, y = attackable(linear(), 8)
    model = torch.export.export(linear(), (x,)).module()
    assert sk.pgd(model, x, y, EPS, bn_mode="keep").shape == x.shape
    with pytest.raises(ValueError, match="exported for images of another shape than x, or for one number of them"):
        sk.pgd(model, x[:3], y[:3], EPS, bn_mode="keep")


def test_the_remedy_for_one_logit_keeps_its_probability():
    z = torch.randn(5, 1)
    assert torch.allclose((torch.cat([-z, z], 1) / 2).softmax(1)[:, 1:], z.sigmoid())
    for shape, remedy in (((5, 1), r"torch.cat\(\[-z, z\], 1\) / 2"), ((5,), r"torch.stack\(\[-z, z\], 1\) / 2")):
        with pytest.raises(ValueError, match=remedy):
            sk.pgd(lambda x, shape=shape: x.flatten(1).sum(1).view(shape), torch.rand(5, 3, 2, 2), torch.zeros(5).long(), EPS)


@pytest.mark.parametrize("kind", ["numpy of a leaf", "inference_mode"])
def test_other_ways_to_cut_off(kind):
    net = linear()

    def model(x):
        if kind == "numpy of a leaf":
            return net(torch.from_numpy(x.numpy()))
        with torch.inference_mode():
            x = x * 1
        return net(x)

    x, y = attackable(net)
    message = "do not depend on x" if kind == "numpy of a leaf" else "tensors made in torch.inference_mode"
    for attack in (PGD(EPS), APGD(EPS), FAB(EPS, steps=2)):
        with pytest.raises(ValueError, match=message):
            attack(model, x, y)


def test_what_only_reads_in_one_mode_or_method_may_write_in_another():
    class Writes(Around):
        def forward(self, x):
            if self.training:
                x.data.mul_(0.5)
            return self.net(x)

        def dirty(self, x):
            x.data.mul_(0.5)
            return self.net(x)

    x, y = attackable(linear())
    model, said_by = Writes(linear()), []
    for attacked, bn_mode in ((model, "eval"), (model, "train"), (model.forward, "keep"), (model.dirty, "keep"), (model, "eval")):
        model.eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sk.pgd(attacked, x, y, EPS, bn_mode=bn_mode, input_gradient="autograd")
        said_by.append(len(caught))
    assert said_by == [0, 1, 0, 1, 0]


def test_warnings_reach_callers_without_a_name():
    net = linear()
    x, y = attackable(net)
    writes, _ = writing("no_grad", net)
    source = "x_adv = pgd(model, x, y, 0.1, input_gradient='autograd')"
    scope = {"pgd": sk.pgd, "model": writes, "x": x, "y": y}
    with pytest.warns(RuntimeWarning, match="changes its input"):
        exec(source, scope)
    assert scope["x_adv"].shape == x.shape


def test_warnings_name_the_callers_line():
    net = linear()
    x, y = attackable(net)
    writes, _ = writing("no_grad", net)

    class Root(Around):
        def forward(self, x):
            return self.net(x + (x * 0).sqrt())

    attacks = {
        "changes its input": lambda: sk.pgd(writes, x, y, EPS, input_gradient="autograd"),
        "was NaN": lambda: sk.pgd(Root(net), x, y, EPS),
        "draws no random": lambda: AutoAttack(EPS, version="rand", steps=2)(net, x, y),
    }
    for text, attack in attacks.items():
        with pytest.warns(RuntimeWarning, match=text) as caught:
            attack()
        assert {w.filename for w in caught} == {__file__}


def test_writing_what_is_there_already_is_no_change():
    class Clamps(Around):
        def forward(self, x):
            with torch.no_grad():
                x.clamp_(0, 1)
            return self.net(x)

    x, y = attackable(linear())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.pgd(Clamps(linear()), x, y, EPS, input_gradient="autograd")


def test_evaluation_and_attacks_see_one_model():
    """What it holds unregistered is in eval mode for both, and keeps its statistics and its mode."""
    pytest.importorskip("tqdm")
    from spat_train.evaluate import evaluate

    class Held(Around):
        def __init__(self, net):
            super().__init__(net)
            self.held = [nn.BatchNorm2d(3), nn.Dropout(0.9), nn.CrossEntropyLoss()]

        def forward(self, x):
            return self.net(self.held[1](self.held[0](x)))

    model = Held(linear(192)).eval()
    model.held[0].running_mean.fill_(0.3)
    x = torch.rand(20, 3, 8, 8)
    y = predictions(model_logits(model, x))
    ran = evaluate(model, (x, y), "noise,pgd-10", eps=1e-6, bar=None)
    assert ran.accuracy("clean") == ran.accuracy("noise") == ran.accuracy("pgd-10") == 100
    assert (model.held[0].running_mean == 0.3).all() and all(m.training for m in model.held)


def test_targets_of_an_evaluation_are_possible_classes():
    pytest.importorskip("tqdm")
    from spat_train.attacks import parse

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    x, seen = torch.rand(40, 1, 8, 8), set()
    y, which = Subset(net)(x).argmax(1), torch.rand(40)
    for name, runs in (("pgd-10-least-likely", 1), ("pgd-10-random", 1), ("pgd-10-all", 9)):
        attack = parse(name)
        for run in range(runs):
            targets = attack._targets(Masked(net), x, y, which, run)
            assert (targets < 5).all() and (targets != y).all()
            assert torch.equal(targets, attack._targets(Subset(net), x, y, which, run))
            seen |= set(targets.tolist())
    assert seen == set(range(5))
