"""Pictures in files, decoded to squares of one size."""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, first_line


def read_picture(path: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the short side resized to `size`, the square in the middle, RGB.

    Of 16 bits the high 8 are kept, so that pictures of 12 bits in 16 come out almost black: stretch them first. As for
    torchvision's ImageFolder, transparency and EXIF's orientation are ignored, and the first picture of an animation is taken.

    Raises:
        InputError: the file cannot be decoded, or has 32 bits a value, whose range is not known.
    """
    from PIL import Image

    try:
        if not path.is_file():  # opening a FIFO would wait forever
            raise OSError("there is no such file" if not path.exists() else "it is no regular file")
        with Image.open(path) as file:
            return _square(_rgb(file), size)
    except MemoryError:
        raise
    except Exception as error:  # PIL's parsers raise anything on broken files
        raise InputError(
            f"--data: {path} cannot be decoded ({first_line(error)}): repair or remove it, or start with --skip-broken; a run "
            "that is under way goes on when it is repaired"
        ) from error


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


def _square(picture: Any, size: int) -> np.ndarray:
    """As torchvision's Resize and CenterCrop, to one level, but not by way of the whole resized picture: a thin one's is huge."""
    from PIL import Image

    def middle(side: int) -> tuple[float, float]:
        resized = int(size * side / min(picture.size))
        start = round((resized - size) / 2)
        return start * side / resized, (start + size) * side / resized

    (left, right), (top, bottom) = map(middle, picture.size)
    return np.array(picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom)))
