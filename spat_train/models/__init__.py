"""Networks and their weights."""

from .registry import create as create
from .wrapping import Normalize as Normalize
