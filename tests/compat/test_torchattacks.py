"""torchattacks' attacks on our kernels: the same images, names, defaults, modes and files."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spat_kernels.compat import torchattacks as ours
from tests.helpers import EPS, assert_inside, photographs, robust

theirs = pytest.importorskip("torchattacks")

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def model():
    return robust("madry").double()


@pytest.fixture(scope="module")
def batch():
    x, y = photographs()
    return x[:12].double(), y[:12]


def accuracy(model, x, y) -> float:
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


# Attacks that draw nothing, or the same numbers as torchattacks from torch's generator.
SAME = {
    "FGSM": {},
    "BIM": {"steps": 3},
    "PGD": {"random_start": False, "steps": 3, "alpha": 3 / 255},
    "PGDL2": {"random_start": False, "steps": 3, "eps": 0.5},
    "RFGSM": {"steps": 3},
    "TPGD": {"steps": 3},
}


@pytest.mark.parametrize("name", SAME)
def test_same_images(model, batch, name):
    x, y = batch
    found = []
    for library in (theirs, ours):
        torch.manual_seed(0)
        found.append(getattr(library, name)(model, **SAME[name])(x, y))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    assert not torch.equal(found[1], x)


@pytest.mark.parametrize("mode", ["by_label", "random", "least_likely", "by_function"])
def test_same_targets(model, batch, mode):
    x, y = batch
    given = {"least_likely": {"kth_min": 2}, "by_function": {"target_map_function": lambda images, labels: (labels + 3) % 10}}
    found = []
    for library in (theirs, ours):
        attack = library.PGD(model, random_start=False, steps=2)
        getattr(attack, f"set_mode_targeted_{mode}")(quiet=True, **given.get(mode, {}))
        torch.manual_seed(0)
        found.append((attack.get_mode(), attack.targeted, attack(x, (y + 1) % 10)))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[1][2], found[0][2], rtol=0, atol=1e-6)


def test_default_mode_again(model, batch, capsys):
    x, y = batch
    attack = ours.FGSM(model)
    before = attack(x, y)
    attack.set_mode_targeted_by_label()
    assert not torch.equal(attack(x, (y + 1) % 10), before)
    attack.set_mode_default()
    assert torch.equal(attack(x, y), before)
    assert capsys.readouterr().out.splitlines() == [
        "Attack mode is changed to 'targeted(label)'.",
        "Attack mode is changed to 'default.'",
    ]


@pytest.mark.parametrize(
    "name",
    ["FGSM", "FFGSM", "BIM", "RFGSM", "PGD", "PGDL2", "TPGD", "APGD", "APGDT", "FAB", "Square", "AutoAttack", "MultiAttack"],
)
def test_same_arguments_and_defaults(name):
    parameters = list(inspect.signature(getattr(theirs, name).__init__).parameters.values())
    own = list(inspect.signature(getattr(ours, name).__init__).parameters.values())[: len(parameters)]
    assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in parameters]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FFGSM", {}),
        ("PGD", {}),
        ("PGDL2", {"eps": 0.5}),
        ("APGD", {}),
        ("APGD", {"norm": "L2", "eps": 0.5, "loss": "dlr"}),
        ("APGDT", {"steps": 5}),
        ("FAB", {}),
        ("FAB", {"multi_targeted": True, "steps": 5}),
        ("Square", {"n_queries": 600}),
        ("MultiAttack", {}),
        ("AutoAttack", {"version": "rand"}),
    ],
)
def test_as_strong(name, arguments):
    """From other random numbers, as many images are left, to one; for Square, over whose seeds they vary by 2, to 3."""
    images = {"AutoAttack": 6, "FAB": 20}.get(name, 50)  # torchattacks takes a minute for 50 in version "rand"
    model, (x, y) = robust("madry"), (t[:images] for t in photographs())
    left = []
    for library in (theirs, ours):
        torch.manual_seed(0)
        if name == "MultiAttack":
            attack = library.MultiAttack([library.FGSM(model), library.PGD(model, steps=5)])
        else:
            attack = getattr(library, name)(model, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `rand` on a network that draws nothing, FAB's gradients of 0
            found = attack(x, y)
        left.append(accuracy(model, found, y))
    assert left[1] == pytest.approx(left[0], abs=(301 if name == "Square" else 101) / images)
    assert left[1] < accuracy(model, x, y)
    norm = "l2" if "0.5" in str(arguments) else "linf"
    assert_inside(found, x, arguments.get("eps", EPS), norm)


def test_normalised_images(batch):
    """Images that were normalised outside are attacked in [0, 1], and come back normalised, as from torchattacks."""
    network, (x, y) = robust("madry").double(), batch
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (MEAN, STD))
    found = []
    for library in (theirs, ours):
        attack = library.PGD(network, random_start=False, steps=2)
        attack.set_normalization_used(mean=MEAN, std=STD)
        found.append(attack((x - mean) / std, y))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)  # torchattacks' numbers are fp32
    assert ((found[1] * std + mean - x).abs() <= EPS + 1e-6).all()
    assert attack.model_of_pixels is attack.model_of_pixels, "plans and graphs are kept by it"
    torch.testing.assert_close(attack.get_logits(found[1]), network(found[1]))


def test_several_attacks_of_normalised_images(batch):
    network, (x, y) = robust("madry").double(), batch
    mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1) for numbers in (MEAN, STD))
    found = []
    for first, second in ((theirs, theirs), (ours, ours), (ours, theirs), (theirs, ours)):
        children = [first.FGSM(network, eps=1 / 255), second.BIM(network, steps=3)]
        attack = (theirs if first is theirs else ours).MultiAttack(children)
        attack.set_normalization_used(MEAN, STD)
        found.append(attack((x - mean) / std, y))
        assert all(child.normalization_used is not None and child._normalization_applied for child in children)
    for images in found[1:]:
        torch.testing.assert_close(images, found[0], rtol=0, atol=1e-5)


def test_8_bit_images():
    model, (x, y) = robust("madry"), photographs()
    x, y = (x[:8] * 255).round().byte(), y[:8]
    attack = ours.PGD(model, alpha=8 / 255, random_start=False, steps=2)
    in_floats = attack(x.float() / 255, y)
    assert torch.equal(attack(x, y), in_floats)
    attack.set_return_type("int")
    found = attack(x, y)
    assert found.dtype == torch.uint8
    assert torch.equal(found, (in_floats * 255).round().byte())
    assert (found.int() - x.int()).abs().max() == 8, "eps in whole numbers: truncated, it would be 7 or 9"


def test_files(tmp_path, capsys):
    model, (x, y) = robust("madry"), photographs()
    loader = DataLoader(TensorDataset(x[:20], y[:20]), batch_size=8)
    attack, path = ours.PGD(model, random_start=False, steps=2), tmp_path / "found.pt"
    left, length, seconds = attack.save(loader, path, save_predictions=True, save_clean_inputs=True, return_verbose=True)
    found = attack(x[:20], y[:20])
    broken = model(found).argmax(1) != y[:20]
    assert left == pytest.approx(accuracy(model, found, y[:20]))
    assert length == pytest.approx(float((found - x[:20]).flatten(1).norm(dim=1)[broken].mean()))
    assert f"Robust accuracy: {left:.2f} %" in capsys.readouterr().out
    for library in (ours, theirs):  # either reads it
        kept = library.PGD(model).load(path, batch_size=20, load_predictions=True, load_clean_inputs=True)
        images, labels, predictions, clean = next(iter(kept))
        torch.testing.assert_close(images, found, rtol=0, atol=1e-6)
        assert torch.equal(clean, x[:20])
        assert torch.equal(labels, y[:20])
        assert torch.equal(predictions, model(found).argmax(1))
    attack.save(loader, path, verbose=False, save_type="int")
    (images, _) = next(iter(attack.load(path, normalize={"mean": MEAN, "std": STD})))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (MEAN, STD))
    torch.testing.assert_close(images, ((found * 255).round() / 255 - mean) / std)
    with pytest.raises(ValueError, match="it has no preds: save with save_predictions"):
        attack.load(path, load_predictions=True)
    both = ours.MultiAttack([ours.FGSM(model), attack])
    left, rates, *_ = both.save(loader, return_verbose=True, verbose=False)
    assert rates == pytest.approx([100 - accuracy(model, ours.FGSM(model)(x[:20], y[:20]), y[:20]), 100 - left])


def test_attributes_and_models_can_be_changed(model, batch):
    x, y = batch
    attack = ours.PGD(model, random_start=False)
    attack.eps, attack.alpha, attack.steps = 4 / 255, 4 / 255, 1
    assert torch.equal(attack(x, y), ours.FGSM(model, eps=4 / 255)(x, y))
    other = robust("trades+spat").double()
    attack.set_model(other)
    assert torch.equal(attack(x, y), ours.FGSM(other, eps=4 / 255)(x, y))
    assert "eps=0.0156" in repr(attack)


def test_in_training_mode(model):
    """Batch norm and dropout by choice, as in torchattacks; afterwards every module is in the mode it was in."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    network = network.double().eval()
    network[3].train()
    x, y = torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    found = []
    for library in (theirs, ours):
        attack = library.FGSM(network)
        attack.set_model_training_mode(model_training=True, batchnorm_training=True, dropout_training=False)
        found.append(attack(x, y))
        if library is theirs:
            network.load_state_dict(before)
            for m, mode in zip(network.modules(), modes, strict=True):
                m.training = mode
    assert ((found[1] - found[0]).abs() < 1e-6).float().mean() > 0.95, "batch norm makes some gradients 0, but for rounding"
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not torch.equal(ours.FGSM(network)(x, y), found[1]), "in eval mode it is another one"


