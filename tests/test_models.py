"""The networks have the sizes that the papers give, and the layout of the public checkpoints."""

import pytest
import torch

from spat_train.models import WideResNet, create

# without sub_block1, reference.md; the ResNets: public CIFAR code, PreActResNet with its last BatchNorm
PARAMETERS = {
    "wrn-34-10": 46_160_474,
    "wrn-28-10": 36_479_194,
    "preactresnet-18": 11_172_170,
    "resnet-18": 11_173_962,
    "resnet-50": 23_520_842,
}


def build(name: str, num_classes: int = 10):
    if name.startswith("resnet"):
        pytest.importorskip("torchvision", reason="needs torchvision", exc_type=Exception)  # also where it is another torch's
    return create(name, num_classes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes(name):
    with torch.device("meta"):
        model = build(name).eval()
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["wrn-10-1", "preactresnet-18", "resnet-18"])
def test_every_parameter_gets_a_gradient(name):
    model = build(name, 7)
    logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wide_resnet_has_the_public_layout():
    state = WideResNet(16, 2).state_dict()
    shapes = {
        "conv1.weight": (16, 3, 3, 3),
        "block1.layer.0.bn1.running_mean": (16,),
        "block1.layer.0.conv1.weight": (32, 16, 3, 3),
        "block1.layer.0.convShortcut.weight": (32, 16, 1, 1),
        "block2.layer.1.bn2.weight": (64,),
        "block3.layer.1.conv2.weight": (128, 128, 3, 3),
        "bn1.bias": (128,),
        "fc.weight": (10, 128),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "block1.layer.1.convShortcut.weight" not in state and not any("sub_block" in name for name in state)


def test_wide_resnet_initialisation():
    torch.manual_seed(0)
    model = WideResNet(10, 4)
    weight = model.block3.layer[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not model.fc.bias.any()


def test_dropout_drops_in_training_only():
    model, x = WideResNet(10, 1, dropout=0.5), torch.rand(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["wrn-34", "wrn-34-0", "resnet-19"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="wrn-34-10.*preactresnet-18.*resnet-50"):
        create(name)


def test_wide_resnet_depths():
    with pytest.raises(ValueError, match="6n"):
        create("wrn-33-10")
