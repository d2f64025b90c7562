"""Pictures: decoded by torchvision, and brought to one size, for evaluation always alike, for training at random."""

import math
import re
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, first_line
from ..runtime.seeding import derived_seed, model_draws

MIN_SIZE = 8  # least H and W: below, the strides of SmallCNN leave BatchNorm one pixel
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PPM", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000")  # read by PIL, whatever the suffix says. It gives EPS to a program
MOST_PIXELS = 178_956_970  # as PIL, so that a small file does not take gigabytes
# JPEG: what begins a part, the codes of parts with the size of the picture, and the codes of parts without a length.
MARKER = re.compile(rb"\xff[^\0\xff]")
FRAMES = bytes(code for code in range(0xC0, 0xD0) if code not in (0xC4, 0xC8, 0xCC))
ALONE = bytes((0x01, *range(0xD0, 0xD8)))
MOST_PARTS = 1000  # each has up to 64 KB
THIN = 4  # sides that differ by more are cropped before they are resized: a whole resized picture could be huge
CPU = torch.device("cpu")


def check_pictures(data: str, image_size: int | None) -> None:
    """Raise InputError where `image_size` does not fit, or torchvision does not import: here, before worker processes need it."""
    if image_size is None or image_size < MIN_SIZE:
        given = " is missing" if image_size is None else f" {image_size}"
        raise InputError(f"--image-size{given}: give the size, {MIN_SIZE} or more, that the pictures in {data} are brought to")
    try:
        import torchvision.io
        import torchvision.transforms.v2  # noqa: F401
    except Exception as error:  # a torchvision built for another torch raises RuntimeError and others
        reason = f"torchvision does not import ({first_line(error)}): install the one for this torch"
        raise InputError(f"--data {data}: {reason}") from error


def decode(content: bytes) -> Tensor:
    """uint8 [3, H, W], RGB: JPEG, PNG and WebP by torchvision, other formats by PIL.

    Of 16 bits the high 8 are kept, so that pictures of 12 bits in 16 come out almost black: stretch them first. As for
    torchvision's ImageFolder, transparency and EXIF's orientation are ignored, and the first picture of an animation is taken.

    Raises:
        Exception: it cannot be decoded, has more pixels than `MOST_PIXELS`, or 32 bits a value, whose range is not known.
    """
    from torchvision.io import ImageReadMode, decode_image

    if not content.startswith((b"\xff\xd8\xff", b"\x89PNG")) and content[8:12] != b"WEBP":
        return _by_pil(content)
    if (pixels := _pixels(content)) > MOST_PIXELS:
        raise ValueError(f"its header says {pixels} pixels, at most {MOST_PIXELS} are decoded")
    picture = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    picture = picture[0] if picture.ndim == 4 else picture
    return picture if picture.dtype == torch.uint8 else (picture.to(torch.int32) >> 8).to(torch.uint8)


def _pixels(content: bytes) -> int:
    """Those of a PNG or JPEG, as libpng and libjpeg find them in its header. 0: there is none, or it is a WebP, never huge."""
    number = partial(int.from_bytes, byteorder="big")
    if content.startswith(b"\x89PNG"):
        return number(content[16:20]) * number(content[20:24])
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    for _ in range(MOST_PARTS):
        if not (marker := MARKER.search(content, at)):
            return 0
        at = marker.end()
        code = content[at - 1]
        if code in FRAMES:
            return number(content[at + 3 : at + 5]) * number(content[at + 5 : at + 7])
        if code not in ALONE:
            at += max(2, number(content[at : at + 2]))
    raise ValueError(f"there are {MOST_PARTS} parts before its picture")


def _by_pil(content: bytes) -> Tensor:
    from PIL import Image

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # Pillow before 11.3 has no AVIF
    with Image.open(BytesIO(content), formats=formats) as file:
        return torch.from_numpy(np.array(_rgb(file))).permute(2, 0, 1)


def _rgb(picture: Any) -> Any:
    from PIL import Image

    grey16 = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if grey16:  # PIL's convert clips it to 255; of 16-bit colours PIL keeps the high byte
        levels = (np.asarray(picture) >> 8).astype(np.uint8)
        white_is_0 = picture.format == "TIFF" and picture.tag_v2.get(262) == 0  # PIL respects it for 8 bits only
        picture = Image.fromarray(255 - levels if white_is_0 else levels)
    elif picture.mode in ("I", "F"):
        raise ValueError("it has 32 bits a value, of an unknown range: save it with 8 or 16")
    return picture.convert("RGB")


def square(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """The short side of uint8 [C, H, W] resized to `size`, both of whose numbers are alike, and the square in the middle."""
    from torchvision.transforms.v2 import functional

    if picture.shape[1:] == size:
        return picture
    most = THIN * min(picture.shape[1:])
    picture = functional.center_crop(picture, [min(side, most) for side in picture.shape[1:]])
    height, width = picture.shape[1:]
    scaled = [int(size[0] * side / min(height, width)) for side in (height, width)]
    return functional.center_crop(_resized(picture, scaled), list(size))


def _resized(picture: Tensor, size: Sequence[int]) -> Tensor:
    """As torchvision's resize, bilinear with antialiasing. torch has its fastest way of it for channels that are together."""
    together = picture.permute(1, 2, 0).contiguous()[None]  # in this order a crop is copied in half the time
    return F.interpolate(together.permute(0, 3, 1, 2), tuple(size), mode="bilinear", antialias=True)[0]


def crop_place(height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop: as torchvision's RandomResizedCrop draws it, from 22 numbers in [0, 1).

    Ten times an area, of 8 to 100 %, and a shape, from 3:4 to 4:3, until a crop fits; else the largest one in the middle. Drawing
    by torchvision itself, from the global generator, takes a fifth of the time that decoding takes.
    """
    for area, shape in zip(draws[:10], draws[10:20], strict=True):
        pixels, ratio = height * width * (0.08 + 0.92 * area), 3 / 4 * (16 / 9) ** shape
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


class RandomView:
    """A picture as training sees it: cropped as by torchvision's RandomResizedCrop, then by its RandAugment, with their defaults.

    RandAugment works on PIL's pictures, as in torchvision's own training: three times as fast here as on tensors.

    Args:
        resized: crop at random, by area and shape, and resize. Else the `square` in the middle.
        rand_augment: the number of operations and their magnitude, below 31 (Cubuk et al., 2020). None leaves them out.
    """

    def __init__(self, resized: bool, rand_augment: tuple[int, int] | None):
        from torchvision.transforms import v2

        self.resized, self.operations = resized, v2.RandAugment(*rand_augment) if rand_augment else None

    def __call__(self, picture: Tensor, size: tuple[int, int], *key: int) -> Tensor:
        """uint8 [C, *size] of uint8 [C, H, W], as `key` draws it. The global generator stays as it is."""
        if self.resized:
            generator = torch.Generator().manual_seed(derived_seed("crop", *key))
            _, height, width = picture.shape
            top, left, height, width = crop_place(height, width, torch.rand(22, generator=generator).tolist())
            picture = _resized(picture[:, top : top + height, left : left + width], size)
        else:
            picture = square(picture, size)
        if not self.operations:
            return picture
        from torchvision.transforms.v2 import functional

        with model_draws(CPU, *key):
            return functional.pil_to_tensor(self.operations(functional.to_pil_image(picture)))
