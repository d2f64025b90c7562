"""The networks: those of the papers in the layout of their public checkpoints, timm's, and anybody's own, all by name.

A network takes images [B, C, H, W] in [0, 1] to logits [B, K]. Where it wants them normalised it does so itself (`Normalize`): an
attack's eps then always means pixels.
"""

import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.model_state.borrow import borrowed

from ..errors import first_line, is_out_of_memory


class Normalize(nn.Module):
    """(x - mean) / std per channel, to stand before a network: `nn.Sequential(OrderedDict(normalize=..., model=network))`.

    Both are in the state dict, since weights are right for one normalisation only.

    Args:
        mean, std: one number for each channel, std positive.

    Raises:
        ValueError: they are not.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean={mean}, std={std}: give each channel one number in both, positive in std")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, C, H, W]."""
        return (x - self.mean) / self.std


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm, the last two of stride 2, and a linear classifier.

    Args:
        image_shape: (C, H, W) of one image, H and W at least 8.
        num_classes: K.
        width: channels of the first convolution, doubled by each of the next two.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int = 16):
        super().__init__()
        channels, height, image_width = image_shape
        layers = []
        for out_channels, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            layers += [
                nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
            ]
            channels, height, image_width = out_channels, -(-height // stride), -(-image_width // stride)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * image_width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] -> logits [B, K]."""
        # Centred, because all-positive inputs make the first layer slow to train.
        return self.classifier(self.features(2 * x - 1).flatten(1))


class MnistCNN(nn.Module):
    """Madry et al.'s network for MNIST (arXiv 1706.06083): two 5x5 convolutions, each max-pooled, and two dense layers.

    PyTorch's initialisation: with that of their code, N(0, 0.1), 2,000 images and 500 steps are not enough to begin to learn.
    3,274,634 parameters for MNIST.

    Args:
        image_shape: (C, H, W) of one image, H and W divisible by 4.
        num_classes: K.
        scale: 2 and 4 filters and 64 units, times this: their Figure 4 goes from 1 to 16, the network of their Table 1.

    Raises:
        ValueError: H or W is not divisible by 4.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10, scale: int = 16):
        super().__init__()
        channels, height, width = image_shape
        if height % 4 or width % 4:
            raise ValueError(f"image_shape={image_shape}: mnist-cnn halves images twice: pad them to sides divisible by 4")
        self.features = nn.Sequential(
            nn.Conv2d(channels, 2 * scale, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * scale, 4 * scale, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.fc1 = nn.Linear(4 * scale * (height // 4) * (width // 4), 64 * scale)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(64 * scale, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.fc2(self.relu(self.fc1(self.features(x).flatten(1))))


class MnistB(nn.Module):
    """Architecture B of Tramèr et al. for MNIST (arXiv 1705.07204, Appendix A), from which Madry et al. attack in the black box.

    Args:
        image_shape: (C, H, W) of one image, at least 28x28.
        num_classes: K.

    Raises:
        ValueError: the images are too small for its convolutions.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        channels, *sides = image_shape
        left = [(side // 2 - 6) // 2 + 1 - 4 for side in sides]
        if min(left) < 1:
            raise ValueError(f"image_shape={image_shape}: mnist-b needs images of at least 28x28")
        self.features = nn.Sequential(
            nn.Dropout(0.2),
            nn.Conv2d(channels, 64, 8, stride=2, padding=3),
            nn.ReLU(),
            nn.Conv2d(64, 128, 6, stride=2),
            nn.ReLU(),
            nn.Conv2d(128, 128, 5),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        self.fc = nn.Linear(128 * left[0] * left[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.fc(self.features(x).flatten(1))


class TradesCNN(nn.Module):
    """TRADES' network for MNIST (its code calls it SmallCNN): four 3x3 convolutions, two max-pools and three dense layers.

    Parameters have the names of its public checkpoint. PyTorch's initialisation.

    Args:
        image_shape: (C, H, W) of one image, at least 16x16.
        num_classes: K.

    Raises:
        ValueError: the images are too small for its convolutions.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10):
        super().__init__()
        channels, *sides = image_shape
        left = [((side - 4) // 2 - 4) // 2 for side in sides]
        if min(left) < 1:
            raise ValueError(f"image_shape={image_shape}: mnist-trades needs images of at least 16x16")
        self.feature_extractor = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(channels, 32, 3), relu1=nn.ReLU(), conv2=nn.Conv2d(32, 32, 3), relu2=nn.ReLU(),
            maxpool1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(32, 64, 3), relu3=nn.ReLU(), conv4=nn.Conv2d(64, 64, 3), relu4=nn.ReLU(),
            maxpool2=nn.MaxPool2d(2),
        ))  # fmt: skip
        self.classifier = nn.Sequential(OrderedDict(
            fc1=nn.Linear(64 * left[0] * left[1], 200), relu1=nn.ReLU(), drop=nn.Dropout(0.5),
            fc2=nn.Linear(200, 200), relu2=nn.ReLU(), fc3=nn.Linear(200, num_classes),
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self.classifier(self.feature_extractor(x).flatten(1))


class WideBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input; where the channels change, to a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.dropout = dropout
        changes = in_channels != out_channels
        self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.relu2(self.bn2(self.conv1(out)))
        if self.dropout:
            out = F.dropout(out, self.dropout, self.training)
        return shortcut + self.conv2(out)


class WideResNet(nn.Module):
    """WRN-depth-widen_factor (Zagoruyko and Komodakis, arXiv 1605.07146), as TRADES and MART train it on 32x32 images.

    Parameters have the names of the TRADES and MART checkpoints, without those of `sub_block1`, which no forward of theirs uses.
    Other sizes of images are pooled globally as well, where that code always pools 8x8.

    Args:
        depth: 6n + 4 layers, n blocks in each of three groups.
        widen_factor: k; the groups have 16k, 32k and 64k channels.
        num_classes: K.
        dropout: probability between the two convolutions of a block.
        channels: C of the images.

    Raises:
        ValueError: depth is not 6n + 4 with n >= 1.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 10, dropout: float = 0.0, channels: int = 3):
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth={depth}: give 6n + 4 with n at least 1, such as 10, 16, 28 or 34")
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]

        def group(number: int) -> nn.Module:
            ins, outs = widths[number - 1], widths[number]
            first = WideBlock(ins, outs, 1 if number == 1 else 2, dropout)
            rest = [WideBlock(outs, outs, 1, dropout) for _ in range(blocks - 1)]
            return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *rest)))

        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.block1, self.block2, self.block3 = group(1), group(2), group(3)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.relu(self.bn1(out))
        return self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input; where the shape changes, to a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(self.relu2(self.bn2(self.conv1(out))))
        return out + shortcut


class RawPreActBlock(PreActBlock):
    """The same with a 1x1 convolution of the input itself, which has not been through BN and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = self.conv1(self.relu1(self.bn1(x)))
        return self.conv2(self.relu2(self.bn2(out))) + shortcut


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 (He et al., arXiv 1603.05027) for small images, with the BatchNorm that ends the last group.

    block          | its 1x1 shortcuts read | as in the code of
    PreActBlock    | relu(bn1(x))           | "Overfitting in adversarially robust deep learning"
    RawPreActBlock | x                      | "Fast is better than free"

    The state dicts of both are alike, the functions are not.

    Args:
        num_classes: K.
        channels: C of the images.
        block: one of the two. None is a PreActBlock that takes no weights from files that leave open which they are for.
    """

    def __init__(self, num_classes: int = 10, channels: int = 3, block: type[PreActBlock] | None = None):
        super().__init__()
        self.block = block

        def group(ins: int, outs: int, stride: int) -> nn.Module:
            kind = block or PreActBlock
            return nn.Sequential(kind(ins, outs, stride), kind(outs, outs, 1))

        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.layer1, self.layer2 = group(64, 64, 1), group(64, 128, 2)
        self.layer3, self.layer4 = group(128, 256, 2), group(256, 512, 2)
        self.bn = nn.BatchNorm2d(512)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(self.relu(self.bn(out)), 1).flatten(1))


