"""Attacks of the Adversarial Robustness Toolbox (package adversarial-robustness-toolbox) on a `PyTorchClassifier`.

    from spat_kernels.compat.art import ProjectedGradientDescent  # instead of: from art.attacks.evasion import ...
    x_adv = ProjectedGradientDescent(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=10, precision="bf16").generate(x, y)

Arguments, their checks, `set_params`, random numbers (of NumPy's global generator) and the images, float32 arrays, are ART's. The
passes of the model are those of `spat_kernels`, and so are the steps where it has them:

PGD, BIM      by `spat_kernels.PGD` for norm inf and 2, in CUDA graphs too. With a mask, decay, another norm, and eps or
              clip_values that differ within an image, each step is ART's code on our gradient.
FGM           ART's code on our gradient.
AutoAttack    by `spat_kernels.AutoAttack`: APGD-CE, APGD-T, FAB-T, Square; with targeted=True its version="plus". ART's own
              are APGD-CE, APGD-DLR, DeepFool, Square. If `attacks` are given, these run as in ART.

Further keyword arguments are those of `spat_kernels.PGD` that say how the model is run, for PGD and BIM also graph and stop; for
AutoAttack those of `spat_kernels.AutoAttack`. The loss of the classifier must be cross-entropy (smoothed or weighted, too),
NLLLoss or MultiMarginLoss, and its defences PyTorch code. Unlike in ART, images must lie in the
classifier's clip_values, the model's mode and gradients stay as they were, and where cross-entropy underflows the gradient does
not vanish.
"""

from .attacks import BasicIterativeMethod as BasicIterativeMethod
from .attacks import FastGradientMethod as FastGradientMethod
from .attacks import ProjectedGradientDescent as ProjectedGradientDescent
from .attacks import ProjectedGradientDescentPyTorch as ProjectedGradientDescentPyTorch
from .autoattack import AutoAttack as AutoAttack
