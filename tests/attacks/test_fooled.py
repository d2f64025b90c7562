"""Models that could fool an attack into calling them robust: the attack is not fooled, raises, or says so."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import spat_kernels as sk
from spat_kernels import APGD, FAB, PGD, AutoAttack, Square
from spat_kernels.predictions import model_logits, predictions
from tests.helpers import Around, accuracy, assert_inside, classified, linear

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


# ---- a gradient that is not there


def cut_off(kind: str, net):
    """A callable whose logits need a gradient, that of its parameters, but not through x."""

    class Module(Around):
        def forward(self, x):
            return self.net(x.detach()) + self.net[1].bias

    class Unregistered(nn.Module):
        def forward(self, x):
            with torch.inference_mode(kind == "inference_mode"), torch.no_grad():
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
        "numpy of a leaf": lambda x: net(torch.from_numpy(x.numpy())),
        "8 bits": lambda x: net((x * 255).round().to(torch.uint8).float() / 255),
        "function": lambda x: net(NoGradient.apply(x)),
        "module": Module(net).eval(),
        "unregistered": Unregistered().eval(),
        "inference_mode": Unregistered().eval(),
        "constant": lambda x: net[1].bias.expand(len(x), -1),
    }[kind]


@gradient_attacks
@pytest.mark.parametrize("kind", [
    "detach", "numpy", "numpy of a leaf", "8 bits", "function", "module", "unregistered", "inference_mode", "constant",
])  # fmt: skip
def test_logits_cut_off_from_the_images_are_an_error(kind, attack):
    net = linear()
    x, _ = classified(net)
    model = cut_off(kind, net)
    message = "tensors made in torch.inference_mode" if kind == "inference_mode" else "do not depend on x"
    with torch.no_grad():
        y = predictions(model(x))
    with pytest.raises(ValueError, match=message):
        attack(model, x, y)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_attacks_without_gradients_run_all_the_same():
    net = linear()
    x, y = classified(net)
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
    x, _ = classified(model)
    y = model(x).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AutoAttack's, which are tested below
        x_adv = attack(model, x, y)
    assert x_adv.shape == x.shape
    assert x_adv.isfinite().all()


@pytest.mark.parametrize("registered", [True, False])
def test_reentrant_checkpoints(registered):
    net = linear()
    x, y = classified(net)

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
    x, y = classified(linear())
    weight = torch.ones(10, requires_grad=True)
    for loss in (lambda z, y: z.detach().sum(1), lambda z, y: (z.detach() * weight).sum(1)):
        with pytest.raises(ValueError, match="does not depend on the logits by differentiable operations"):
            sk.pgd(linear(), x, y, EPS, loss=loss)


def test_evaluate_says_so_before_any_work():
    pytest.importorskip("tqdm")
    from spat_train.errors import InputError
    from spat_train.evaluation.evaluate import evaluate

    net = linear(192)
    x, y = classified(net, 8, (3, 8, 8))

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
    x, y = classified(reads, 60, (3, 8, 8))
    before, found = x.clone(), []
    for model in (writes, reads):
        torch.manual_seed(1)
        found.append(attack(model, x, y))
    assert torch.equal(x, before)
    for x_adv in found:
        assert_inside(x_adv, x, attack.eps, attack.norm, atol=1e-6)
    if not isinstance(attack, FAB):  # which goes by the length of the gradient too
        assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("how", ["data", "numpy", "no_grad"])
def test_writing_where_autograd_does_not_see_it_is_said(how):
    writes, reads = writing(how, linear())
    x, y = classified(reads)
    for attack in (PGD(EPS, input_gradient="autograd"), FAB(EPS, steps=2)):
        with pytest.warns(RuntimeWarning, match="changes its input in place where autograd does not see it"):
            attack(writes, x, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attack(reads, x, y)


def test_writing_what_is_there_already_is_no_change():
    class Clamps(Around):
        def forward(self, x):
            with torch.no_grad():
                x.clamp_(0, 1)
            return self.net(x)

    x, y = classified(linear())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.pgd(Clamps(linear()), x, y, EPS, input_gradient="autograd")


def test_what_only_reads_in_one_mode_or_method_may_write_in_another():
    class Writes(Around):
        def forward(self, x):
            if self.training:
                x.data.mul_(0.5)
            return self.net(x)

        def dirty(self, x):
            x.data.mul_(0.5)
            return self.net(x)

    x, y = classified(linear())
    model, said_by = Writes(linear()), []
    for attacked, bn_mode in ((model, "eval"), (model, "train"), (model.forward, "keep"), (model.dirty, "keep"), (model, "eval")):
        model.eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sk.pgd(attacked, x, y, EPS, bn_mode=bn_mode, input_gradient="autograd")
        said_by.append(len(caught))
    assert said_by == [0, 1, 0, 1, 0]


def test_predictions_leave_the_images_alone():
    writes, reads = writing("no_grad", linear())
    x, _ = classified(reads)
    before = x.clone()
    assert torch.equal(model_logits(writes, x), model_logits(reads, x))
    assert torch.equal(x, before)


def test_a_loss_that_writes_on_the_logits_does_not_change_predictions():
    def writes(z, y):
        loss = F.cross_entropy(z.clone(), y, reduction="none")
        z.data.zero_()
        return loss

    net = linear()
    x, y = classified(net)
    found = []
    for loss in (writes, lambda z, y: F.cross_entropy(z, y, reduction="none")):
        torch.manual_seed(1)
        found.append(sk.APGD(EPS, loss=loss, steps=10)(net, x, y))
    assert torch.equal(*found)


def test_evaluation_and_attacks_see_one_model():
    """What it holds unregistered is in eval mode for both, and keeps its statistics and its mode."""
    pytest.importorskip("tqdm")
    from spat_train.evaluation.evaluate import evaluate

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
    assert (model.held[0].running_mean == 0.3).all()
    assert all(m.training for m in model.held)


# ---- what PyTorch says, and what it means


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


def test_errors_that_have_nothing_to_do_with_the_dtype_stay_what_they_are():
    class Wrapper(Around):
        def forward(self, x):
            raise KeyError("unknown block type 'foo'")

    x, y = classified(linear())
    with pytest.raises(KeyError, match="unknown block type"):
        sk.pgd(Wrapper(linear().to(torch.bfloat16)), x, y, EPS)


class Recurrent(nn.Module):
    """Rows of the image, one after the other."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.lstm(x.transpose(1, 2).flatten(2))[0][:, -1])


