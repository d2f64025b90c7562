"""DeepMind's pre-activation networks for adversarial training: a WideResNet and a ResNet-18, with SiLU.

They are those of Gowal et al. (arXiv 2010.03593), Rebuffi et al. (arXiv 2103.01946) and Wang et al. (arXiv 2302.04638), and
parameters have the names of the public checkpoints. Unlike in the other WideResNets and PreActResNets, a 3x3 convolution of
stride 2 pads on the right and at the bottom only, as TensorFlow's SAME does where sides are even.

Their networks normalise images inside, by a mean and std that the files do not hold: give both, or name RobustBench's entry.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from . import ImageShape, register

MakeActivation = Callable[[], nn.Module]
ACTIVATIONS: dict[str, MakeActivation] = {"silu": nn.SiLU, "relu": nn.ReLU}


def _pad(stride: int) -> nn.Module:
    return nn.Identity() if stride == 1 else nn.ZeroPad2d((0, 1, 0, 1))


def _conv3x3(ins: int, outs: int, stride: int = 1) -> nn.Conv2d:
    """It reads what `_pad(stride)` gives."""
    return nn.Conv2d(ins, outs, 3, stride=stride, padding=1 if stride == 1 else 0, bias=False)


class WideBlock(nn.Module):
    """BN-activation-conv twice, added to the input; where the channels change, to a 1x1 convolution of the activated input."""

    def __init__(self, ins: int, outs: int, stride: int, activation: MakeActivation):
        super().__init__()
        self.batchnorm_0, self.relu_0 = nn.BatchNorm2d(ins), activation()
        self.pad, self.conv_0 = _pad(stride), _conv3x3(ins, outs, stride)
        self.batchnorm_1, self.relu_1 = nn.BatchNorm2d(outs), activation()
        self.conv_1 = _conv3x3(outs, outs)
        self.shortcut = nn.Conv2d(ins, outs, 1, stride=stride, bias=False) if ins != outs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu_0(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return shortcut + self.conv_1(self.relu_1(self.batchnorm_1(self.conv_0(self.pad(out)))))


class PreActBlock(nn.Module):
    """BN-activation-conv twice, added to the input; where the shape changes, to a 3x3 convolution of the input itself."""

    def __init__(self, ins: int, outs: int, stride: int, activation: MakeActivation):
        super().__init__()
        self.batchnorm_0, self.relu_0 = nn.BatchNorm2d(ins), activation()
        self.pad, self.conv_2d_1 = _pad(stride), _conv3x3(ins, outs, stride)
        self.batchnorm_1, self.relu_1 = nn.BatchNorm2d(outs), activation()
        self.conv_2d_2 = _conv3x3(outs, outs)
        self.shortcut = _conv3x3(ins, outs, stride) if stride != 1 or ins != outs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d_1(self.pad(self.relu_0(self.batchnorm_0(x))))
        shortcut = x if self.shortcut is None else self.shortcut(self.pad(x))
        return shortcut + self.conv_2d_2(self.relu_1(self.batchnorm_1(out)))


def _group(block: type[nn.Module], blocks: int, ins: int, outs: int, stride: int, activation: MakeActivation) -> nn.Sequential:
    first = block(ins, outs, stride, activation)
    return nn.Sequential(first, *(block(outs, outs, 1, activation) for _ in range(blocks - 1)))


class DMNetwork(nn.Module):
    """What both have behind their blocks: BN, the activation, global pooling and `logits`."""

    def __init__(self, features: int, num_classes: int, activation: MakeActivation):
        super().__init__()
        self.batchnorm, self.relu = nn.BatchNorm2d(features), activation()
        self.logits = nn.Linear(features, num_classes)

    def _initialise(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)

    def _head(self, x: Tensor) -> Tensor:
        return self.logits(F.adaptive_avg_pool2d(self.relu(self.batchnorm(x)), 1).flatten(1))


class DMWideResNet(DMNetwork):
    """WRN-depth-width, in three groups of 16k, 32k and 64k channels.

    Args:
        depth: 6n + 4 layers, n blocks in each group.
        width: k.
        num_classes: K.
        channels: C of the images.
        activation: makes one.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10, channels: int = 3, activation: MakeActivation = nn.SiLU):
        super().__init__(64 * width, num_classes, activation)
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth={depth}: give 6n + 4 with n at least 1, such as 10, 16, 28 or 70")
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.init_conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)

        def group(number: int) -> nn.Module:
            blocks_of = _group(WideBlock, blocks, widths[number - 1], widths[number], 1 if number == 1 else 2, activation)
            return nn.Sequential(OrderedDict(block=blocks_of))

        self.layer = nn.Sequential(group(1), group(2), group(3))
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self._head(self.layer(self.init_conv(x)))


class DMPreActResNet18(DMNetwork):
    """Pre-activation ResNet-18, in four groups of 64, 128, 256 and 512 channels; see `DMWideResNet`."""

    def __init__(self, num_classes: int = 10, channels: int = 3, activation: MakeActivation = nn.SiLU):
        super().__init__(512, num_classes, activation)
        self.conv_2d = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.layer_0 = _group(PreActBlock, 2, 64, 64, 1, activation)
        self.layer_1 = _group(PreActBlock, 2, 64, 128, 2, activation)
        self.layer_2 = _group(PreActBlock, 2, 128, 256, 2, activation)
        self.layer_3 = _group(PreActBlock, 2, 256, 512, 2, activation)
        self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        return self._head(self.layer_3(self.layer_2(self.layer_1(self.layer_0(self.conv_2d(x))))))


@register(
    "dm-wrn-DEPTH-WIDTH (such as dm-wrn-28-10, also with /silu or /relu)",
    r"dm-wrn-(?P<depth>\d{1,3})-(?P<width>[1-9]\d{0,2})(?:/(?P<activation>silu|relu))?",
    names=("dm-wrn-28-10", "dm-wrn-70-16"),
    variant="silu",
)
def _dm_wide_resnet(num_classes: int, image_shape: ImageShape, depth: int, width: int, activation: str = "silu") -> nn.Module:
    return DMWideResNet(depth, width, num_classes, image_shape[0], ACTIVATIONS[activation])


@register(
    "dm-preactresnet-18 (also with /silu or /relu)",
    r"dm-preactresnet-18(?:/(?P<activation>silu|relu))?",
    names=("dm-preactresnet-18",),
    variant="silu",
)
def _dm_preact_resnet(num_classes: int, image_shape: ImageShape, activation: str = "silu") -> nn.Module:
    return DMPreActResNet18(num_classes, image_shape[0], ACTIVATIONS[activation])