def test_nothing_else_changes(model, batch):
    x, y = batch
    state, copies = torch.get_rng_state(), [t.clone() for t in batch]
    for attack in (ours.APGD(model, steps=2), ours.Square(model, n_queries=5), ours.FAB(model, steps=2)):
        first, second = attack(x, y), attack(x, y)
        assert torch.equal(first, second), "a seed, 0, is an argument"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, batch, copies))
    assert not torch.equal(ours.APGD(model, steps=2, seed=1)(x, y), ours.APGD(model, steps=2)(x, y))


def test_settings_of_ours(batch):
    model, (x, y) = robust("madry"), (batch[0].float(), batch[1])
    half = ours.PGD(model, random_start=False, precision="bf16")(x, y)
    whole = ours.PGD(model, random_start=False)(x, y)
    assert not torch.equal(half, whole)
    assert ((half - whole).abs() < 1e-6).float().mean() > 0.5
    with pytest.raises(TypeError, match="PGD.* unexpected keyword argument 'precison'.*precision, "):
        ours.PGD(model, precison="bf16")


def test_what_does_not_fit(model, batch):
    x, y = batch
    with pytest.raises(ValueError, match="Targeted mode is not supported"):
        ours.APGD(model).set_mode_targeted_random()
    with pytest.raises(ValueError, match="x must lie inside bounds"):
        ours.PGD(model)(x * 4 - 2, y)
    with pytest.raises(ValueError, match="loss='ce': Square"):
        ours.Square(model, loss="ce")
    with pytest.raises(ValueError, match="at least two, on the same model"):
        ours.MultiAttack([ours.FGSM(model), ours.FGSM(robust("madry"))])
    with pytest.raises(ValueError, match="kth_min=0"):
        ours.PGD(model).set_mode_targeted_least_likely(0)
    with pytest.raises(ValueError, match="version"):
        ours.AutoAttack(model, version="best")
    attack = ours.PGD(model)
    attack.set_mode_targeted_least_likely(10, quiet=True)
    with pytest.raises(ValueError, match="kth_min=10: the model has 10 classes"):
        attack(x, y)
    with pytest.raises(ValueError, match="labels=None"):
        ours.AutoAttack(model)(x)