@pytest.mark.gpu
def test_recurrent_layers_on_cudnn_raise_with_a_remedy():
    model, x, y = Recurrent().cuda().eval(), torch.rand(4, 3, 4, 4).cuda(), torch.zeros(4, dtype=torch.int64).cuda()
    with pytest.raises(ValueError, match="recurrent layers in eval mode.*cudnn.flags.*bn_mode='train'"):
        sk.pgd(model, x, y, EPS)
    with torch.backends.cudnn.flags(enabled=False):
        one = sk.pgd(model, x, y, EPS, random_start=False)
    other = sk.pgd(model, x, y, EPS, random_start=False, bn_mode="train")
    assert (one != x).any()
    assert torch.allclose(one, other, atol=1e-5)


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


def test_models_exported_for_one_number_of_images():
    x, y = classified(linear(), 8)
    model = torch.export.export(linear(), (x,)).module()
    assert sk.pgd(model, x, y, EPS, bn_mode="keep").shape == x.shape
    with pytest.raises(ValueError, match="exported for images of another shape than x, or for one number of them"):
        sk.pgd(model, x[:3], y[:3], EPS, bn_mode="keep")


# ---- where warnings are shown


def test_warnings_reach_callers_without_a_name():
    net = linear()
    x, y = classified(net)
    writes, _ = writing("no_grad", net)
    source = "x_adv = pgd(model, x, y, 0.1, input_gradient='autograd')"
    scope = {"pgd": sk.pgd, "model": writes, "x": x, "y": y}
    with pytest.warns(RuntimeWarning, match="changes its input"):
        exec(source, scope)
    assert scope["x_adv"].shape == x.shape


def test_warnings_name_the_callers_line():
    net = linear()
    x, y = classified(net)
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
