"""Training images that grow, and APGD as the training attack: what the network sees, bit by bit after an interruption too."""

import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tyro")
pytest.importorskip("tqdm")

import spat_train
from spat_kernels import APGD, losses
from spat_train.data.datasets import load
from spat_train.data.images import Dataset, Images
from spat_train.errors import InputError
from spat_train.models.registry import create
from spat_train.models.try_on import try_on
from spat_train.training.step import training_attack
from spat_train.training.trainer import train
from tests.training import helpers
from tests.training.helpers import any_size, new_run, settings

pytestmark = pytest.mark.usefixtures("one_thread")
MNIST = "tests/assets/mnist-1500.npz"
GROWING = {"data": MNIST, "model": "tests.training.helpers:any_size", "train_sizes": "12@1,20@2,28@4", "steps": 1}


def test_each_epoch_has_its_size_and_validation_that_of_the_data(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(helpers, "any_size", lambda num_classes: watched(any_size(num_classes), seen))
    config = settings(tmp_path / "run", **GROWING)
    sides = []

    def note(run):
        sides.append((run.progress.epoch, run.pending[0].x.shape[-1], run.pending[0].x_adv.shape[-1]))

    train(config, on_step=note)
    assert sorted(set(sides)) == [(0, 12, 12), (1, 20, 20), (2, 20, 20), (3, 28, 28)]
    assert {side for training, side in seen if not training} == {12, 20, 28}  # the attack and validation are in eval mode
    first = seen.index((True, 20))
    assert (False, 28) in seen[seen.index((True, 12)) : first]  # the validation of the first epoch


def watched(model, seen):
    model.register_forward_pre_hook(lambda model, args: seen.append((model.training, args[0].shape[-1])))
    return model


@pytest.mark.parametrize("steps", [5, 12])
def test_a_stopped_run_goes_on_bit_by_bit_alike(tmp_path, steps):
    """At the border of two sizes and in the middle of a later epoch; with AdamW, an average and APGD."""
    config = helpers.expected_and_other(
        tmp_path, **GROWING | {"attack": "apgd", "steps": 2}, optimizer="adamw", lr=2e-3, beta2=0.95, weight_decay=0.05, ema=0.9,
        label_smoothing=0.1, alpha=0.09, schedule="warmup-cosine", warmup=1.0, decay_norm=False,
    )  # fmt: skip
    helpers.train_until_stopped(config, helpers.after(steps, helpers.send))
    helpers.assert_ends_alike(config)


def test_layer_wise_rates_go_on_too(tmp_path):
    pytest.importorskip("timm")
    config = helpers.expected_and_other(
        tmp_path, model="timm:test_resnet", data=MNIST, input_gradient="autograd", steps=1, epochs=2, limit=60, val_steps=1,
        optimizer="adamw", layer_decay=0.5, lr=1e-3,
    )  # fmt: skip
    helpers.train_until_stopped(config, helpers.after(3, helpers.send))
    helpers.assert_ends_alike(config)


def test_sizes_that_the_network_does_not_take():
    pytest.importorskip("timm")
    pixels, labels = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8), torch.arange(40) % 5
    data = Dataset("noise", Images(pixels, labels), Images(pixels, labels), tuple("abcde"))
    config = settings(model="timm:vit_tiny_patch16_224", limit=None, data="noise", train_sizes="16@1,32@2")
    network = "--model timm:vit_tiny_patch16_224, made for 32x32: it does not take images [3, 16, 16] (it is made for 32x32"
    with pytest.raises(InputError, match="^" + re.escape(f"--train-sizes 16: {network}") + ": give such images"):
        new_run(config, data)


def test_sizes_above_that_of_the_data():
    with pytest.raises(InputError, match=f"^--train-sizes 32: the images of {MNIST} are 28x28: give square images, and sides of"):
        new_run(settings(**GROWING | {"train_sizes": "32@1"}))


def test_sizes_must_be_the_same_on_resume(tmp_path):
    config = helpers.expected_and_other(tmp_path, **GROWING)
    helpers.train_until_stopped(config, helpers.after(3, helpers.send))
    with pytest.raises(InputError, match="train_sizes: 12@1,20@2,28@4 -> None"):
        train(spat_train.Config(**vars(config) | {"train_sizes": None}))


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "torchvision:vit_b_32"])
def test_another_size_is_named(name):
    """A network that is made for one size says both, and no AssertionError comes through."""
    pytest.importorskip(name.partition(":")[0], exc_type=Exception)
    with torch.device("meta"):
        model = create(name, 5, (3, 32, 32)).eval()
        with pytest.raises(ValueError, match=r"does not take images \[3, 64, 64\] \(it is made for 32x32: give such images"):
            try_on(model, (3, 64, 64))


def test_images_that_are_too_small():
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = create("timm:inception_v3", 5, (3, 48, 48)).eval()
        with pytest.raises(ValueError, match=r"images \[3, 48, 48\] \(too small for it: give larger ones, or another network\):"):
            try_on(model, (3, 48, 48))


def test_any_size_has_no_such_hint():
    pytest.importorskip("timm")
    model = create("timm:test_vit", 5, (3, 32, 32)).eval()
    assert try_on(model, (3, 64, 64))[0] == 5
    with pytest.raises(ValueError, match=r"does not take images \[3, 28, 28\]: Input height \(28\) should be divisible"):
        try_on(model, (3, 28, 28))


@pytest.mark.parametrize("start", ["clean", "uniform"])
def test_apgd_is_the_training_attack(start):
    config = settings(attack="apgd", start=start, alpha=0.2, steps=3, eps=25.5)
    run = new_run(config)
    ((x, y), *_) = run.loader.epoch(0)
    generator = torch.Generator()
    images, nan_seen = training_attack(config)(run.model, x, y, generator.manual_seed(3))
    attack = APGD(0.1, loss=losses.lookup("lsce", alpha=0.2), steps=3, generator=generator.manual_seed(3))
    expected, _ = attack.launch(run.model, x, y, start=x if start == "clean" else None)
    assert torch.equal(images, expected)
    assert not torch.equal(images, x)
    assert not nan_seen.any()
    assert run.model.training


@pytest.mark.slow
def test_a_short_training_is_robust():
    """The settings of ImageNet's presets on 1,500 digits."""
    config = spat_train.Config(
        data=MNIST, model="small-cnn", eps=38.25, epochs=6, batch_size=50, optimizer="adamw", lr=3e-3, beta2=0.95,
        weight_decay=0.05, decay_norm=False, schedule="warmup-cosine", warmup=1.0, ema=0.95, label_smoothing=0.1, alpha=0.09,
        attack="apgd", steps=2, start="clean", holdout=0, test=False,
    )  # fmt: skip
    model = train(config, save=False).model
    assert spat_train.evaluate(model, load(MNIST).test, "pgd-20", eps=0.15).accuracy("pgd-20") > 60
