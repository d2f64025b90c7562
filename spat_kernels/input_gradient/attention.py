"""scaled_dot_product_attention in a plan, and how it is written out in bf16 on CPUs:

    forward:    P = softmax(scale q k' + mask),  out = P v
    backward:   dv = P' g,   dS = scale P (g v' - sum(P (g v'))),   dq = dS k,   dk = dS' q

There the backward of PyTorch's kernel takes far longer in bf16 than in fp32: 3.2 ms instead of 0.44 for 8 samples of 3 heads with
37 tokens of 64 channels. Written out it takes 0.46, and the forward 0.22 instead of 0.30.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_linear import is_fast

KEYS = 256  # up to this many, the probabilities are kept: they are at most a few times as large as q, k and v


@dataclass(frozen=True)
class Attend:
    """Attention of q, k and v, [..., N, D], and a mask.

    Args:
        merged: the batch takes two dimensions.
        settings: arguments of scaled_dot_product_attention.
    """

    merged: bool
    settings: dict[str, Any]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.merged:
            return F.scaled_dot_product_attention(query, key, value, mask, **self.settings)
        shape = query.shape[:2]
        if mask is not None and mask.ndim == query.ndim:
            mask = mask.expand(*shape, *mask.shape[2:]).flatten(0, 1)
        out = F.scaled_dot_product_attention(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), mask, **self.settings)
        return out.unflatten(0, shape)

    def is_written_out(self, key: Tensor) -> bool:
        fast = key.device.type == "cpu" and key.dtype == torch.bfloat16 and is_fast(key.dtype)
        return fast and key.shape[-2] <= KEYS and self.settings.keys() <= {"scale"}

    def scale(self, query: Tensor) -> float:
        return self.settings.get("scale", query.shape[-1] ** -0.5)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The result, and what `backward` needs."""
        q, k, v = (laid(t) for t in (query, key, value))
        scores = (q @ k.mT).mul_(self.scale(q))
        if mask is None:
            p = scores.softmax(-1)
        else:
            scores = scores.add_(mask) if mask.is_floating_point() else scores.masked_fill_(~mask, -torch.inf)
            p = torch.ops.aten._safe_softmax(scores, -1)
        return p @ v, (q, k, v, p)

    def backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = laid(grad)
        ds = torch.ops.aten._softmax_backward_data(grad @ v.mT, p, -1, p.dtype).mul_(self.scale(q))
        return ds @ k, ds.mT @ q, p.mT @ grad


def laid(t: Tensor) -> Tensor:
    """Matrices [..., N, D] as products read them: one after the other, each or its transpose contiguous.

    Products would copy others, and again in the backward.
    """
    return t.mT.contiguous().mT if t.stride(-2) == 1 and t.stride(-1) != 1 else t.contiguous()
