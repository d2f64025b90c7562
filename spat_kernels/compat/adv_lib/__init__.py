"""Attacks of adv_lib (Adversarial Library): `from spat_kernels.compat.adv_lib import pgd_linf` instead of `from adv_lib.attacks`.

Images are in [0, 1]. Arguments, their order and their defaults are adv_lib's, which need not be installed. Further keyword
arguments are those of `PGD`: precision, input_gradient, fuse, graph, generator and bn_mode ("keep" unless given, as adv_lib
attacks a model in the mode that it is in; statistics never change). As there, an image that the model gets right under each
iterate comes back as it was.

`fab` is left out: adv_lib's looks for the nearest image that is wrong, ours inside a ball.
"""

from .attacks import apgd as apgd
from .attacks import apgd_targeted as apgd_targeted
from .attacks import fgsm as fgsm
from .attacks import pgd_linf as pgd_linf
