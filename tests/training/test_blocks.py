"""Activation checkpointing: the same gradients, statistics and random numbers, and attacks that still take the plan."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_kernels import explain
from spat_train.errors import InputError
from spat_train.models import create
from spat_train.training.blocks import Checkpointing, find_blocks
from spat_train.training.free import make_step
from spat_train.training.trainer import train
from tests.training.helpers import assert_same, new_run, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, channels: int, spectral: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        if spectral:
            nn.utils.parametrizations.spectral_norm(self.conv)
        self.bn, self.dropout = nn.BatchNorm2d(channels), nn.Dropout(0.3)
        self.calls = [] if spectral else None

    def forward(self, x):
        if self.calls is not None:
            self.calls.append(len(x))
        return x + self.dropout(self.bn(self.conv(x)).relu())


def residual(num_classes: int, spectral: bool = False) -> nn.Module:
    stem, head = nn.Conv2d(1, 6, 3, stride=2), nn.Sequential(nn.Flatten(), nn.Linear(54, num_classes))
    return nn.Sequential(stem, nn.BatchNorm2d(6), nn.Sequential(Block(6, spectral), Block(6, spectral)), head)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "trades", "forwards": "clean-adv-clean"}, {"method": "mart", "awp": 0.01, "accumulate": 2},
        {"method": "free", "steps": None, "replays": 2}, {"method": "madry", "precision": "bf16", "attack_precision": "fp32"},
    ],
)  # fmt: skip
def test_updates_are_the_same_bit_by_bit(options):
    """With dropout, batch norm and spectral norm, whose vectors a forward moves as batch norm's statistics."""
    states, counts = [], []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = residual(10, spectral=True).train()
        step = make_step(settings(checkpoint_activations=checkpointed, **options), model)
        torch.manual_seed(2)
        x, y = torch.rand(9, 1, 8, 8), torch.randint(10, (9,))
        values = [step(x, y, epoch=0, part=0.1, seed=3, length=0.1).values for _ in range(2)]
        states.append((values, step.state_dict(), torch.get_rng_state()))
        counts += [len(block.calls) for block in model[2]]
        assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same(*states)
    assert counts[2] > counts[0]  # computed again
    assert counts[:2] == counts[:1] * 2
    assert states[0][1]["model"]["2.0.bn.num_batches_tracked"] > 0


def test_a_run_is_the_same_and_its_attack_still_planned(tmp_path):
    options = {"model": "tests.training.test_blocks:residual", "epochs": 2}
    for checkpointed in (False, True):
        train(settings(tmp_path / str(checkpointed), checkpoint_activations=checkpointed, **options))
    assert_same(*(weights(tmp_path / str(flag))["model"] for flag in (False, True)))
    run = new_run(settings(checkpoint_activations=True, **options))
    x, y = next(run.loader.epoch(0))
    run.train_on(x, y, len(x))
    assert explain(run.model, x).path == "plan"


def test_it_keeps_less_for_the_backward():
    def kept(context) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t), context():
            model(x)
        return sum(sizes)

    model, x = create("preactresnet-18/raw", 10, (3, 32, 32)).train(), torch.rand(4, 3, 32, 32)
    assert kept(Checkpointing(model)) < kept(nullcontext) / 4


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("wrn-28-10", {"WideBlock": 12}),
        ("preactresnet-18/raw", {"RawPreActBlock": 8}),
        ("resnet-18", {"BasicBlock": 8}),
        ("small-cnn", {}),
        ("timm:convnext_tiny", {"ConvNeXtBlock": 18}),
        ("timm:swin_tiny_patch4_window7_224", {"SwinTransformerBlock": 12}),
        ("timm:vit_tiny_patch16_224", {"Block": 12}),
        ("timm:efficientnet_b0", {"DepthwiseSeparableConv": 1, "InvertedResidual": 15}),
        ("timm:regnety_002", {"Bottleneck": 13}),
        ("torchvision:convnext_tiny", {"CNBlock": 18}),
        ("torchvision:mobilenet_v3_small", {"InvertedResidual": 11}),
        ("torchvision:densenet121", {"_DenseLayer": 58}),
    ],
)
def test_blocks_of_networks(name, blocks):
    library = name.partition(":")[0]
    if library != name:
        pytest.importorskip(library)
    with torch.device("meta"):
        if library == "timm":
            model = __import__("timm").create_model(name.partition(":")[2])
        elif library == "torchvision":
            model = __import__("torchvision").models.get_model(name.partition(":")[2])
        else:
            model = create(name, 10, (1, 28, 28) if name == "small-cnn" else (3, 32, 32))
    assert Counter(type(block).__name__ for block in find_blocks(model)) == blocks


def test_a_list_that_the_model_goes_on_to_fill():
    """The layers of torchvision's DenseNet are given one list, to which the model adds."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.DenseNet(8, (2, 2), 8, num_classes=10).train()
    twin, x = copy.deepcopy(model), torch.rand(4, 3, 32, 32)
    with Checkpointing(model)():
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.mul_(2))


def test_an_input_changed_in_place_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), Writes(), Writes())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), Checkpointing(model)():
        model(torch.rand(2, 4)).sum().backward()
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "Sequential has no repeated blocks: leave it out"), ({"compile": True}, "--compile recomputes by itself")],
)
def test_refused(options, message):
    with pytest.raises(InputError, match=f"--checkpoint-activations True: {message}"):
        train(settings(checkpoint_activations=True, **options), save=False)
