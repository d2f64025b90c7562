"""The alarm for catastrophic overfitting (Wong et al., arXiv 2001.03994): trained on one step of an attack, a model may learn to
withstand that step alone, within an epoch. Its accuracy under PGD then falls, often to nothing, while that under FGSM rises.

At each validation both are measured on the same held-out images. The alarm is raised when the accuracy under PGD is below that
of the best validation so far beyond chance, and the accuracy under FGSM above the one of that validation. Where a model gets
worse for another reason, such as a high learning rate, both fall.

A model may be there from the first validation on, with nothing to fall from. So the alarm is raised as well where the accuracy
under PGD is not beyond chance, and that under FGSM is: beyond guessing, beyond the one under PGD, and at least twice that one.

Beyond chance: Fisher's exact test of the two counts of robust images, one-sided, at 1 % over all pairs of validations of the run
together (Bonferroni): the best is often the luckiest one, too. FGSM is compared with PGD at the same level. The test takes the
counts for those of different images. On the same images they differ less by chance, so false alarms are rarer still. On 1,000
images and over 100 validations, 45 % has to fall by 10.2 points. Beyond guessing: by Wilson's 95 % interval.
"""

from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..config import Config
from ..evaluation.alarms import SIGNIFICANT
from ..evaluation.result import beats_guessing

Percent = dict[str, float]  # of a validation: epoch, and accuracies in percent under "pgd" and "fgsm"


def collapse(now: Percent, best: Percent, images: int, validations: int) -> float | None:
    """The probability that chance explains the fall of PGD accuracy since `best`, where that raises the alarm, else None.

    Args:
        images: the number of held-out images, of both.
        validations: how many the run has in all.
    """
    if "fgsm" not in best or now["fgsm"] <= best["fgsm"]:  # not in it: from before there was the alarm
        return None
    return _below(now["pgd"], best["pgd"], images, validations)


def one_step_alone(now: Percent, images: int, classes: int, validations: int) -> float | None:
    """The probability that chance explains why FGSM leaves more images than PGD, where PGD leaves no more than guessing would
    and that raises the alarm, else None.

    Args:
        images: the number of held-out images.
        classes: K, of which a guess is right once.
        validations: how many the run has in all.
    """
    pgd, fgsm = now["pgd"], now["fgsm"]
    if beats_guessing(pgd, images, classes) or not beats_guessing(fgsm, images, classes) or fgsm < 2 * pgd:
        return None
    return _below(pgd, fgsm, images, validations)


def _below(low: float, high: float, images: int, validations: int) -> float | None:
    """Fisher's p for two accuracies in percent of `images` each, where it is below the level, else None."""
    from scipy.stats import fisher_exact  # its import takes a second

    pairs = max(1, validations * (validations - 1) / 2)
    counts = [round(each / 100 * images) for each in (low, high)]
    p = float(fisher_exact([[right, images - right] for right in counts], alternative="less").pvalue)
    return p if p < SIGNIFICANT / pairs else None


def validations(config: Config) -> int:
    """Validations in a run: every `val_every` epochs, and after the last."""
    return -(-config.epochs // config.val_every)


def on_host(state: dict) -> dict:
    """A copy of a state dict whose tensors are on the CPU. Loading a copy keeps an optimiser from writing on the original."""
    return tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), state)


def line(now: Percent, best: Percent, then: str, fell: bool) -> str:
    """What is said when the alarm is raised, because accuracy under PGD `fell` since `best` or is none; `then`: what is done."""
    if fell:
        pgd, fgsm = (f"{name.upper()} from {best[name]:.1f} % to {now[name]:.1f} %" for name in ("pgd", "fgsm"))
    else:
        pgd, fgsm = f"PGD {now['pgd']:.1f} %, not beyond chance", f"FGSM {now['fgsm']:.1f} %"
    return f"catastrophic overfitting in epoch {now['epoch']:g}: accuracy under {pgd}, under {fgsm}: {then}"


def consequence(config: Config, best: Percent, to_best: bool, again: bool) -> str:
    """What is done about an alarm, as in the line.

    Args:
        to_best: whether the weights of `best` are better ones, to go back to.
        again: whether a rollback has gone back to them before.
    """
    action = config.overfitting_alarm
    if action == "stop":
        return "training ends here"
    if not to_best:
        none = "no epoch has withstood PGD yet, so there are no weights to go back to: " if action == "rollback" else ""
        return f"{none}training goes on, but {remedies(config)} may help"
    if action == "warn":
        return "--catastrophic-overfitting stop or rollback would act on it"
    back = f"training goes on from the weights of epoch {best['epoch']:g}"
    return f"{back} again: {remedies(config)} may help" if again else back


def remedies(config: Config) -> str:
    """What makes it rarer, among the options that differ from those of the run."""
    other = ["--method n-fgsm"] if config.method != "n-fgsm" else []
    step = ["a smaller --step-size"] if "step_size" not in config.objective.idle else []
    return ", ".join([*other, *step]) + " or a lower --lr"


def in_words(action: str, epochs: list[int], left: list[int], best: int) -> str:
    """What the summary of a run says of its alarms.

    Args:
        epochs: those with an alarm.
        left: those of them when no epoch had withstood PGD, so that a rollback had nothing to go back to.
        best: the epoch of the best validation.
    """
    if not epochs:
        return ""
    undone = [epoch for epoch in epochs if epoch not in left]
    back = f"was undone after epoch{'s' * (len(undone) > 1)} {', '.join(map(str, undone))}"
    not_back = f"in epoch{'s' * (len(left) > 1)} {', '.join(map(str, left))} could not be undone: no epoch withstood PGD"
    before = "the weights are from before it" if best < epochs[0] else "no epoch before it is better"
    done = {
        "warn": f"from epoch {epochs[0]} on: see --catastrophic-overfitting",
        "stop": f"in epoch {epochs[0]} ended the training: {before}",
        "rollback": ", and ".join([back] * bool(undone) + [not_back] * bool(left)),
    }
    return f". Catastrophic overfitting {done[action]}"
