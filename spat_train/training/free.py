"""Free adversarial training (Shafahi et al., NeurIPS 2019, arXiv 1904.12843): one gradient for the weights and for the images.

    x' = clip(x + delta, 0, 1), with delta of the batch before; then, for m replays of the batch (x, y):
        g_w, g_x = gradients of CE(z(x'), y);  the optimiser updates the weights by g_w
        x' <- clip(clip(x' + step_size sign(g_x), x - eps, x + eps), 0, 1)
    delta = x' - x

A batch of n images uses the first n rows of delta, also one that is smaller than the others. That delta stays inside the pixel
range is as in the code of Wong et al. (arXiv 2001.03994).
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from spat_kernels import ops
from spat_kernels.ops._common import acc_dtype

from ..config import Config
from ..runtime.distributed import World
from .graphed import graphed
from .step import Launched, Losses, Objective, Span, TrainStep


class FreeStep(TrainStep):
    """A `TrainStep` of Free AT: `updates_per_batch` updates, each of one forward and one backward. The rate moves with each.

    A CUDA graph replays forward and backward of full batches, unless the config has graph="never", or DDP, torch.compile,
    accumulation or checkpointing.
    """

    def __init__(self, config: Config, model: nn.Module, world: World | None = None, span: Span = nullcontext):
        super().__init__(config, model, world, span)
        self.delta: Tensor | None = None  # [rows, C, H, W], for this process's part of a batch
        plain = self.world.size == 1 and config.accumulate == 1 and not config.compile and not config.checkpoint_activations
        self.captures = config.graph == "auto" and self.world.device.type == "cuda" and plain
        self.eager, self.replayed = self.objective, self.objective  # what runs ragged batches, and full ones

    def __call__(
        self, x: Tensor, y: Tensor, *, epoch: int, part: float, seed: int, weight: float = 1.0, length: float = 0.0
    ) -> Launched:
        """As `TrainStep`; `seed` is not used, since nothing here is random.

        The losses that it gives are means over the replays, and its x_adv are the images of the last one, moved by its gradient.
        """
        eps, step_size, *_ = self.config.attack_settings
        radius, step = (torch.full((1,), v, dtype=acc_dtype(x.dtype), device=x.device) for v in (eps, step_size))
        self.objective = self.for_batch(x, y)
        delta = self.warm_rows(x)
        x_adv = torch.add(x, delta, out=torch.empty_like(x)).clamp_(0, 1)
        nan_seen = torch.zeros(len(x), dtype=torch.uint8, device=x.device)
        sums: list[Tensor] = []
        replays = self.config.updates_per_batch
        for replay in range(1, replays + 1):
            self.set_learning_rate(epoch, part - length * (1 - replay / replays))
            images = x_adv.detach().requires_grad_()  # the same memory
            with self.span("update"):
                loss, terms = self.update(x, images, y, weight)
            sums.append(torch.stack([loss, *terms.values()]).detach())  # of a graph, memory that the next replay overwrites
            assert images.grad is not None
            # Where fp16 overflows, which GradScaler deals with, the gradient is NaN too.
            ops.linf_step_(x_adv, x, images.grad, radius, step, nan_seen=None if self.scaler.is_enabled() else nan_seen)
        torch.sub(x_adv, x, out=delta)
        return self.launched(x, x_adv, y, ["loss", *terms], torch.stack(sums).mean(0), nan_seen)

    def warm_rows(self, x: Tensor) -> Tensor:
        """The rows of delta for the batch `x`, a view. Rows that no batch had before are 0."""
        rows = 0 if self.delta is None else len(self.delta)
        if rows < len(x):
            before, self.delta = self.delta, torch.zeros_like(x)
            if before is not None:
                self.delta[:rows] = before
        assert self.delta is not None
        return self.delta[: len(x)]

    def for_batch(self, x: Tensor, y: Tensor) -> Callable[..., Losses]:
        """What differentiates this batch. The first full one is captured."""
        if len(x) != self.config.batch_size:
            return self.eager
        if self.captures:
            self.captures = False
            self.replayed = graphed(Objective(self.model, self.config), x, y, self.half) or self.eager
        return self.replayed

    def own_state(self) -> dict[str, Tensor]:
        return {} if self.delta is None else {"delta": self.delta.cpu().clone()}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        self.delta = state["delta"].to(self.world.device) if state else None


def make_step(config: Config, model: nn.Module, world: World | None = None, span: Span = nullcontext) -> TrainStep:
    """The step of the config's method."""
    return (TrainStep if config.objective.replays is None else FreeStep)(config, model, world, span)
