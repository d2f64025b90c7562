"""What each method minimises, and the attack that makes its examples.

    standard   CE(z(x), y)
    madry      CE(z(x'), y)                                                          Madry et al., arXiv 1706.06083
    fgsm       c CE(z(x), y) + (1 - c) CE(z(x'), y), c = 0.5                         Goodfellow et al., arXiv 1412.6572
    trades     CE(z(x), y) + beta mean KL(p(x) || p(x'))                             Zhang et al., arXiv 1901.08573
    rst        the TRADES loss on labelled and pseudo-labelled images                Carmon et al., arXiv 1905.13736
    mart       BCE(z(x'), y) + beta mean KL(p(x) || p(x')) (1 - p_y(x))              Wang et al., ICLR 2020
               BCE = -log p_y(x') - log(1 - max_{k != y} p_k(x'))

x' is PGD on cross-entropy (TRADES, RST: on the KL term), or with SPAT on label-smoothed cross-entropy. Gradients flow through
both arguments of KL and through MART's weight, as in the public code, whose constants (1.0001, 1e-12) are kept; so losses are
fp32, from logits that are cast up. Plain PyTorch, since all of it is less than a percent of a step (benchmarks/NOTES.md).
"""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spat_kernels import PGD
from spat_kernels.settings import Precision

from ..config import Config

# (clean logits [B, K] or None, adversarial logits [B, K] or None, y [B]) -> the terms of the loss, means over the batch
Head = Callable[[Tensor | None, Tensor | None, Tensor], dict[str, Tensor]]


def standard(clean, adv, y, *, label_smoothing=0.0, **_) -> dict[str, Tensor]:
    return {"ce": F.cross_entropy(clean, y, label_smoothing=label_smoothing)}


def madry(clean, adv, y, *, label_smoothing=0.0, **_) -> dict[str, Tensor]:
    return {"adv_ce": F.cross_entropy(adv, y, label_smoothing=label_smoothing)}


def fgsm(clean, adv, y, *, label_smoothing=0.0, c=0.5, **_) -> dict[str, Tensor]:
    ce, adv_ce = (F.cross_entropy(z, y, label_smoothing=label_smoothing) for z in (clean, adv))
    return {"ce": c * ce, "adv_ce": (1 - c) * adv_ce}


def trades(clean, adv, y, *, beta=6.0, label_smoothing=0.0, **_) -> dict[str, Tensor]:
    kl = F.kl_div(adv.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
    return {"ce": F.cross_entropy(clean, y, label_smoothing=label_smoothing), "kl": beta * kl}


def mart(clean, adv, y, *, beta=5.0, label_smoothing=0.0, **_) -> dict[str, Tensor]:
    log_p, q, label = clean.log_softmax(1), adv.softmax(1), y[:, None]
    p = log_p.exp()  # from its logarithm, since F.kl_div's gradient is NaN where a probability is 0
    runner_up = q.scatter(1, label, -1.0).max(1).values
    bce = F.cross_entropy(adv, y, label_smoothing=label_smoothing) - (1.0001 - runner_up + 1e-12).log().mean()
    kl = (p * (log_p - (q + 1e-12).log())).sum(1)
    weight = 1.0000001 - p.gather(1, label)[:, 0]
    return {"bce": bce, "kl": beta * (kl * weight).mean()}


HEADS: dict[str, tuple[Head, bool, bool]] = {  # the loss, whether it reads clean logits, whether adversarial ones
    "standard": (standard, True, False),
    "madry": (madry, False, True),
    "fgsm": (fgsm, True, True),
    "trades": (trades, True, True),
    "rst": (trades, True, True),
    "mart": (mart, True, True),
}


class Objective(nn.Module):
    """A method's loss as one module, so that DDP and torch.compile see one forward for each update.

    forward(x, x_adv, y): images [B, C, H, W] (`x_adv` is not read by "standard"), y int64 [B] -> (loss, its terms), in fp32 (fp64
    for an fp64 model); the loss is the sum of the terms.
    """

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model = model
        self.head, reads_clean, reads_adv = HEADS[config.method]
        self.order = [kind for kind in config.forwards.split("-") if (reads_clean if kind == "clean" else reads_adv)]
        self.settings = {"beta": config.kl_weight, "label_smoothing": config.label_smoothing}

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z: dict[str, Tensor] = {}
        for kind in self.order:
            images = x if kind == "clean" else x_adv
            if kind not in z:
                z[kind] = self.logits(images)
            else:  # the logits are the same again: only the statistics of batch norm move
                with torch.no_grad():
                    self.model(images)
        with torch.autocast(y.device.type, enabled=False):
            terms = self.head(z.get("clean"), z.get("adv"), y, **self.settings)
            return reduce(add, terms.values()), {name: term.detach() for name, term in terms.items()}

    def logits(self, x: Tensor) -> Tensor:
        z = self.model(x)
        return z if z.dtype == torch.float64 else z.float()


def training_attack(config: Config) -> Callable[[nn.Module, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]:
    """(model, x [B, C, H, W] in [0, 1], y [B] of its classes, generator) -> x', the images to train on, and uint8 [B], 1 where
    the input gradient was unusable; x itself and zeros for "standard". Nothing waits for the device: see `PGD.launch`."""
    if config.method == "standard":
        return lambda model, x, y, generator: (x, torch.zeros_like(y, dtype=torch.uint8))
    eps, step_size, steps, start = config.attack_settings
    attack = PGD(
        eps,
        loss=config.maximised,
        steps=steps,
        step_size=step_size,
        random_start=start == "uniform",
        bn_mode=config.bn_mode,
        precision=attack_precision(config),
        input_gradient=config.input_gradient,
        graph=config.graph if config.graph == "auto" else False,
    )

    def perturb(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        attack.generator = generator
        noise = None
        if start == "normal":
            noise = x + 0.001 * torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
        return attack.launch(model, x, y, start=noise)

    return perturb


def attack_precision(config: Config) -> Precision:
    return config.attack_precision or config.precision
