"""Linear layers of tokens and 1x1 convolutions on CPUs with AVX-512, by oneDNN with weights that are packed once an attack.

    forward:   y = x @ weight.T + bias
    gradient:  dx = grad @ weight

PyTorch calls MKL in fp32 and lets oneDNN pack the weights in every call in bf16. On Zen 4, packed ahead, fp32 takes 0.75 to 0.95
of that and bf16 0.85 to 1.0, most where there are many products. Packing takes as long as it saves on 400 rows forward and 800
backward, and at least 0.1 ms: hence `ROWS` and `PRODUCTS`. As with Winograd, shapes, dtype and machine alone decide, never a
measured time.
"""

import torch
from torch import Tensor

ROWS = 256  # pays off at the second or third step
PRODUCTS = {torch.float32: 64e6, torch.bfloat16: 256e6}  # 592 rows, 768 x 192, fp32: 1.85 ms, packed 1.6, and 0.2 to pack


def applies(weight: Tensor, rows: int, dtype: torch.dtype) -> bool:
    """Whether it multiplies `rows` rows by `weight` in `dtype`."""
    return (
        weight.device.type == "cpu"
        and rows >= ROWS
        and rows * weight.numel() >= PRODUCTS.get(dtype, float("inf"))
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and is_fast(dtype)
    )


def is_fast(dtype: torch.dtype) -> bool:
    """Whether CPUs multiply matrices as fast as they do convolutions."""
    fast_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype in (torch.float32, torch.float64) or (dtype == torch.bfloat16 and fast_bf16)


class PackedLinear:
    """A linear layer and its gradient. Each packs the weights [O, C], contiguous, at its first use."""

    def __init__(self, weight: Tensor):
        self._weight = weight
        self._packed: dict[bool, Tensor] = {}

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., C] to [..., O]."""
        return self._multiply(x, bias, turned=False)

    def gradient(self, grad: Tensor) -> Tensor:
        """[..., O] to [..., C]."""
        return self._multiply(grad, None, turned=True)

    def _multiply(self, x: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
        if turned not in self._packed:
            weight = self._weight.t().contiguous() if turned else self._weight
            self._packed[turned] = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self._packed[turned], bias, "none", [], "")
