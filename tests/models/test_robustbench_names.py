"""RobustBench's names: which network and normalisation they stand for, and files in its layouts under them."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.models import create
from spat_train.models.checkpoints import load_model
from spat_train.models.networks.deepmind import DMPreActResNet18, DMWideResNet
from spat_train.models.networks.preact_resnet import PreActBlock, PreActResNet18, RawPreActBlock
from spat_train.models.robustbench_names import CLASSES, ENTRIES, NORMALISATIONS, OTHERS, Entry, resolve
from spat_train.models.run_config import chosen_name
from spat_train.models.wrapping import normalisation
from tests.models.helpers import CIFAR, X, build, network, numbers, own, prefixed, saved

CIFAR100 = SimpleNamespace(**vars(CIFAR) | {"name": "cifar100", "num_classes": 100})
PARAMETERS = {  # without layers that no forward uses
    "wrn-28-10": 36_479_194, "wrn-34-10": 46_160_474, "wrn-34-15": 103_819_674, "wrn-34-20": 184_531_674,
    "wrn-70-16": 266_796_506, "wrn-40-2": 2_243_546, "dm-wrn-28-10": 36_479_194, "dm-wrn-34-10": 46_160_474,
    "dm-wrn-34-20": 184_531_674, "dm-wrn-70-16": 266_796_506, "dm-wrn-82-8": 79_125_466, "dm-wrn-94-16": 365_915_610,
    "dm-wrn-106-16": 415_475_162, "dm-preactresnet-18": 12_548_426, "preactresnet-18/activated": 11_172_170,
    "preactresnet-18/raw-no-bn": 11_171_146, "resnet-18/cifar": 11_173_962, "resnet-50/cifar": 23_520_842,
}  # fmt: skip


IMAGENETS = {  # as torchvision and timm document them
    "resnet-18/imagenet": 11_689_512, "resnet-50/imagenet": 25_557_032, "torchvision:wide_resnet50_2": 68_883_240,
    "timm:convnext_base": 88_591_464, "timm:convnext_large": 197_767_336, "timm:vit_base_patch16_224": 86_567_656,
    # T, B and ViT-S as the authors' files have them; the others follow from timm's networks and the same stems.
    "convnext-t-convstem": 28_627_432, "convnext-s-convstem": 50_261_992, "convnext-b-convstem": 88_753_416,
    "convnext-l-convstem": 198_134_680, "vit-s-convstem": 22_777_576, "vit-b-convstem": 87_147_112,
}  # fmt: skip


@pytest.mark.parametrize("name", [*PARAMETERS, *IMAGENETS])
def test_parameter_counts(name):
    classes, side = (1000, 224) if name in IMAGENETS else (10, 32)
    with torch.device("meta"):
        model = build(name, classes, (3, side, side))
    assert sum(p.numel() for p in model.parameters()) == (PARAMETERS | IMAGENETS)[name]


def test_every_entry_has_its_own_name():
    networks = set()
    for name, entries in ENTRIES.items():
        assert len({entry[:2] for entry in entries}) == len(entries)
        assert not any(name in others.split() for others in OTHERS.values())
        for entry in entries:
            assert resolve(f"robustbench:{entry.dataset}/{entry.threat}/{name}", CLASSES[entry.dataset]) == entry
            networks.add(entry.network)
    assert {entry.normalisation for entries in ENTRIES.values() for entry in entries} == set(NORMALISATIONS.values())
    assert networks == PARAMETERS.keys() | IMAGENETS.keys()


@pytest.mark.parametrize(
    ("name", "num_classes", "where", "network", "numbers"),
    [
        ("Carmon2019Unlabeled", 10, "cifar10/Linf", "wrn-28-10", None),
        ("Rice2020Overfitting", 10, "cifar10/Linf", "wrn-34-20", "mean 0.4914 0.4822 0.4465, std 0.2471 0.2435 0.2616"),
        ("L2/Rice2020Overfitting", 10, "cifar10/L2", "preactresnet-18/activated", "mean 0.4914"),
        ("Rice2020Overfitting", 100, "cifar100/Linf", "preactresnet-18/activated", "mean 0.5071 0.4865 0.4409"),
        ("cifar100/Rice2020Overfitting", 7, "cifar100/Linf", "preactresnet-18/activated", "mean 0.5071"),
        ("Augustin2020Adversarial", 10, "cifar10/L2", "resnet-50/cifar", "std 0.247 0.2435 0.2616"),
        ("Wong2020Fast", 1000, "imagenet/Linf", "resnet-50/imagenet", "mean 0.485 0.456 0.406"),
        ("Standard", 7, "cifar10/Linf", "wrn-28-10", None),  # known for one data set only
        ("Hendrycks2020AugMix_WRN", 7, "cifar10/corruptions", "wrn-40-2", "mean 0.5"),  # the same for two
    ],
)
def test_names(name, num_classes, where, network, numbers):
    entry = resolve(f"robustbench:{name}", num_classes)
    assert (f"{entry.dataset}/{entry.threat}", entry.network) == (where, network)
    assert (entry.normalisation is None) == (numbers is None)
    with torch.device("meta"):
        plain, model = build(network, num_classes), create(f"robustbench:{name}", num_classes)
    assert (
        model.state_dict().keys() - {"normalize.mean", "normalize.std"}
        == (prefixed("model.", plain.state_dict()) if numbers else plain.state_dict()).keys()
    )
    model = create("wrn-10-1", mean=entry.normalisation[0], std=entry.normalisation[1]) if numbers else plain
    assert (numbers or "") in normalisation(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Carmon2019Unlabelled", "no such model: did you mean Carmon2019Unlabeled.* are known, of convnext-b-convstem"),
        ("Rice2020Overfiting", "did you mean Rice2020Overfitting"),
        ("", "RobustBench has no such model"),
        ("Debenedetti2022Light_XCiT-S12", "its XCiT is none of ours: give its own code as package.module:factory"),
        ("L2/Ding2020MMA", "normalises each image by its own mean is none of ours"),
        ("imagenet/Carmon2019Unlabeled", "has it in cifar10/Linf only: give robustbench:cifar10/Carmon2019Unlabeled"),
        ("cifar10/cifar10/Carmon2019Unlabeled", "has it in cifar10/Linf only"),
        ("Linf/cifar10/Carmon2019Unlabeled", "has it in cifar10/Linf only"),
        ("Linf/Kireev2021Effectiveness_RLAT", "has it in cifar10/corruptions only"),
        ("Gowal2020Uncovering", "num_classes=7 leaves open which .*robustbench:cifar10/Gowal.* or robustbench:cifar100/Gowal"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        create(f"robustbench:{name}", 7)
    assert str(caught.value).startswith(f"name='robustbench:{name}'")


@pytest.mark.parametrize("given", [{"activation": "gelu"}, {"mean": [0.5] * 3, "std": [0.5] * 3}])
@pytest.mark.parametrize("name", ["robustbench:Carmon2019Unlabeled", "robustbench:Rice2020Overfitting"])
def test_nothing_is_given_twice(tmp_path, given, name):
    """Also where the entry has no normalisation: then it says so."""
    with pytest.raises(ValueError, match="says its own: leave it out, or name the network, wrn-"):
        create(name, **given)
    path = saved(tmp_path, network().state_dict())
    with pytest.raises(InputError, match="mean=.*: robustbench.* says its own" if "mean" in given else "activation='gelu'"):
        load_model(path, CIFAR, name, **given)


def test_a_run_that_names_an_entry_runs_no_code(tmp_path):
    for name in ("robustbench:Carmon2019Unlabeled", "torchvision:resnet18", "timm:resnet18"):
        assert chosen_name(tmp_path, Config(model=name), None, "--model-name") == name
    with pytest.raises(InputError, match="it names code"):
        chosen_name(tmp_path, Config(model="robustbench.model_zoo:make"), None, "--model-name")


# ---- files in RobustBench's layouts, of small networks of the same families


def small(monkeypatch, network: str, numbers: str = "cifar10") -> str:
    monkeypatch.setitem(ENTRIES, "Small", [Entry("cifar10", "Linf", network, NORMALISATIONS[numbers])])
    return "robustbench:Small"


def normalised(x: Tensor, key: str) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALISATIONS[key])
    return (x - mean) / std


LAYOUTS = {
    "bare": lambda s: s,
    "state_dict, module.": lambda s: {"state_dict": prefixed("module.", s), "epoch": 3},
    "model.": lambda s: prefixed("model.", s),
    "module.model.": lambda s: {"state_dict": prefixed("module.model.", s)},
    "last and best": lambda s: {"last": s, "best": {name: value + 1 for name, value in s.items()}},
    "model_state_dict": lambda s: {"model_state_dict": prefixed("module.", s)},
}
FAMILIES = ["wrn-10-1", "dm-wrn-10-1", "dm-preactresnet-18", "preactresnet-18/activated", "preactresnet-18/raw-no-bn"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_files_without_numbers(tmp_path, monkeypatch, name, layout):
    """The entry's normalisation is in the model."""
    theirs = network(name)
    path = saved(tmp_path, LAYOUTS[layout](theirs.state_dict()))
    model, config = load_model(path, CIFAR, small(monkeypatch, name))
    assert config is None
    torch.testing.assert_close(model(X), theirs(normalised(X, "cifar10")))


