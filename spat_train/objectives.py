"""The training objectives: their losses, and what each one sets by default.

To add one: its loss, its row in METHODS and its name in MethodName, all in this file.

    standard   CE(z(x), y)
    madry      CE(z(x'), y)                                                          Madry et al., arXiv 1706.06083
    trades     CE(z(x), y) + beta mean KL(p(x) || p(x'))                             Zhang et al., arXiv 1901.08573
    mart       BCE(z(x'), y) + beta mean KL(p(x) || p(x')) (1 - p_y(x))              Wang et al., ICLR 2020
               BCE = -log p_y(x') - log(1 - max_{k != y} p_k(x'))
    rst        the TRADES loss on labelled and pseudo-labelled images                Carmon et al., arXiv 1905.13736
    fgsm       c CE(z(x), y) + (1 - c) CE(z(x'), y), c = 0.5                         Goodfellow et al., arXiv 1412.6572
    fast       CE(z(x'), y), x' one step of 1.25 eps from a uniform start            Wong et al., arXiv 2001.03994
    n-fgsm     CE(z(x'), y), x' one step of eps from noise of 2 eps, in the box      de Jorge et al., arXiv 2202.01181
    free       CE(z(x'), y), x' from the gradient of the update before               Shafahi et al., arXiv 1904.12843
    mmc        ||f(x') - mu_y||^2 / 2 = -z_y(x') / 2                                 Pang et al., arXiv 1905.10626
    mmc-clean  the same at x
    g-sce      CE(z(x'), y), z_k = -||f - mu_k||^2 (MMLDA; at x: standard)           the same
    adt        CE(z(x'), y), x' from an adversarial distribution (spat_kernels.ADT)  Dong et al., arXiv 2002.05999

z are logits and p probabilities. x' is PGD on cross-entropy (TRADES, RST: on the KL term), or with SPAT on label-smoothed
cross-entropy. Gradients flow through both arguments of KL and through MART's weight, as in the public code, whose constants
(1.0001, 1e-12) are kept. They vanish in half precision, so the losses take logits in fp32. Plain PyTorch, since all of it is less
than a percent of a step (benchmarks/NOTES.md).

MMC and g-SCE are for networks whose last layer has features f and fixed centres mu_k in R^d (--classifier centres). MMC trains on
untargeted PGD on its own loss. With label smoothing it is the mean of the distances to all centres by the smoothed label. SPAT
costs robustness there: at a centre of 10, these logits differ by 222, and where p_y > 1 - alpha, PGD-LS makes the model surer of
the label. In short trainings on 1,500 images of MNIST (eps 0.15, one seed), alpha = 0.1 lowered accuracy under PGD-20 from 74 %
to 1 % (MMC) and from 73 % to 55 % (g-SCE).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

MethodName = Literal[  # those of METHODS
    "standard", "madry", "trades", "mart", "rst", "fgsm", "fast", "n-fgsm", "free", "mmc", "mmc-clean", "g-sce", "adt",
]  # fmt: skip
ClassifierName = Literal["linear", "centres"]
# (clean logits [B, K], adversarial logits [B, K], y int64 [B]; beta, label_smoothing) -> the terms of the loss by name, each a
# mean over the batch. Logits that the method does not read are None.
Head = Callable[..., dict[str, Tensor]]


def standard(clean, adv, y, *, beta=None, label_smoothing=0.0) -> dict[str, Tensor]:
    return {"ce": F.cross_entropy(clean, y, label_smoothing=label_smoothing)}


def madry(clean, adv, y, *, beta=None, label_smoothing=0.0) -> dict[str, Tensor]:
    return {"adv_ce": F.cross_entropy(adv, y, label_smoothing=label_smoothing)}


def fgsm(clean, adv, y, *, beta=None, label_smoothing=0.0, c=0.5) -> dict[str, Tensor]:
    ce, adv_ce = (F.cross_entropy(z, y, label_smoothing=label_smoothing) for z in (clean, adv))
    return {"ce": c * ce, "adv_ce": (1 - c) * adv_ce}


def trades(clean, adv, y, *, beta, label_smoothing=0.0) -> dict[str, Tensor]:
    kl = F.kl_div(adv.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
    return {"ce": F.cross_entropy(clean, y, label_smoothing=label_smoothing), "kl": beta * kl}


def mart(clean, adv, y, *, beta, label_smoothing=0.0) -> dict[str, Tensor]:
    log_p, q, label = clean.log_softmax(1), adv.softmax(1), y[:, None]
    p = log_p.exp()  # from its logarithm, since F.kl_div's gradient is NaN where a probability is 0
    runner_up = q.scatter(1, label, -1.0).max(1).values
    bce = F.cross_entropy(adv, y, label_smoothing=label_smoothing) - (1.0001 - runner_up + 1e-12).log().mean()
    kl = (p * (log_p - (q + 1e-12).log())).sum(1)
    weight = 1.0000001 - p.gather(1, label)[:, 0]
    return {"bce": bce, "kl": beta * (kl * weight).mean()}


def mmc(clean, adv, y, *, beta=None, label_smoothing=0.0) -> dict[str, Tensor]:
    return {"adv_mmc": _distance(adv, y, label_smoothing)}


def mmc_clean(clean, adv, y, *, beta=None, label_smoothing=0.0) -> dict[str, Tensor]:
    return {"mmc": _distance(clean, y, label_smoothing)}


def _distance(z: Tensor, y: Tensor, label_smoothing: float) -> Tensor:
    return -((1 - label_smoothing) * z.gather(1, y[:, None])[:, 0] + label_smoothing * z.mean(1)).mean() / 2


@dataclass(frozen=True)
class Method:
    """An objective and the defaults of its training attack."""

    title: str  # its name in tables
    summary: str  # for the help of `spat-train train`
    head: Head
    reads: tuple[Literal["clean", "adv"], ...] = ("clean", "adv")  # the logits that the loss needs; without "adv" no attack
    beta: float | None = None  # default weight of the KL term; None: the loss has none
    inner: str = "ce"  # the loss that the attack maximises
    steps: int = 10  # of the attack
    step_in_eps: float = 0.25  # length of a step, as a fraction of eps
    start: str = "uniform"  # of the attack: "uniform", "normal", "clean" or "wide"
    needs_extra: bool = False  # whether it trains on pseudo-labelled images too
    replays: int | None = None  # updates with a batch, where their gradients make the examples (training/free.py), no attack
    classifier: ClassifierName = "linear"  # the last layer of the model; a method with "centres" is for those alone
    attack: Literal["pgd", "adt"] = "pgd"  # the latter has no step_in_eps and no start

    @property
    def attacks(self) -> bool:
        return "adv" in self.reads

    @property
    def idle(self) -> dict[str, str]:
        """The options of a run that do nothing with this method, by name, and what the method has or does instead."""
        if self.attack == "adt":
            idle = {"step_size": "has none: its steps have --inner-lr", "start": "has none", "attack": "has its own"}
        else:
            idle = dict.fromkeys(("inner_lr", "entropy", "inner_samples"), "has none, unlike --method adt")
        if self.beta is None:
            idle["beta"] = "has no KL term"
        if len(self.reads) == 1:
            idle["forwards"] = "has one forward"
        if self.replays is None:
            idle["replays"] = "has one update a batch, unlike --method free"
        if not self.attacks:
            of_attacks = ("alpha", "attack", "inner", "steps", "step_size", "start", "bn_mode")
            idle |= dict.fromkeys(of_attacks, "training attacks nothing")
        if self.replays is not None:
            own = "takes its examples from the gradient of the update itself"
            idle |= dict.fromkeys(("attack", "inner", "steps", "start", "bn_mode", "awp"), own)
            idle["alpha"] = f"{own}, which --label-smoothing smooths"
        return idle


METHODS: dict[MethodName, Method] = {
    "standard": Method("standard", "clean images", standard, reads=("clean",)),
    "madry": Method("Madry", "CE(x')", madry, reads=("adv",)),
    "trades": Method("TRADES", "CE(x) + beta KL(p(x) || p(x'))", trades, beta=6.0, inner="kl"),
    "mart": Method("MART", "BCE(x') + beta KL (1 - p_y(x))", mart, beta=5.0),
    "rst": Method(
        "RST", "TRADES on labelled and pseudo-labelled images (--extra)", trades, beta=6.0, inner="kl", needs_extra=True
    ),
    "fgsm": Method("FGSM", "the mean of CE(x) and CE(x'), x' by one step of eps", fgsm, steps=1, step_in_eps=1.0, start="clean"),
    "fast": Method(
        "Fast AT", "CE(x'), x' by one step of 1.25 eps from a uniform start", madry, ("adv",), steps=1, step_in_eps=1.25,
    ),
    "n-fgsm": Method(
        "N-FGSM", "CE(x'), x' by one step of eps from noise of 2 eps, bounded by the pixel range alone", madry, ("adv",),
        steps=1, step_in_eps=1.0, start="wide",
    ),
    "free": Method(
        "Free AT", "CE(x'), with --replays updates on each batch, whose gradients move x' too", madry, ("adv",),
        steps=1, step_in_eps=1.0, start="clean", replays=8,
    ),
    "mmc": Method("MMC", "the distance of f(x') to its centre", mmc, reads=("adv",), inner="mmc", classifier="centres"),
    "mmc-clean": Method("MMC, clean", "the distance of f(x) to its centre", mmc_clean, reads=("clean",), classifier="centres"),
    "g-sce": Method("g-SCE", "CE(x') on distances to centres", madry, reads=("adv",), classifier="centres"),
    "adt": Method("ADT", "CE(x'), x' from an adversarial distribution", madry, reads=("adv",), steps=7, attack="adt"),
}  # fmt: skip
