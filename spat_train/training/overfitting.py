"""The alarm for catastrophic overfitting (Wong et al., arXiv 2001.03994): trained on one step of an attack, a model may learn to
withstand that step alone, within an epoch. Its accuracy under PGD then falls, often to nothing, while that under FGSM rises.

At each validation both are measured on the same held-out images. The alarm is raised when the accuracy under PGD is below that
of the best validation so far beyond chance, and the accuracy under FGSM above the one of that validation. Where a model gets
worse for another reason, such as a high learning rate, both fall.

Beyond chance: Fisher's exact test of the two counts of robust images, one-sided, at 1 % over all pairs of validations of the run
together (Bonferroni): the best is often the luckiest one, too. The test takes the counts for those of different images. On the
same images they differ less by chance, so false alarms are rarer still. On 1,000 images and over 100 validations, 45 % has to
fall by 10.2 points.
"""

from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..config import Config
from ..evaluation.alarms import SIGNIFICANT

Percent = dict[str, float]  # of a validation: epoch, and accuracies in percent under "pgd" and "fgsm"


def collapse(now: Percent, best: Percent, images: int, validations: int) -> float | None:
    """The probability that chance explains the fall of PGD accuracy since `best`, where that raises the alarm, else None.

    Args:
        images: the number of held-out images, of both.
        validations: how many the run has in all.
    """
    if "fgsm" not in best or now["fgsm"] <= best["fgsm"]:  # not in it: from before there was the alarm
        return None
    from scipy.stats import fisher_exact  # its import takes a second

    pairs = max(1, validations * (validations - 1) / 2)
    counts = [round(each["pgd"] / 100 * images) for each in (now, best)]
    p = float(fisher_exact([[right, images - right] for right in counts], alternative="less").pvalue)
    return p if p < SIGNIFICANT / pairs else None


def validations(config: Config) -> int:
    """Validations in a run: every `val_every` epochs, and after the last."""
    return -(-config.epochs // config.val_every)


def on_host(state: dict) -> dict:
    """A copy of a state dict whose tensors are on the CPU. Loading a copy keeps an optimiser from writing on the original."""
    return tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), state)


def line(now: Percent, best: Percent, action: str) -> str:
    """What is said when the alarm is raised."""
    fell, rose = (f"{name.upper()} from {best[name]:.1f} % to {now[name]:.1f} %" for name in ("pgd", "fgsm"))
    then = {
        "warn": "--catastrophic-overfitting stop or rollback would act on it",
        "stop": "training ends here",
        "rollback": f"training goes on from the weights of epoch {best['epoch']:g}",
    }
    return f"catastrophic overfitting in epoch {now['epoch']:g}: accuracy under {fell}, under {rose}: {then[action]}"


def in_words(action: str, epochs: list[int]) -> str:
    """What the summary of a run says of its alarms, in `epochs`; "" without any."""
    if not epochs:
        return ""
    done = {
        "warn": f"from epoch {epochs[0]} on: see --catastrophic-overfitting",
        "stop": f"in epoch {epochs[0]} ended the training: the weights are from before it",
        "rollback": f"was undone after epoch{'s' * (len(epochs) > 1)} {', '.join(map(str, epochs))}",
    }
    return f". Catastrophic overfitting {done[action]}"