def resnet(depth: int, num_classes: int = 10, channels: int = 3, stem: str = "cifar") -> nn.Module:
    """torchvision's ResNet (He et al., arXiv 1512.03385) of 18 or 50 layers with a stem that fits the images.

    stem     | first convolution | max-pool | ResNet-18 at 96x96 | as in
    cifar    | 3x3               |          | 10.0 GFLOP         | public code for CIFAR
    stl10    | 3x3               | 3x3 / 2  |  2.5 GFLOP         | W-MSE (arXiv 2007.06346) on STL-10 and Tiny ImageNet
    imagenet | 7x7 / 2           | 3x3 / 2  |  0.7 GFLOP         | ImageNet

    Images [B, C, H, W] -> logits [B, K]. The state dicts of "cifar" and "stl10" are alike, the functions are not.
    """
    torchvision = _package("torchvision", f"resnet-{depth}")
    model = getattr(torchvision.models, f"resnet{depth}")(num_classes=num_classes)
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    model.conv1 = nn.Conv2d(channels, 64, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem == "cifar":
        model.maxpool = nn.Identity()
    return model


# ---- by name ----------------------------------------------------------------------------------------------------------------

PREACTS = {"preactresnet-18": None, "preactresnet-18/activated": PreActBlock, "preactresnet-18/raw": RawPreActBlock}
NAMES = (
    "wrn-34-10", "wrn-28-10", *PREACTS, "resnet-18", "resnet-50", "mnist-cnn", "mnist-b", "mnist-trades", "small-cnn",
)  # fmt: skip
STEMS = ("cifar", "stl10", "imagenet")
IMAGENET_SIDE = 128  # from here on the stem halves the image twice

# Smooth activations: arXiv 2006.14536 (softplus with beta 10, near ReLU) and arXiv 2010.00467.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": partial(nn.Softplus, beta=10),
}


