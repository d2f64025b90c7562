"""ART's classes on our attacks: the same arguments, the same images, and what cannot be done is an error."""

import gc
import importlib
import inspect
import sys
import weakref
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import spat_kernels as sk
from spat_kernels.attacks import pgd as attacks
from spat_kernels.cuda_graphs.cache import Graphs
from tests.cuda_graphs.fake_graph import FakeGraph
from tests.helpers import assert_same, attackable, batch, cnn, linear, mixed_model, photographs, robust, snapshot

art = pytest.importorskip("art")
evasion = importlib.import_module("art.attacks.evasion")
estimators = importlib.import_module("art.estimators.classification")
preprocessor = importlib.import_module("art.defences.preprocessor.preprocessor")
squeezing = importlib.import_module("art.defences.preprocessor")
ours = importlib.import_module("spat_kernels.compat.art")
model_of = importlib.import_module("spat_kernels.compat.art.classifier").model_of

NAMES = ["FastGradientMethod", "ProjectedGradientDescent", "BasicIterativeMethod", "AutoAttack"]
LINF, L2 = {"eps": 0.02, "eps_step": 0.006}, {"norm": 2, "eps": 0.15, "eps_step": 0.05}


class InDouble(nn.Module):
    """ART's images are fp32. Two gradients in fp64 then differ in the signs of hardly any element."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.double())


def wrap(model, loss=None, shape=(3, 8, 8), classes=10, clip_values=(0, 1), **arguments):
    loss = loss or nn.CrossEntropyLoss()
    return estimators.PyTorchClassifier(model, loss, shape, classes, clip_values=clip_values, device_type="cpu", **arguments)


def case(n=12, **arguments):
    """A classifier that changes its mind for little, images, and its labels."""
    model, x, y = attackable(n)
    return wrap(InDouble(model), **arguments), x.float().numpy(), y.numpy()


def both(name, classifier, x, y=None, mask=None, **arguments):
    """What ART and we make, from the same seed."""
    if name == "ProjectedGradientDescent":
        arguments = {"max_iter": 7, "batch_size": 5, "verbose": False, **arguments}
    found = []
    for library in (evasion, ours):
        np.random.seed(1)  # noqa: NPY002, ART's generator
        found.append(getattr(library, name)(classifier, **arguments).generate(x, y, mask=mask))
    return found


def assert_equal_images(theirs, mine, x):
    assert mine.dtype == theirs.dtype == np.float32
    assert (theirs != x).mean() > 0.01, "the attack moves"
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)


# ---- the same


@pytest.mark.parametrize("name", NAMES)
def test_names_and_defaults(name):
    theirs, mine = getattr(evasion, name), getattr(ours, name)
    given, named = (list(inspect.signature(kind.__init__).parameters.values()) for kind in (theirs, mine))
    assert [(p.name, p.default) for p in named[:-1]] == [(p.name, p.default) for p in given]
    assert named[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert mine.__name__ == name
    assert mine.attack_params == theirs.attack_params
    assert mine._estimator_requirements == theirs._estimator_requirements
    assert issubclass(mine, evasion.FastGradientMethod.__mro__[1])  # EvasionAttack


SETTINGS = {
    "linf": LINF,
    "named inf": {**LINF, "norm": "inf"},
    "targeted": {**LINF, "targeted": True},
    "a random start": {**LINF, "num_random_init": 1},
    "random starts": {**LINF, "num_random_init": 3},
    "random starts, targeted": {**LINF, "num_random_init": 3, "targeted": True},
    "random eps": {**LINF, "random_eps": True},
    "decay": {**LINF, "decay": 0.9},
    "l2": L2,
    "l2 from a random start": {**L2, "num_random_init": 1},
    "l2 at the sides of the box": {"norm": 2, "eps": 3.0, "eps_step": 1.5},
    "linf beyond the box": {"eps": 2.0, "eps_step": 0.1},
    "l2 beyond the box": {"norm": 2, "eps": 50.0, "eps_step": 0.5},
    "l1": {"norm": 1, "eps": 2.0, "eps_step": 0.7},
    "l3": {"norm": 3, "eps": 0.1, "eps_step": 0.03},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_pgd(name):
    classifier, x, y = case()
    y = (y + 1) % 10 if SETTINGS[name].get("targeted") else y
    assert_equal_images(*both("ProjectedGradientDescent", classifier, x, y, **SETTINGS[name]), x)


@pytest.mark.parametrize(("norm", "unit"), [(np.inf, 0.02), (2, 0.15)])
@pytest.mark.parametrize("shape", [(12, 1, 1, 1), (1,), (3, 8, 8), (12, 3, 8, 8)])
def test_eps_as_arrays(shape, norm, unit):
    """Radii of images go to our kernels; those that differ within an image, which ART has for norm inf, do not."""
    classifier, x, y = case()
    constant = norm == 2 and shape[-1] == 8
    eps = unit * (np.ones(shape) if constant else np.linspace(0.5, 1.5, int(np.prod(shape))).reshape(shape))
    assert_equal_images(*both("ProjectedGradientDescent", classifier, x, y, norm=norm, eps=eps, eps_step=eps / 3), x)


def test_random_starts_in_balls_of_their_own():
    classifier, x, _ = case()
    eps = np.linspace(0, 0.04, 12).reshape(12, 1, 1, 1)
    attack = ours.ProjectedGradientDescent(classifier, eps=eps, eps_step=eps + 1e-9, max_iter=1, num_random_init=1, verbose=False)
    assert (np.abs(attack.generate(x) - x) <= eps + 1e-6).all()


@pytest.mark.parametrize("settings", [LINF, L2, {**LINF, "num_random_init": 2}])
@pytest.mark.parametrize("kind", ["bool", "one for all", "fractions"])
def test_masks(settings, kind):
    classifier, x, y = case()
    mask = np.random.default_rng(0).random(x.shape)
    mask = {"bool": mask > 0.5, "one for all": (mask[0] > 0.5).astype(np.float32), "fractions": np.where(mask > 0.5, mask, 0)}[
        kind
    ]
    theirs, mine = both("ProjectedGradientDescent", classifier, x, y, mask, **settings)
    assert_equal_images(theirs, mine, x)
    assert (mine == x)[np.broadcast_to(mask == 0, x.shape)].all()


HIGH = np.array([1, 0.95, 0.9], dtype=np.float32).reshape(3, 1, 1)  # another one for each channel


@pytest.mark.parametrize("clip_values", [None, (-1, 2), (0.1, 0.9), (np.zeros((3, 8, 8)), np.ones((3, 8, 8))), (0 * HIGH, HIGH)])
@pytest.mark.parametrize("settings", [{"eps": 0.4, "eps_step": 0.2}, {"norm": 2, "eps": 3.0, "eps_step": 1.5}])
def test_clip_values(clip_values, settings):
    classifier, x, y = case(clip_values=clip_values)
    x = x.clip(0.1, 0.9)
    theirs, mine = both("ProjectedGradientDescent", classifier, x, y, num_random_init=1, **settings)
    assert_equal_images(theirs, mine, x)
    assert (mine.min() < 0) == (clip_values is None or np.min(clip_values[0]) == -1)


@pytest.mark.parametrize("y", ["none", "one-hot", "column"])
def test_labels(y):
    classifier, x, labels = case()
    given = {"none": None, "one-hot": np.eye(10)[labels], "column": labels[:, None]}[y]
    theirs, mine = both("ProjectedGradientDescent", classifier, x, given, **LINF)
    assert_equal_images(theirs, mine, x)
    attack = ours.ProjectedGradientDescent(classifier, max_iter=7, batch_size=5, verbose=False, **LINF)
    np.testing.assert_array_equal(mine, attack.generate(x.astype(np.float64), labels))


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.3), nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 10).double()),
        nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(ignore_index=3), nn.MultiMarginLoss(margin=5.0), nn.NLLLoss(),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("targeted", [False, True])
def test_losses(loss, targeted):
    model, x, y = attackable(12)
    model = nn.Sequential(model, nn.LogSoftmax(1)) if isinstance(loss, nn.NLLLoss) else model
    classifier = wrap(InDouble(model), loss)
    y = (y + 1) % 10 if targeted else y
    x, y = x.float().numpy(), y.numpy()
    assert_equal_images(*both("ProjectedGradientDescent", classifier, x, y, targeted=targeted, **LINF), x)


class Blur(preprocessor.PreprocessorPyTorch):
    def forward(self, x, y=None):
        return nn.functional.avg_pool2d(x, 3, 1, 1), y


NORMALISED = (np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4]))


@pytest.mark.parametrize("preprocessing", [(0.5, 2.0), NORMALISED, tuple(v.reshape(3, 1, 1) for v in NORMALISED)])
@pytest.mark.parametrize("defences", [None, Blur(device_type="cpu")])
def test_preprocessing(preprocessing, defences):
    classifier, x, _ = case(preprocessing=preprocessing, preprocessing_defences=defences)
    assert_equal_images(*both("ProjectedGradientDescent", classifier, x, **LINF), x)
    if defences is None:
        assert isinstance(model_of(classifier)[0], sk.Normalize)


def test_numbers_for_columns():
    """ART takes as many numbers as an image has columns for those of the columns, even if it has as many channels."""
    model, x, _ = attackable(6)
    classifier = wrap(InDouble(nn.Sequential(nn.Upsample(8), model)), shape=(3, 3, 3), preprocessing=NORMALISED)
    x = x[..., :3, :3].float().numpy()
    assert_equal_images(*both("ProjectedGradientDescent", classifier, x, **LINF), x)


def test_tables():
    model = InDouble(nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double())
    classifier = wrap(model, shape=(5,), classes=3, preprocessing=(0.5, 0.5))
    x = np.random.default_rng(0).random((20, 5), dtype=np.float32)
    for settings in ({"eps": 0.2, "eps_step": 0.1}, {"norm": 2, "eps": 0.2, "eps_step": 0.1}):
        assert_equal_images(*both("ProjectedGradientDescent", classifier, x, **settings), x)


def test_no_steps():
    classifier, x, y = case()
    for image in both("ProjectedGradientDescent", classifier, x, y, max_iter=0, num_random_init=1, **LINF):
        np.testing.assert_array_equal(image, x)


@pytest.mark.parametrize("norm", [np.inf, 1, 2, 5])
@pytest.mark.parametrize("settings", [{}, {"minimal": True}, {"num_random_init": 1}, {"targeted": True}, {"batch_size": 5}])
def test_fgm(norm, settings):
    if norm == 5 and "num_random_init" in settings:
        pytest.skip("ART draws no random points for this norm")
    classifier, x, y = case()
    eps = {np.inf: 0.02, 1: 9.0, 2: 0.5, 5: 0.1}[norm]
    y = (y + 1) % 10 if settings.get("targeted") else y
    theirs, mine = both("FastGradientMethod", classifier, x, y, norm=norm, eps=eps, eps_step=eps / 5, **settings)
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6)
    assert (mine != x).any()


def test_fgm_with_a_mask():
    classifier, x, y = case()
    mask = np.random.default_rng(0).random(x.shape) > 0.5
    assert_equal_images(*both("FastGradientMethod", classifier, x, y, mask, eps=0.02, num_random_init=1), x)


def test_basic_iterative_method():
    classifier, x, y = case()
    theirs, mine = both("BasicIterativeMethod", classifier, x, y, max_iter=5, verbose=False, **LINF)
    assert_equal_images(theirs, mine, x)
    assert ours.ProjectedGradientDescentPyTorch is ours.ProjectedGradientDescent


def test_set_params():
    classifier, x, y = case()
    attack = ours.ProjectedGradientDescent(classifier, verbose=False)
    attack.set_params(max_iter=7, norm=2, eps=0.15, eps_step=0.05)
    np.testing.assert_array_equal(
        attack.generate(x, y), both("ProjectedGradientDescent", classifier, x, y, batch_size=32, **L2)[1]
    )
    with pytest.raises(ValueError, match="alpha"):
        attack.set_params(alpha=1)


SCRIPT = """
import numpy as np
from torch import nn
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier

classifier = PyTorchClassifier(
    model, loss=nn.CrossEntropyLoss(), input_shape=(3, 32, 32), nb_classes=10, clip_values=(0, 1), device_type="cpu"
)
attack = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=4, batch_size=20, verbose=False)
x_adv = attack.generate(x, y)
clean, robust = (float(np.mean(classifier.predict(images).argmax(1) == y)) for images in (x, x_adv))
"""


def test_a_script_with_another_import():
    x, y = (t[:40].numpy() for t in photographs())
    theirs, mine = ({"model": robust("madry"), "x": x, "y": y} for _ in range(2))
    exec(SCRIPT, theirs)
    exec(SCRIPT.replace("from art.attacks.evasion", "from spat_kernels.compat.art"), mine)
    assert type(mine["attack"]) is ours.ProjectedGradientDescent is not type(theirs["attack"])
    assert mine["robust"] == pytest.approx(theirs["robust"], abs=0.003)
    assert mine["clean"] == theirs["clean"] > mine["robust"] + 0.02
    assert (np.abs(mine["x_adv"] - theirs["x_adv"]) < 1e-6).mean() > 0.999


# ---- AutoAttack


def test_autoattack():
    classifier, x, y = case()
    y[:3] = (y[:3] + 1) % 10
    attack = ours.AutoAttack(classifier, eps=0.01, steps=5, queries=20)
    x_adv = attack.generate(x, np.eye(10)[y])
    result = sk.AutoAttack(0.01, steps=5, queries=20, batch_size=32).run(
        classifier.model, torch.tensor(x[3:]), torch.tensor(y[3:])
    )
    np.testing.assert_array_equal(x_adv[3:], result.x_adv)
    np.testing.assert_array_equal(x_adv[:3], x[:3])
    assert attack.attacks == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert attack.best_attacks.tolist() == [-2, -2, -2, *(n - 1 if n > 0 else -1 for n in result.broken_by.tolist())]
    assert 0 in attack.best_attacks
    assert -1 in attack.best_attacks
    assert "apgd-ce" in repr(attack)
    np.testing.assert_array_equal(ours.AutoAttack(classifier, eps=0.01, steps=5, queries=20).generate(x[3:]), x_adv[3:])
    assert ours.AutoAttack(classifier, targeted=True).attacks == list(sk.AutoAttack(0.0, version="plus").attacks)
    assert ours.AutoAttack(classifier, version=("square",)).attacks == ["square"]


def test_autoattack_takes_other_attacks_and_another_judge(monkeypatch):
    monkeypatch.setitem(sys.modules, "multiprocess", ModuleType("multiprocess"))  # ART imports it, and uses it for a pool alone
    classifier, x, y = case()
    attacks = [ours.ProjectedGradientDescent(classifier, max_iter=5, verbose=False, **LINF)]
    attack = ours.AutoAttack(classifier, eps=0.02, attacks=attacks)
    theirs = evasion.AutoAttack(classifier, eps=0.02, attacks=attacks)
    np.testing.assert_array_equal(attack.generate(x, y), theirs.generate(x, y))
    np.testing.assert_array_equal(attack.best_attacks, theirs.best_attacks)
    with pytest.raises(ValueError, match="precision"):
        ours.AutoAttack(classifier, attacks=attacks, precision="bf16")
    judge = wrap(InDouble(linear(192).double()))
    wrong = judge.predict(x).argmax(1) != y
    attack = ours.AutoAttack(classifier, estimator_orig=judge, version=("apgd-ce",), steps=2)
    np.testing.assert_array_equal(attack.generate(x, y)[wrong], x[wrong])
    np.testing.assert_array_equal(attack.best_attacks == -2, wrong)


# ---- our settings


def test_settings_reach_the_attack():
    model, x, y = attackable(8)
    classifier, x = wrap(model.float()), x.float()
    calm = ours.ProjectedGradientDescent(classifier, max_iter=30, precision="bf16", verbose=False, **LINF).generate(x.numpy(), y)
    settings = {"steps": 30, "step_size": 0.006, "random_start": False}
    np.testing.assert_array_equal(calm, sk.pgd(model, x, y, 0.02, precision="bf16", **settings))
    assert (calm != sk.pgd(model, x, y, 0.02, **settings).numpy()).any()
    for extra in ({"stop": "cycle"}, {"graph": False}, {"fuse": False}, {"bn_mode": "keep"}):
        attack = ours.ProjectedGradientDescent(classifier, max_iter=30, precision="bf16", verbose=False, **LINF, **extra)
        np.testing.assert_array_equal(attack.generate(x.numpy(), y), calm)
    with pytest.raises(ValueError, match="graph=True"):
        ours.ProjectedGradientDescent(classifier, graph=True, verbose=False).generate(x.numpy(), y)
    halves = [ours.FastGradientMethod(classifier, eps=0.02, precision=p).generate(x.numpy(), y) for p in ("fp32", "bf16")]
    assert 0.001 < (halves[0] != halves[1]).mean() < 0.2


@pytest.mark.parametrize("settings", [LINF, L2, {**L2, "num_random_init": 1}])
@pytest.mark.parametrize("loss", [None, nn.MultiMarginLoss()], ids=str)
def test_few_graphs_for_all_batches(settings, loss, monkeypatch):
    """Also of several attacks, whose classifiers hold the same model."""
    captures, capture = [], FakeGraph.capture
    monkeypatch.setattr(attacks, "graphs", Graphs(graph=FakeGraph))
    monkeypatch.setattr(FakeGraph, "capture", lambda self, function: (captures.append(self), capture(self, function)))
    model, x, y = attackable(14)
    classifier, found = wrap(model.float(), loss, preprocessing=NORMALISED), []
    for graph in (True, True, False):
        np.random.seed(1)  # noqa: NPY002
        attack = ours.ProjectedGradientDescent(classifier, max_iter=3, batch_size=5, verbose=False, graph=graph, **settings)
        found.append(attack.generate(x.float().numpy(), y.numpy()))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    assert len(captures) == (1 if loss is None else 2), "other losses than ours are not given batches that are filled up"


def test_the_module_stays_the_same():
    model = cnn().eval()
    classifier = wrap(model)
    assert model_of(classifier) is model
    classifier = wrap(model, preprocessing=NORMALISED)
    first = model_of(classifier)
    assert model_of(classifier) is first
    assert first[1] is model
    classifier.set_params(preprocessing=(0.5, 1.0))
    second = model_of(classifier)
    assert second is not first
    assert second[0].mean.unique().tolist() == [0.5]
    gone = weakref.ref(second)
    del classifier, second
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_changed(name):
    model = mixed_model()
    classifier = wrap(model)
    x, y = batch()
    before, images = snapshot(model, x, y), x.numpy().copy()
    arguments = {"AutoAttack": {"steps": 2, "queries": 3}, "FastGradientMethod": {}}.get(name, {"max_iter": 2, "verbose": False})
    getattr(ours, name)(classifier, **arguments).generate(images)
    assert_same(before, snapshot(model, x, y))
    np.testing.assert_array_equal(images, x)


# ---- what is refused


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm": 0}, {"eps": -1}, {"eps_step": -0.1}, {"eps": "1"}, {"eps": np.array([1.0])},
        {"batch_size": 0}, {"num_random_init": 1.0}, {"num_random_init": -1}, {"max_iter": -1}, {"decay": -1.0},
        {"targeted": "no"}, {"verbose": "no"},
    ],
    ids=str,
)  # fmt: skip
def test_errors_are_those_of_art(arguments):
    classifier = wrap(cnn())
    with pytest.raises((TypeError, ValueError)) as theirs:
        evasion.ProjectedGradientDescentPyTorch(classifier, **arguments)
    with pytest.raises(type(theirs.value)) as mine:
        ours.ProjectedGradientDescent(classifier, **arguments)
    assert str(mine.value) == str(theirs.value)


def test_what_is_no_classifier_for_us():
    errors = importlib.import_module("art.exceptions")
    for name in NAMES:
        with pytest.raises(errors.EstimatorError):
            getattr(ours, name)(cnn())
    other = estimators.BlackBoxClassifierNeuralNetwork(lambda x: x, (3, 8, 8), 10)
    with pytest.raises(TypeError, match="estimator is a BlackBoxClassifierNeuralNetwork: give a PyTorchClassifier"):
        ours.AutoAttack(other)
    smoothed = importlib.import_module("art.estimators.certification.randomized_smoothing").PyTorchRandomizedSmoothing
    with pytest.raises(TypeError, match="PyTorchRandomizedSmoothing"):
        ours.ProjectedGradientDescent(smoothed(cnn(), nn.CrossEntropyLoss(), (3, 8, 8), 10, device_type="cpu"))
    with pytest.raises(ValueError, match=r"FeatureSqueezing.*PyTorch form"):
        ours.FastGradientMethod(wrap(cnn(), preprocessing_defences=squeezing.FeatureSqueezing((0, 1))))
    for loss in (nn.MSELoss(), lambda z, y: z.sum()):
        with pytest.raises(ValueError, match="whose value for each sample is not known"):
            ours.ProjectedGradientDescent(wrap(cnn(), loss))


def test_arguments_without_effect_are_errors():
    classifier, x, y = case(3)
    for arguments, error, says in (
        ({"summary_writer": True}, ValueError, "summary_writer=True"),
        ({"stpes": 3}, TypeError, "ProjectedGradientDescent.* unexpected keyword argument 'stpes'"),
        ({"precision": "fp8"}, ValueError, "precision='fp8'"),
    ):
        with pytest.raises(error, match=says):
            ours.ProjectedGradientDescent(classifier, **arguments)
    with pytest.raises(TypeError, match="FastGradientMethod.* unexpected keyword argument 'stop'"):
        ours.FastGradientMethod(classifier, stop="success")
    for settings in ({"graph": True, "norm": 1}, {"graph": True, "decay": 1.0}, {"stop": "success", "norm": 2}):
        with pytest.raises(ValueError, match="is not for norm="):
            ours.ProjectedGradientDescent(classifier, verbose=False, **settings).generate(x, y)
    with pytest.raises(ValueError, match="not one-hot"):
        ours.ProjectedGradientDescent(classifier, verbose=False).generate(x, np.full((3, 10), 0.1))
    with pytest.raises(ValueError, match="Target labels `y` need to be provided"):
        ours.ProjectedGradientDescent(classifier, targeted=True, verbose=False).generate(x)
    for arguments, says in (({"eps_step": 0.2}, "eps_step=0.2"), ({"parallel_pool_size": 2}, "parallel_pool_size=2")):
        with pytest.raises(ValueError, match=says):
            ours.AutoAttack(classifier, **arguments)
    with pytest.raises(ValueError, match="clip_values=None"):
        ours.AutoAttack(case(3, clip_values=None)[0])
    with pytest.raises(ValueError, match="mask"):
        ours.AutoAttack(classifier).generate(x, y, mask=x > 0)
