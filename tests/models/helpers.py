"""Networks with telling weights, files of them, and what a refused load must leave alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spat_train.config import Config
from spat_train.errors import InputError
from spat_train.models import Normalize, create
from spat_train.models.checkpoints import load_checkpoint
from spat_train.runtime.run_folder import FORMAT

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
CIFAR = SimpleNamespace(name="cifar10", num_classes=10, image_shape=(3, 32, 32), all_classes=True)
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def build(name: str, *args, **options) -> nn.Module:
    """`create`; skips the test where a package is missing, or is one for another torch."""
    packages = {"resnet": "torchvision", "torchvision": "torchvision"} | dict.fromkeys(("timm", "convnext", "vit"), "timm")
    for prefix, package in packages.items():
        if name.startswith(prefix):
            pytest.importorskip(package, reason=f"needs {package}", exc_type=Exception)
    return create(name, *args, **options)


def logits_shape(name: str, image_shape, num_classes: int = 10, **kwargs):
    """That of two images; without values, so it is quick."""
    with torch.device("meta"):
        return tuple(build(name, num_classes, image_shape, **kwargs).eval()(torch.empty(2, *image_shape)).shape)


def network(name: str = "wrn-10-1", seed: int = 1, **options) -> nn.Module:
    """In eval mode; no two seeds share an entry of the state dict, and each entry matters."""
    torch.manual_seed(seed)
    model = build(name, **options).eval()
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.random_(1000)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.3)
        elif value.ndim == 1:
            value.uniform_(0.5, 2)
    return model


def normalized(model: nn.Module) -> nn.Module:
    return nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), model)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def numbers(mean: str, std: str, shape=(1, 3, 1, 1)) -> dict:
    return {mean: torch.tensor(MEAN).view(shape), std: torch.tensor(STD).view(shape)}


def saved(tmp_path, content, name: str = "weights.pt", **options):
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


def own(tmp_path, net: nn.Module, file: str = "own.pt", **options):
    """A checkpoint as a run with these options writes it."""
    content = {"format": FORMAT, "config": Config(**options).to_dict(), "model": net.state_dict(), "ema": None}
    return saved(tmp_path, content, file)


def same(model: nn.Module, state: dict) -> bool:
    ours = model.state_dict()
    return ours.keys() == state.keys() and all(ours[name].is_meta or torch.equal(ours[name], state[name]) for name in ours)


def refusal(model: nn.Module, path, **options) -> str:
    """The one-line message of a load that fails; the model is as before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_checkpoint(model, path, **options)
    assert same(model, before)
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path}: ") or "no run writes such a config" in message
    assert "\n" not in message
    return message
