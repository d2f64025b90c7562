"""The networks: the demo's, and those that papers train on CIFAR-sized images, in the layout of the public checkpoints."""

import re
from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


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
    """WRN-depth-widen_factor (Zagoruyko and Komodakis, arXiv 1605.07146) for 32x32 images, as TRADES and MART train it.

    Parameters have the names of the TRADES and MART checkpoints, without those of `sub_block1`, which no forward of theirs uses.

    Args:
        depth: 6n + 4 layers, n blocks in each of three groups.
        widen_factor: k; the groups have 16k, 32k and 64k channels.
        num_classes: K.
        dropout: probability between the two convolutions of a block.

    Raises:
        ValueError: depth is not 6n + 4 with n >= 1.
    """

    def __init__(self, depth: int, widen_factor: int, num_classes: int = 10, dropout: float = 0.0):
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

        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1, self.block2, self.block3 = group(1), group(2), group(3)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] -> logits [B, K]."""
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.relu(self.bn1(out))
        return self.fc(F.avg_pool2d(out, 8).flatten(1))


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input; where the shape changes, to a 1x1 convolution of the activated input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 (He et al., arXiv 1603.05027) for 32x32 images, with the BatchNorm that ends the last group."""

    def __init__(self, num_classes: int = 10):
        super().__init__()

        def group(ins: int, outs: int, stride: int) -> nn.Module:
            return nn.Sequential(PreActBlock(ins, outs, stride), PreActBlock(outs, outs, 1))

        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1, self.layer2 = group(64, 64, 1), group(64, 128, 2)
        self.layer3, self.layer4 = group(128, 256, 2), group(256, 512, 2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, 32, 32] -> logits [B, K]."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.avg_pool2d(F.relu(self.bn(out)), 4).flatten(1))


def resnet18(num_classes: int = 10) -> nn.Module:
    """ResNet-18 (He et al., arXiv 1512.03385) for small images [B, 3, H, W]: torchvision's, with a 3x3 stem and no max-pool."""
    return _small_images("resnet18", num_classes)


def resnet50(num_classes: int = 10) -> nn.Module:
    """ResNet-50 for small images, as `resnet18`."""
    return _small_images("resnet50", num_classes)


def _small_images(name: str, num_classes: int) -> nn.Module:
    import torchvision  # here, since the other networks do without

    model = getattr(torchvision.models, name)(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


NAMED: dict[str, Callable[[int], nn.Module]] = {
    "preactresnet-18": PreActResNet18,
    "resnet-18": resnet18,
    "resnet-50": resnet50,
}


def create(name: str, num_classes: int = 10) -> nn.Module:
    """The network called `name`: "wrn-DEPTH-WIDTH", such as "wrn-34-10", "preactresnet-18", "resnet-18" or "resnet-50".

    Raises:
        ValueError: there is no such network; the message lists the names.
    """
    if wide := re.fullmatch(r"wrn-(\d+)-([1-9]\d*)", name):
        return WideResNet(int(wide[1]), int(wide[2]), num_classes)
    if name not in NAMED:
        raise ValueError(f"no model is called {name!r}: give wrn-DEPTH-WIDTH (such as wrn-34-10), {' or '.join(sorted(NAMED))}")
    return NAMED[name](num_classes)
