"""torchvision's ResNets, with a stem that fits the images."""

from torch import nn

from ..external import import_package
from . import ImageShape, register

IMAGENET_SIDE = 128  # from here on the stem halves the image twice


def _usual_stem(image_shape: ImageShape) -> str:
    return "imagenet" if min(image_shape[1:]) >= IMAGENET_SIDE else "cifar"


@register(
    "resnet-18 or resnet-50 (also with /cifar, /stl10 or /imagenet)",
    r"resnet-(?P<depth>18|50)(?:/(?P<stem>cifar|stl10|imagenet))?",
    names=("resnet-18", "resnet-50"),
    variant=_usual_stem,
)
def resnet(depth: int, num_classes: int, image_shape: ImageShape, stem: str | None = None) -> nn.Module:
    """torchvision's ResNet (He et al., arXiv 1512.03385) of 18 or 50 layers with a stem that fits the images.

    stem     | first convolution | max-pool | ResNet-18 at 96x96 | as in
    cifar    | 3x3               |          | 10.0 GFLOP         | public code for CIFAR
    stl10    | 3x3               | 3x3 / 2  |  2.5 GFLOP         | W-MSE (arXiv 2007.06346) on STL-10 and Tiny ImageNet
    imagenet | 7x7 / 2           | 3x3 / 2  |  0.7 GFLOP         | ImageNet

    Without a stem, images of 128x128 and more get that of ImageNet, smaller ones CIFAR's.

    Images [B, C, H, W] -> logits [B, K]. The state dicts of "cifar" and "stl10" are alike, the functions are not.
    """
    torchvision = import_package("torchvision", f"resnet-{depth}")
    model = getattr(torchvision.models, f"resnet{depth}")(num_classes=num_classes)
    stem = stem or _usual_stem(image_shape)
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    model.conv1 = nn.Conv2d(image_shape[0], 64, kernel, stride=stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if stem == "cifar":
        model.maxpool = nn.Identity()
    return model