def test_the_rest_is_theirs():
    assert ours.DeepFool is theirs.DeepFool
    assert ours.__version__ == theirs.__version__
    assert isinstance(ours.PGD(nn.Flatten()), theirs.attack.Attack)
    with pytest.raises(AttributeError):
        ours.NoSuchAttack  # noqa: B018


def test_what_is_wrong_in_half_precision_alone_is_attacked_too(batch):
    """Else it would be called robust: attacks leave alone what is misclassified as it is."""
    model, (x, y) = rounded_in_half(), (batch[0].float(), torch.zeros_like(batch[1]))
    assert accuracy(model, x, y) == 100
    for name, options in (("APGD", {}), ("Square", {"n_queries": 500}), ("FAB", {})):
        attack = getattr(ours, name)(model, eps=0.5, precision="bf16", **options)
        assert accuracy(model, attack(x, y), y) < 100, name


def rounded_in_half() -> nn.Module:
    """Right about every image in fp32. In bf16 the logits are equal, and NaN counts as wrong."""

    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 32 * 32, 4)
            nn.init.normal_(self.fc.weight, std=1e-3)
            nn.init.zeros_(self.fc.bias)

        def forward(self, x):
            logits = self.fc(x.flatten(1)) + torch.tensor([0.15, 0.0, 0.0, 0.0], device=x.device)
            return logits if logits.dtype == torch.float32 else logits * torch.nan

    return Rounded().eval()


