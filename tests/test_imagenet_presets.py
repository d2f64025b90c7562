"""The presets for ImageNet have the settings of the authors' code, which are written out here from there."""

import math

import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("tqdm")

from spat_train.models.registry import create
from spat_train.presets import PRESETS
from spat_train.training.check import check
from spat_train.training.optim import learning_rate

# nmndeep/revisiting-at, main.py and run_train.sh: `training`, `adv`, `lr` and `model` sections; epochs of its README
SINGH = {
    "attack": "apgd", "eps": 4.0, "steps": 2, "start": "clean", "bn_mode": "eval", "optimizer": "adamw", "momentum": 0.9,
    "beta2": 0.95, "weight_decay": 0.05, "decay_norm": False, "peak_lr": 1e-3, "schedule": "warmup-cosine", "ema": 0.9999,
    "label_smoothing": 0.1, "precision": "fp16", "image_size": 224, "batch_size": 8 * 80, "holdout": 0, "data": "imagenet",
    "layer_decay": None, "method": "madry",
}  # fmt: skip
# thu-ml/ares, robust_training/train_configs/*.yaml and the defaults of adversarial_training.py
ARES = {
    "attack": "pgd", "eps": 4.0, "steps": 3, "start": None, "bn_mode": "eval", "optimizer": "adamw", "momentum": 0.9,
    "beta2": 0.999, "weight_decay": 0.05, "decay_norm": False, "peak_lr": 5e-4, "schedule": "warmup-cosine", "ema": 0.9998,
    "label_smoothing": 0.1, "precision": "fp32", "image_size": 224, "batch_size": 8 * 64, "holdout": 0, "data": "imagenet",
    "layer_decay": None, "method": "madry", "warmup": 5, "epochs": 300,
}  # fmt: skip
LARGE = {"batch_size": 8 * 32, "peak_lr": 2.5e-4}  # lrb * batch size / 512
RESNET = {
    "optimizer": "sgd", "nesterov": True, "peak_lr": 0.2, "weight_decay": 1e-4, "epochs": 95, "schedule": "piecewise",
    "gamma": 0.1, "lr_drops": (31, 61, 91),
}  # fmt: skip
NONE, IMAGENET = ((0, 0, 0), (1, 1, 1)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NETWORKS = {  # network, its parameters (those of the authors' files, and timm's), normalisation before it, settings of its own
    "imagenet/convnext-t": ("timm:convnext_tiny", 28_589_128, NONE, {"epochs": 300, "warmup": 20}),
    "imagenet/convnext-t-convstem": ("convnext-t-convstem", 28_627_432, None, {"epochs": 300, "warmup": 20}),
    "imagenet/convnext-s-convstem": ("convnext-s-convstem", 50_261_992, None, {"epochs": 50, "warmup": 10}),
    "imagenet/convnext-b-convstem": ("convnext-b-convstem", 88_753_416, None, {"epochs": 300, "warmup": 20}),
    "imagenet/vit-s": ("timm:vit_small_patch16_224", 22_050_664, NONE, {"epochs": 300, "warmup": 20}),
    "imagenet/vit-s-convstem": ("vit-s-convstem", 22_777_576, IMAGENET, {"epochs": 300, "warmup": 20}),
    "imagenet/vit-b-convstem": ("vit-b-convstem", 87_147_112, None, {"epochs": 300, "warmup": 20}),
    "ares/convnext-s": ("timm:convnext_small", 50_223_688, IMAGENET, {}),
    "ares/convnext-b": ("timm:convnext_base", 88_591_464, IMAGENET, {}),
    "ares/convnext-l": ("timm:convnext_large", 197_767_336, IMAGENET, LARGE),
    "ares/vit-s": ("timm:vit_small_patch16_224", 22_050_664, IMAGENET, {}),
    "ares/vit-b": ("timm:vit_base_patch16_224", 86_567_656, IMAGENET, {}),
    "ares/swin-s": ("timm:swin_small_patch4_window7_224", 49_606_258, IMAGENET, {}),
    "ares/swin-b": ("timm:swin_base_patch4_window7_224", 87_768_224, IMAGENET, {}),
    "ares/swin-l": ("timm:swin_large_patch4_window7_224", 196_532_476, IMAGENET, LARGE),
    "ares/resnet-50": ("timm:resnet50", 25_557_032, IMAGENET, RESNET),
}


def test_all_are_here():
    names = {name.removesuffix("+spat") for name in PRESETS if name.startswith(("imagenet/", "ares/"))}
    assert names == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_settings_are_those_of_the_sources(name):
    network, _, _, own = NETWORKS[name]
    expected = (ARES if name.startswith("ares/") else SINGH) | own | {"model": network, "preset": name}
    c = PRESETS[name]
    check(c)
    assert {option: getattr(c, option) for option in expected} == expected
    assert c.alpha * 1000 / 999 == pytest.approx(0.1)  # the attack too is on the targets that timm's Mixup smoothed
    start, length = ("clean", 8) if name.startswith("imagenet/") else ("uniform", 8 / 3)  # APGD's first step is 2 eps
    assert c.attack_settings == pytest.approx((4 / 255, length / 255, expected["steps"], start))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("imagenet/")])
def test_spat_is_the_only_difference(name):
    ours, theirs = PRESETS[f"{name}+spat"].to_dict(), PRESETS[name].to_dict()
    assert {option for option in ours if ours[option] != theirs[option]} == {"alpha", "preset"}
    assert ours["alpha"] == 0.2


@pytest.mark.parametrize(("name", "warmup"), [("imagenet/convnext-t-convstem", 20), ("imagenet/convnext-s-convstem", 10)])
def test_rates_are_those_of_their_schedule(name, warmup):
    """`get_cosine_lr` of main.py at the ends of epochs, between which it goes on linearly; its warm-up begins at 1e-4 of lr."""
    c = PRESETS[name]
    for epoch in range(c.epochs):
        done = epoch + 1
        theirs = done / warmup if done <= warmup else (1 + math.cos(math.pi * (done - warmup) / (c.epochs - warmup))) / 2
        assert learning_rate(c, epoch, 1.0) == pytest.approx(1e-3 * theirs, abs=1e-3 * 1e-4), epoch


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    """Of the sizes and with the normalisation of the sources."""
    pytest.importorskip("timm")
    network, parameters, normalisation, _ = NETWORKS[name]
    c = PRESETS[name]
    with torch.device("meta"):
        model = create(c.model, 1000, (3, 224, 224), mean=c.mean, std=c.std)
    assert c.model == network
    assert sum(p.numel() for p in model.parameters()) == parameters
    if normalisation is None:
        assert not hasattr(model, "normalize")
    else:
        assert (c.mean, c.std) == normalisation
