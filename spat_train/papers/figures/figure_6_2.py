"""Thesis, Figure 6.2: as Figure 6.1, on CIFAR-100."""

from ..figure import PaperFigure
from .figure_6_1 import make, trainings

FIGURE = PaperFigure("6.2", "thesis: the same on CIFAR-100", trainings("6.2"), make)