@pytest.mark.parametrize("names", [("mu", "sigma"), ("mean", "std"), ("normalize.mean", "normalize.std")])
def test_files_with_numbers(tmp_path, monkeypatch, names):
    """Those of the file count, as in RobustBench's load_state_dict."""
    theirs = network()
    model, _ = load_model(saved(tmp_path, numbers(*names) | theirs.state_dict()), CIFAR, small(monkeypatch, "wrn-10-1"))
    assert normalisation(model) == "mean 0.49 0.48 0.45, std 0.25 0.24 0.26"
    assert [type(m).__name__ for m in model.modules()].count("Normalize") == 1


def test_runs(tmp_path, monkeypatch):
    """The weights of a run that was trained under such a name."""
    name = small(monkeypatch, "wrn-10-1")
    theirs = create(name).eval()
    path = own(tmp_path, theirs, model=name)
    model, config = load_model(path, CIFAR)
    assert config.model == name
    assert torch.equal(model(X), theirs(X))
    with pytest.raises(InputError, match="has a config that says them"):
        load_model(path, CIFAR, mean=[0.5] * 3, std=[0.5] * 3)


def test_another_entry_of_the_name(tmp_path, monkeypatch):
    """Linf is meant where none is said; the weights of another network do not fit."""
    entries = Entry("cifar10", "Linf", "wrn-10-1", None), Entry("cifar10", "L2", "preactresnet-18/activated", None)
    monkeypatch.setitem(ENTRIES, "Small", entries)
    path = saved(tmp_path, network("preactresnet-18/activated").state_dict())
    with pytest.raises(InputError, match="as robustbench:Small for cifar10 .*looks like another architecture"):
        load_model(path, CIFAR, "robustbench:Small")
    model, _ = load_model(path, CIFAR, "robustbench:L2/Small")
    assert isinstance(model, PreActResNet18)