def create(
    name: str,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    *,
    activation: str = "relu",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """The network called `name`, newly initialised: images [B, *image_shape] in [0, 1] -> logits [B, num_classes].

    Args:
        name: one of
            "wrn-DEPTH-WIDTH", such as "wrn-34-10";
            "preactresnet-18/activated" (the same as "preactresnet-18"), "preactresnet-18/raw": by what the 1x1 shortcuts read
                (see `PreActResNet18`);
            "resnet-18", "resnet-50": with the CIFAR stem for images below 128x128 (STL-10's 96x96 included), with the ImageNet
                stem from there on; "/cifar", "/stl10" or "/imagenet" after the name picks one (see `resnet`);
            "mnist-cnn": Madry's, also with "/1" to "/16" for its width (see `MnistCNN`); "mnist-b": Tramèr's B; "mnist-trades":
                that of TRADES; "small-cnn": the demo's;
            "package.module:factory": factory(num_classes=K) of an importable module, one in the current directory included;
            "timm:NAME": a model of timm, not pretrained, with the normalisation of its own configuration before it.
        num_classes: K, at least 2.
        image_shape: (C, H, W) of one image.
        activation: what takes the place of every `nn.ReLU` module: "relu", "silu", "gelu" or "softplus" (with beta 10).
        mean, std: those of a `Normalize` before the network, a number for each channel; in place of timm's own.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and the remedy.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: give at least 2")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape={image_shape}: give (channels, height, width)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: give {_alternatives(ACTIVATIONS)}")
    channels, height, width = image_shape
    model = _create(name, num_classes, (channels, height, width))
    if activation != "relu":
        _replace_relus(model, name, activation)
    network = model.get_submodule("model") if name.startswith("timm:") else model
    network.made_as = (full_name(name, image_shape), activation, image_shape)  # type: ignore[assignment]  # what a run's config is compared with
    if mean is not None or std is not None:
        model = normalized(network, mean, std, channels)
    return model


def full_name(name: str, image_shape: Sequence[int]) -> str:
    """`name` with what it leaves open: the shortcut of a PreActResNet, the stem of a ResNet, which goes by the images."""
    if name in ("resnet-18", "resnet-50"):
        return f"{name}/{'imagenet' if min(image_shape[1:]) >= IMAGENET_SIDE else 'cifar'}"
    return {"preactresnet-18": "preactresnet-18/activated", "mnist-cnn": "mnist-cnn/16"}.get(name, name)


def normalized(model: nn.Module, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int) -> nn.Module:
    """`model` with a `Normalize` before it.

    Raises:
        ValueError: one of the two is missing, or they do not fit images of `channels` in [0, 1].
    """
    if mean is None or std is None or len(mean) != channels or not all(0 <= m <= 1 for m in mean):
        raise ValueError(f"mean={mean}, std={std}: give both one number a channel ({channels}), for images in [0, 1]")
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))


def try_on(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    num_classes: int | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    dtype: torch.dtype = torch.float32,
    *,
    differentiate: bool = False,
) -> tuple[int, torch.memory_format]:
    """Two images of `dtype` through `model`, in the mode and on the device that it is in.

    Returns:
        tuple: the number of classes, and the format of the images that the model takes: `memory_format`, or contiguous where
            it fails on that one, as code with `x.view(B, -1)` on a feature map does.

    Raises:
        ValueError: it does not take such images, or does not return logits of `num_classes` (None: of two or more); or, where
            it is to `differentiate` them, cannot.
    """
    x = torch.zeros(2, *image_shape, device=device_of(model), dtype=dtype)
    try:
        return _classes(model, x.to(memory_format=memory_format), num_classes, differentiate), memory_format
    except ValueError:
        if memory_format == torch.contiguous_format:
            raise
    return _classes(model, x, num_classes, differentiate), torch.contiguous_format


def _classes(model: nn.Module, x: Tensor, num_classes: int | None, differentiate: bool) -> int:
    """What `try_on` tries."""
    lazy = any(map(is_lazy, [*model.parameters(), *model.buffers()]))  # then this makes its weights
    try:
        with torch.no_grad(), contextlib.nullcontext() if lazy else borrowed(model, "keep"):
            logits = model(x)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise ValueError(f"it does not take images {list(x.shape[1:])}: {first_line(error)}") from error
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if isinstance(found, str) or len(found) != 2 or found[0] != 2 or found[1] < 2 or found[1] != (num_classes or found[1]):
        told = list(found) if isinstance(found, tuple) else found
        raise ValueError(f"two images give {told}: it must return logits [2, {num_classes or 'K'}]")
    if differentiate:
        try:
            with torch.inference_mode(False), torch.no_grad(), borrowed(model, "keep"):
                gradient = InputGradient(model)
                gradient.backward(gradient.forward(x))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"autograd fails on it: {first_line(error)}") from error
    return found[1]


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


def _create(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    channels = image_shape[0]
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), num_classes, image_shape)
    if ":" in name:
        return _own(name, num_classes)
    if wide := re.fullmatch(r"wrn-(\d+)-([1-9]\d*)", name):
        return WideResNet(int(wide[1]), int(wide[2]), num_classes, channels=channels)
    if residual := re.fullmatch(rf"resnet-(18|50)/({'|'.join(STEMS)})", full_name(name, image_shape)):
        return resnet(int(residual[1]), num_classes, channels, residual[2])
    if name in PREACTS:
        return PreActResNet18(num_classes, channels, PREACTS[name])
    if madry := re.fullmatch(r"mnist-cnn/([1-9]\d*)", full_name(name, image_shape)):
        return MnistCNN(image_shape, num_classes, int(madry[1]))
    if name == "mnist-b":
        return MnistB(image_shape, num_classes)
    if name == "mnist-trades":
        return TradesCNN(image_shape, num_classes)
    if name == "small-cnn":
        return SmallCNN(image_shape, num_classes)
    raise ValueError(
        f"name={name!r}: there is no such model{_nearest(name, NAMES)}: give wrn-DEPTH-WIDTH (such as wrn-34-10), "
        "preactresnet-18 (also with /activated or /raw), resnet-18 or resnet-50 (also with /cifar, /stl10 or /imagenet), "
        "mnist-cnn (also with /WIDTH), mnist-b, mnist-trades, small-cnn, timm:NAME or package.module:factory"
    )


def _timm(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    timm = _package("timm", f"timm:{name}")
    if not timm.is_model(name):
        nearest = _nearest(name, timm.list_models())
        raise ValueError(f"name='timm:{name}': timm {timm.__version__} has no such model{nearest}: see timm.list_models()")
    channels, *size = image_shape
    try:
        # Models with position embeddings and the like have to be told the size of the images.
        told = {"img_size": tuple(size)} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        model = timm.create_model(name, num_classes=num_classes, in_chans=channels, **told)
    except Exception as error:
        raise ValueError(
            f"name='timm:{name}': timm cannot make it for num_classes={num_classes}, image_shape={image_shape} "
            f"({first_line(error)}): give another model"
        ) from error
    mean, std = (list(model.default_cfg[key]) for key in ("mean", "std"))
    if len(mean) != channels:  # grey images and the like: the average channel
        mean, std = ([sum(values) / len(values)] * channels for values in (mean, std))
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), model=model))


def import_own(name: str) -> ModuleType | None:
    """The module of "package.module:factory", which may register losses; None for other names.

    Raises:
        ValueError: it cannot be imported.
    """
    module_name, colon, _ = name.partition(":")
    if not colon or module_name == "timm":
        return None
    with _working_directory_importable():
        try:
            return importlib.import_module(module_name)
        except Exception as error:  # whatever a module's own code raises
            raise ValueError(
                f"name={name!r}: {module_name!r} cannot be imported ({first_line(error)}): "
                "give package.module:factory, installed or in the current directory"
            ) from error


def _own(name: str, num_classes: int) -> nn.Module:
    """What factory(num_classes=K) of "package.module:factory" returns; errors inside the factory are its own."""
    module, (module_name, _, attribute) = import_own(name), name.partition(":")
    with _working_directory_importable():
        if not callable(factory := getattr(module, attribute, None)):
            public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
            raise ValueError(
                f"name={name!r}: {module_name} has no function or class {attribute!r}{_nearest(attribute, public)}: "
                "give package.module:factory"
            )
        try:
            inspect.signature(factory).bind(num_classes=num_classes)
        except TypeError as error:
            raise ValueError(
                f"name={name!r}: {attribute} cannot be called as {attribute}(num_classes={num_classes}) ({error}): "
                "give it the parameter num_classes, and the others defaults"
            ) from error
        except ValueError:  # no signature to look at
            pass
        model = factory(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"name={name!r}: {attribute} returns {type(model).__name__}: return a torch.nn.Module")
    return model


@contextlib.contextmanager
def _working_directory_importable():
    """As under `python -m`, for as long as this lasts."""
    directory = os.getcwd()
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module may have removed it
            sys.path.remove(directory)


def _package(package: str, name: str):
    """An optional package that model `name` needs."""
    try:
        return importlib.import_module(package)
    except Exception as error:  # builds for another torch fail in many ways
        raise ValueError(
            f"name={name!r}: it needs {package}, which cannot be imported ({first_line(error)}): pip install {package}"
        ) from error


def _replace_relus(model: nn.Module, name: str, activation: str) -> None:
    # Not named_children(), which leaves out the second of two names for one module.
    places = [(m, at) for m in model.modules() for at, child in m._modules.items() if isinstance(child, nn.ReLU)]
    if not places:
        raise ValueError(
            f"activation={activation!r}: {name} has no nn.ReLU module to replace: give 'relu', which keeps it as it is"
        )
    for m, at in places:
        setattr(m, at, ACTIVATIONS[activation]())


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f" (did you mean {_alternatives(near)}?)" if near else ""


def _alternatives(names) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
