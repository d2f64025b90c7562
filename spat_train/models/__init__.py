"""Networks and their weights."""

from spat_kernels.normalize import Normalize as Normalize

from .registry import create as create
from .wrapping import wrap as wrap
