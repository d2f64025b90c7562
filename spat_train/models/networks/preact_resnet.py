"""Pre-activation ResNets: one layout of weights, two functions."""

import torch.nn.functional as F
from torch import Tensor, nn

from . import ImageShape, register


class PreActBlock(nn.Module):
    """BN-ReLU-conv twice, added to the input; where the shape changes, to a 1x1 convolution of the activated input."""

    raw = False

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
        shortcut = x if self.shortcut is None else self.shortcut(x if self.raw else out)
        return self.conv2(self.relu2(self.bn2(self.conv1(out)))) + shortcut


class RawPreActBlock(PreActBlock):
    """The same with a 1x1 convolution of the input itself, which has not been through BN and ReLU."""

    raw = True


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 (He et al., arXiv 1603.05027) for small images.

    block          | its 1x1 shortcuts read | as in the code of
    PreActBlock    | relu(bn1(x))           | "Overfitting in adversarially robust deep learning"
    RawPreActBlock | x                      | "Fast is better than free"

    The state dicts of both are alike, the functions are not.

    Args:
        num_classes: K.
        channels: C of the images.
        block: one of the two. None is a PreActBlock that takes no weights from files that leave open which they are for.
        last_norm: whether BatchNorm and ReLU end the last group, as they do but in the first public networks of "Fast is better
            than free".
    """

    def __init__(self, num_classes: int = 10, channels: int = 3, block: type[PreActBlock] | None = None, last_norm: bool = True):
        super().__init__()
        self.block = block

        def group(ins: int, outs: int, stride: int) -> nn.Module:
            kind = block or PreActBlock
            return nn.Sequential(kind(ins, outs, stride), kind(outs, outs, 1))

        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.layer1, self.layer2 = group(64, 64, 1), group(64, 128, 2)
        self.layer3, self.layer4 = group(128, 256, 2), group(256, 512, 2)
        self.bn = nn.BatchNorm2d(512) if last_norm else nn.Identity()
        self.relu = nn.ReLU() if last_norm else nn.Identity()
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, K]."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.adaptive_avg_pool2d(self.relu(self.bn(out)), 1).flatten(1))


@register(
    "preactresnet-18 (also with /activated, /raw or /raw-no-bn)",
    "preactresnet-18(?:/(?P<shortcut>activated|raw|raw-no-bn))?",
    names=("preactresnet-18", "preactresnet-18/activated", "preactresnet-18/raw", "preactresnet-18/raw-no-bn"),
    variant="activated",
)
def _preact_resnet(num_classes: int, image_shape: ImageShape, shortcut: str | None = None) -> nn.Module:
    blocks = {None: None, "activated": PreActBlock, "raw": RawPreActBlock, "raw-no-bn": RawPreActBlock}
    return PreActResNet18(num_classes, image_shape[0], blocks[shortcut], last_norm=shortcut != "raw-no-bn")
