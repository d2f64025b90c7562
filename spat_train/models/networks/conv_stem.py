"""timm's ConvNeXt and ViT with a convolutional stem (Singh, Croce and Hein, NeurIPS 2023, arXiv 2303.01870).

The stem takes the place of the patches: 3x3 convolutions, each with LayerNorm over its channels and GELU, of half the resolution
where the network's own patches have a quarter or a sixteenth of it. Names of parameters are those of the authors' checkpoints.
"""

from torch import Tensor, nn

from ..external import import_package
from . import ImageShape, register

NEXT = {"t": ("tiny", (48, 96), (2, 2)), "s": ("small", (48, 96), (2, 2)), "b": ("base", (64, 96, 128), (2, 2, 1))}
NEXT["l"] = ("large", (96, 144, 192), (2, 2, 1))
VIT = {"s": ("small", 384), "b": ("base", 768)}
VIT_WIDTHS = (48, 96, 192, 384)
PATCH = 16  # pixels a token in each direction


class ConvStem(nn.Module):
    """Images [B, C, H, W] -> features [B, widths[-1] or `dim`, h, w], where a stride of 2 halves H and W, rounded up.

    Args:
        channels: C.
        widths, strides: of the convolutions.
        dim: width of a last 1x1 convolution. None: there is none.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], strides: tuple[int, ...], dim: int | None = None):
        super().__init__()
        norm = import_package("timm", "convnext-t-convstem").layers.LayerNorm2d
        layers: list[nn.Module] = []
        for ins, outs, stride in zip((channels, *widths), widths, strides, strict=False):
            layers += [nn.Conv2d(ins, outs, 3, stride=stride, padding=1), norm(outs, eps=1e-6), nn.GELU()]
        if dim is not None:
            layers.append(nn.Conv2d(widths[-1], dim, 1))
        self.stem = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class Tokens(nn.Module):
    """The stem of a ViT, in the place of timm's PatchEmbed: images [B, C, H, W] -> [B, h, w, D], of any size.

    Args:
        grid_size: (h, w) of the images that the position embeddings are made for. timm interpolates them for others.
    """

    def __init__(self, proj: ConvStem, grid_size: tuple[int, int]):
        super().__init__()
        self.proj, self.grid_size = proj, grid_size

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


@register(
    "convnext-t-convstem (also -s-, -b- and -l-)",
    r"convnext-(?P<size>[tsbl])-convstem",
    names=tuple(f"convnext-{size}-convstem" for size in NEXT),
)
def convnext(size: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """ConvNeXt-T, -S, -B or -L with a ConvStem. Images [B, C, H, W] of at least 29x29 -> logits [B, K].

    28,627,432 parameters (T) and 88,753,416 (B) for 1000 classes, as in the authors' checkpoints.
    """
    timm = import_package("timm", f"convnext-{size}-convstem")
    if min(image_shape[1:]) <= 28:
        raise ValueError(f"image_shape={image_shape}: convnext-{size}-convstem needs images of at least 29x29")
    name, widths, strides = NEXT[size]
    model = timm.create_model(f"convnext_{name}", num_classes=num_classes)
    model.stem = ConvStem(image_shape[0], widths, strides)
    return model


@register("vit-s-convstem (also -b-)", r"vit-(?P<size>[sb])-convstem", names=tuple(f"vit-{size}-convstem" for size in VIT))
def vit(size: str, num_classes: int, image_shape: ImageShape) -> nn.Module:
    """ViT-S/16 or ViT-B/16 with a ConvStem. Images [B, C, H, W] -> logits [B, K].

    The position embeddings are made for `image_shape`, and interpolated for images of another size.
    22,777,576 parameters (S) for 1000 classes and 224x224, as in the authors' checkpoint.
    """
    timm = import_package("timm", f"vit-{size}-convstem")
    name, dim = VIT[size]
    height, width = (-(-side // PATCH) for side in image_shape[1:])
    model = timm.create_model(
        f"vit_{name}_patch16_224", num_classes=num_classes, img_size=(PATCH * height, PATCH * width), dynamic_img_size=True
    )
    model.patch_embed = Tokens(ConvStem(image_shape[0], VIT_WIDTHS, (2, 2, 2, 2), dim), (height, width))
    return model
