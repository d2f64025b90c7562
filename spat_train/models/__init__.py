"""Networks and their weights."""

from spat_kernels.normalize import Normalize as Normalize

from .hub import from_folder as from_folder
from .hub import from_pretrained as from_pretrained
from .registry import create as create
from .wrapping import wrap as wrap
