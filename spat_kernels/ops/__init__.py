"""The `spat` ops: one file a family, each with its formula, reference, Triton kernel and function; C++ and CUDA are in csrc/."""

from .crop_flip import crop_flip as crop_flip
from .dlr import dlr_grad as dlr_grad
from .keep_best import keep_best_ as keep_best_
from .kl import kl_grad as kl_grad
from .l2 import l2_step_ as l2_step_
from .linf import linf_random_start_ as linf_random_start_
from .linf import linf_step_ as linf_step_
from .lsce import lsce_grad as lsce_grad
from .margin import margin_grad as margin_grad
from .pool_linear import pool_linear as pool_linear
from .pool_linear import pool_linear_grad as pool_linear_grad
from .scale_shift_relu import scale_shift_relu as scale_shift_relu
from .scale_shift_relu import scale_shift_relu_grad as scale_shift_relu_grad
from .split_image import split_image as split_image