def test_classes_of_the_data(tmp_path):
    theirs = network("preactresnet-18/activated", num_classes=100)
    model, _ = load_model(saved(tmp_path, theirs.state_dict()), CIFAR100, "robustbench:Rice2020Overfitting")
    torch.testing.assert_close(model(X), theirs(normalised(X, "wu")))


# ---- DeepMind's networks, by formulas


def test_deepminds_wide_resnet():
    """Names, shapes and the function of the public checkpoints."""
    model = network("dm-wrn-16-2")
    state = model.state_dict()
    shapes = {
        "init_conv.weight": (16, 3, 3, 3), "layer.0.block.0.batchnorm_0.running_mean": (16,),
        "layer.0.block.0.conv_0.weight": (32, 16, 3, 3), "layer.0.block.0.shortcut.weight": (32, 16, 1, 1),
        "layer.1.block.1.batchnorm_1.weight": (64,), "layer.2.block.1.conv_1.weight": (128, 128, 3, 3), "batchnorm.bias": (128,),
        "logits.weight": (10, 128), "logits.bias": (10,),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "layer.0.block.1.shortcut.weight" not in state

    def norm(name: str, x: Tensor) -> Tensor:
        return F.silu(F.batch_norm(x, *(state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))))

    out = F.conv2d(X, state["init_conv.weight"], padding=1)
    for group in (0, 1, 2):
        for block in (0, 1):
            at, stride = f"layer.{group}.block.{block}", 2 if group and not block else 1
            active = norm(f"{at}.batchnorm_0", out)
            shortcut = out if block else F.conv2d(active, state[f"{at}.shortcut.weight"], stride=stride)
            padded = F.pad(active, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            out = norm(f"{at}.batchnorm_1", F.conv2d(padded, state[f"{at}.conv_0.weight"], stride=stride))
            out = F.conv2d(out, state[f"{at}.conv_1.weight"], padding=1) + shortcut
    pooled = F.avg_pool2d(norm("batchnorm", out), 8).flatten(1)
    torch.testing.assert_close(model(X), F.linear(pooled, state["logits.weight"], state["logits.bias"]))


def test_deepminds_preact_resnet():
    """Its shortcuts are 3x3 convolutions of the input itself, padded as the others."""
    model, x = network("dm-preactresnet-18"), torch.rand(2, 64, 8, 8)
    block, kept = model.layer_1[0], model.layer_1[1]
    assert {name for name, _ in block.named_parameters()} >= {"conv_2d_1.weight", "conv_2d_2.weight", "shortcut.weight"}
    assert kept.shortcut is None

    def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, stride=2)

    out = F.silu(block.batchnorm_1(padded(F.silu(block.batchnorm_0(x)), block.conv_2d_1)))
    expected = padded(x, block.shortcut) + F.conv2d(out, block.conv_2d_2.weight, padding=1)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("name", "kind"), [("dm-wrn-16-1", DMWideResNet), ("dm-preactresnet-18", DMPreActResNet18)])
