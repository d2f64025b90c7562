"""WideResNets, in the layout of the public checkpoints of TRADES and MART."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from . import ImageShape, register


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


@register(
    "wrn-DEPTH-WIDTH (such as wrn-34-10)", r"wrn-(?P<depth>\d{1,3})-(?P<width>[1-9]\d{0,2})", names=("wrn-34-10", "wrn-28-10")
)
def _wide_resnet(num_classes: int, image_shape: ImageShape, depth: int, width: int) -> nn.Module:
    return WideResNet(depth, width, num_classes, channels=image_shape[0])