def test_files_of_normalised_8_bit_images(tmp_path):
    model, (x, y) = robust("madry"), photographs()
    images = (x[:8] * 255).round().byte()
    attack, path = ours.FGSM(model), tmp_path / "found.pt"
    attack.set_normalization_used(MEAN, STD)
    attack.save([(images, y[:8])], path, verbose=False, save_clean_inputs=True)
    found, _, clean = next(iter(attack.load(path, load_clean_inputs=True)))
    torch.testing.assert_close(clean, images.float() / 255)
    assert (found - clean).abs().max() <= EPS + 1e-6
    with pytest.raises(ValueError, match="data_loader is empty"):
        attack.save([])


def test_the_model_of_normalised_images_follows(batch):
    """Another model, other numbers, inference mode: what was wrapped before is not used again."""
    first, second, (x, y) = robust("madry").double(), robust("trades+spat").double(), batch
    attack = ours.FGSM(first)
    attack.set_normalization_used([0.5] * 3, [0.5] * 3)
    normalised = (x - 0.5) / 0.5
    with torch.inference_mode():
        attack(normalised, y)
    once = attack(normalised, y)
    attack.model = second
    other = ours.FGSM(second)
    other.set_normalization_used([0.5] * 3, [0.5] * 3)
    assert torch.equal(attack(normalised, y), other(normalised, y))
    assert not torch.equal(attack(normalised, y), once)


def test_generators_and_errors(model, batch):
    x, y = batch
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(ours.TPGD(model, steps=1, generator=torch.Generator().manual_seed(0))(x))
    assert torch.equal(*found)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="inside bounds"):
        ours.RFGSM(model)(x * 2, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_of_autoattack_follow_it(batch):
    model, (x, y) = robust("madry"), (batch[0][:4].float(), batch[1][:4])
    attack = ours.AutoAttack(model, steps=1, seed=0)
    attack.attacks[-1].n_queries = 2
    attack.eps = 1 / 255
    assert (attack(x, y) - x).abs().max() <= 1.01 / 255
    attack.attacks.append(ours.FGSM(model))
    attack(x, y)


def test_an_attack_of_ones_own(model, batch):
    """As torchattacks' users write them: with its constructor, and logits of images in [0, 1]."""
    x, y = batch

    def own(library):
        class Own(library.Attack):
            def __init__(self, model, eps):
                super().__init__("Own", model)
                self.eps, self.supported_mode = eps, ["default", "targeted"]

            def forward(self, images, labels):
                images = images.clone().detach().requires_grad_()
                loss = nn.functional.cross_entropy(self.get_logits(images), labels)
                return (images + self.eps * torch.autograd.grad(loss, images)[0].sign()).clamp(0, 1).detach()

        return Own

    found = []
    for library in (theirs.attack, ours):
        attack = own(library)(model, 8 / 255)
        attack.set_normalization_used(MEAN, STD)
        found.append(attack((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), y))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert "Own(" in repr(attack)


def test_copies_and_pickles(model, batch):
    x, y = batch
    attack = ours.PGD(model, random_start=False, steps=1)
    attack.set_normalization_used([0.0] * 3, [1.0] * 3)
    attack.set_mode_targeted_by_label(quiet=True)
    for other in (copy.deepcopy(attack), pickle.loads(pickle.dumps(attack))):
        assert torch.equal(other(x, y), attack(x, y))


ALONE = """
import sys
sys.modules["torchattacks"] = None  # as where it is not installed
import torch
from spat_kernels.compat import torchattacks
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
x, y = torch.rand(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])
attack = torchattacks.MultiAttack([torchattacks.FGSM(model), torchattacks.PGD(model)])
attack.set_normalization_used([0.5] * 3, [0.5] * 3)
found = attack((x - 0.5) / 0.5, y)
assert ((found - (x - 0.5) / 0.5).abs() / 2 * 0.5 <= 8 / 255 + 1e-6).all()
try:
    torchattacks.DeepFool
except AttributeError as error:
    print(error)
"""


def test_without_torchattacks():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "has no DeepFool: it may be in torchattacks, which is not installed: pip install torchattacks" in done.stdout


def script(torchattacks, model, images, labels) -> float:
    """As users have it: a targeted and an untargeted attack after another, and the accuracy that is left."""
    attack = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=4, random_start=False)
    attack.set_mode_targeted_least_likely(quiet=True)
    targeted = attack(images, labels)
    attack.set_mode_default()
    untargeted = attack(images, labels)
    worst = torch.where((model(targeted).argmax(1) == labels)[:, None, None, None], untargeted, targeted)
    return accuracy(model, worst, labels)


def test_a_script_with_another_import(model):
    x, y = (images[:15] for images in photographs())
    left = [script(library, model, x.double(), y) for library in (theirs, ours)]
    assert left[1] == pytest.approx(left[0], abs=0.3)