def test_deepminds_files_do_not_say_how_to_normalise(tmp_path, monkeypatch, name, kind):
    path = saved(tmp_path, network(name).state_dict())
    with pytest.warns(RuntimeWarning, match="normalise images, by numbers that no file holds: give --mean and --std, or"):
        model, _ = load_model(path, CIFAR, name)
    assert isinstance(model, kind)
    relus = create(f"{name}/relu", activation="gelu")
    assert not any(isinstance(m, (nn.ReLU, nn.SiLU)) for m in relus.modules())
    with pytest.raises(InputError, match="looks like DeepMind's network, another function: create dm-"):
        load_model(path, CIFAR, "wrn-16-1")


def test_wide_resnets_in_another_depth():
    with pytest.raises(ValueError, match="depth=33: give 6n . 4"):
        create("dm-wrn-33-10")


def test_preact_resnets_without_the_last_batch_norm():
    model = network("preactresnet-18/raw-no-bn")
    assert isinstance(model.layer1[0], RawPreActBlock)
    assert not any(name.startswith("bn.") for name in model.state_dict())
    features = model.layer4(model.layer3(model.layer2(model.layer1(model.conv1(X)))))
    assert features.min() < 0  # no ReLU either
    torch.testing.assert_close(model(X), model.linear(F.avg_pool2d(features, 4).flatten(1)))
    assert isinstance(create("preactresnet-18/activated").layer1[0], PreActBlock)
