"""Attacks under the names and arguments of other libraries, one module each, for scripts that change one import.

    torchattacks    from spat_kernels.compat import torchattacks
    foolbox         from spat_kernels.compat.foolbox import LinfPGD
    art             from spat_kernels.compat.art import ProjectedGradientDescent
    autoattack      from spat_kernels.compat.autoattack import AutoAttack
    adv_lib         from spat_kernels.compat.adv_lib import pgd_linf

Arguments mean what they mean there. Further keyword arguments are those of `spat_kernels`, such as precision="bf16". A library is
imported only by the module of its name; torchattacks, autoattack and adv_lib need not be installed.
"""
