"""The `spat` ops: one file a family, each with its formula, reference, Triton kernel and function; C++ and CUDA are in csrc/."""

from .adt import adt_sample_, adt_step_
from .crop_flip import crop_flip
from .dlr import dlr_grad
from .keep_best import keep_best_
from .kl import kl_grad
from .l2 import l2_step_
from .linf import linf_random_start_, linf_step_
from .lsce import lsce_grad
from .margin import margin_grad
from .pma import pma_grad
from .pool_linear import pool_linear, pool_linear_grad
from .scale_shift_act import scale_shift_act, scale_shift_act_grad
from .scale_shift_relu import scale_shift_relu, scale_shift_relu_grad
from .split_image import split_image

__all__ = [
    "adt_sample_", "adt_step_", "crop_flip", "dlr_grad", "keep_best_", "kl_grad", "l2_step_", "linf_random_start_",
    "linf_step_", "lsce_grad", "margin_grad", "pma_grad", "pool_linear", "pool_linear_grad", "scale_shift_act",
    "scale_shift_act_grad", "scale_shift_relu", "scale_shift_relu_grad", "split_image",
]  # fmt: skip
