"""Signs that a model hides its gradients instead of being robust (Athalye et al., arXiv 1802.00420; Carlini et al., 1902.06705).

Each check runs on a few images. Where one attack has to be at least as strong as another, the two are compared image by image: an
alarm is raised if the images that only the weaker one broke outnumber those that only the stronger one broke by more than chance
explains (McNemar's exact test, at 1 %).
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from spat_kernels.attacks.gradient_masking import are_probabilities, has_no_gradient, logit_difference
from spat_kernels.input_gradient.autograd import CUT_OFF, InputGradient
from spat_kernels.interrupts import check
from spat_kernels.model_state.borrow import borrowed
from spat_kernels.precision import tf32_switches
from spat_kernels.predictions import model_logits, predictions

from ..data.images import Floats, Folder, Images, floats
from ..models.try_on import device_of
from ..runtime.seeding import model_draws
from . import checks
from .evaluate import evaluate
from .result import Evaluation, Options

IMAGES = 100
LONG, UNBOUNDED = "pgd-10:steps=40", "pgd-10:steps=40:eps=1"
SIGNIFICANT = 0.01
NOT_ZERO = "gradients are not zero"
STRONGER = [  # the attack that must be stronger, the weaker one, the name of the check, and what it means
    ("fgsm", "noise", "noise is weaker than FGSM",
     "One step along the gradient must do more than noise of the same size, or the gradient points nowhere."),
    ("pgd-10", "fgsm", "FGSM is weaker than PGD",
     "Ten steps can do what one does: where they cannot, the loss is too rugged for gradients to be of use."),
    ("pgd-10", "noisex20", "random search is weaker than PGD",
     "Twenty random points must not find what ten steps along the gradient miss."),
    (LONG, "pgd-10", "more steps break more",
     "Forty steps must not lose what ten have found, or the attack converges on nothing."),
]  # fmt: skip


@dataclass(frozen=True)
class Alarm:
    """One check: the numbers found, whether they raise an alarm, and what that would mean."""

    name: str
    numbers: dict[str, float]
    raised: bool
    meaning: str


def alarms(
    model: nn.Module,
    images: Images | Folder | Floats | tuple[Tensor, Tensor],
    *,
    source: nn.Module | None = None,
    count: int = IMAGES,
    folder: str | Path | None = None,
    bar: str | None = "alarms",
    **options: Unpack[Options],
) -> list[Alarm]:
    """Look for masked gradients, under L-infinity attacks. Costs some 120 gradients an image.

    Args:
        source: a model that attacks are transferred from, for one check more.
        count: how many of the images to use, evenly spread.
        folder: where the attacks' results are kept, so that the same call continues.
        options: as for `evaluate`; `eps` must be given.

    Raises:
        InputError, SaveError: as `evaluate`.
    """
    eps, seed, batch_size = options["eps"], options.get("seed", 0), options.get("batch_size", 256)
    checks.check_numbers(eps, 1.0, 1.0, seed, batch_size)
    images = checks.check_images(images)
    rows = checks.check_rows(options.get("rows"), len(images))
    memory_format = options.get("memory_format", torch.channels_last)
    _, memory_format = checks.check_models(model, source, images, images.labels[rows], memory_format, {})
    rows = rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
    options |= {"rows": rows, "memory_format": memory_format}
    x, y = floats(images, rows, device_of(model), memory_format)
    with model_draws(x.device, seed, "alarms"):
        found = outputs(model, x, batch_size)
        try:
            zero = without_gradient(model, x, y, batch_size)
        except ValueError as error:
            if str(error) != CUT_OFF:
                raise
            return [*found, Alarm(NOT_ZERO, {"images": len(x), "zero or NaN, %": 100.0}, True, f"Here {CUT_OFF}.")]
    radii = {f"pgd-10:eps={radius!r}": radius for radius in (2 * float(eps), 4 * float(eps)) if radius < 1}
    ran = evaluate(
        model, images, ["noise", "noisex20", "fgsm", "pgd-10", LONG, *radii, UNBOUNDED], folder=folder, bar=bar, **options
    )
    unbroken = torch.stack([ran.correct(name) for name in ("fgsm", "pgd-10", LONG)]).all(0).to(x.device)
    found.append(gradients(zero, unbroken))
    for strong, weak, name, meaning in STRONGER:
        found.append(Alarm(name, *compare(ran.correct(strong), ran.correct(weak), strong, weak), meaning))
    found += [larger(ran, {"pgd-10": eps} | radii), unbounded(ran)]
    if source is not None:
        black = Path(folder) / "black-box" if folder is not None else None
        transferred = evaluate(model, images, [LONG], source=source, folder=black, bar=bar, **options)
        numbers, raised = compare(ran.correct(LONG), transferred.correct(LONG), "white box", "black box")
        meaning = "If another model's gradients break more than the model's own, its own are masked."
        found.append(Alarm("black box is weaker than white box", numbers, raised, meaning))
    return found


# ---- the checks


def outputs(model: nn.Module, x: Tensor, batch_size: int) -> list[Alarm]:
    """Checks that logits are numbers, not probabilities, and depend on one image alone, which the model does not write on."""

    def logits(images: Tensor) -> Tensor:
        return torch.cat([model_logits(model, part) for part in images.split(batch_size) if len(part)])

    once, again = logits(x), logits(x)
    apart = torch.empty_like(once)
    for first in range(min(2, len(x))):
        apart[first::2] = logits(x[first::2])
    unanswered, finite = int((predictions(once) < 0).sum()), once[once.isfinite()]
    given = x.clone()
    with torch.no_grad(), borrowed(model, "eval"):
        for part in given.split(batch_size):
            check()
            model(part)
    written = int((given != x).flatten(1).any(1).sum())

    def compare(name: str, other: Tensor, meaning: str) -> Alarm:
        difference, allowed = logit_difference(once, other)
        changed = int((predictions(other) != predictions(once)).sum())
        numbers = {"images": len(x), "largest difference": difference, "allowed": allowed, "other class": changed}
        return Alarm(name, numbers, difference > allowed, meaning)

    return [
        Alarm("outputs are numbers", {"images": len(x), "NaN": unanswered}, unanswered > 0,
              "NaN is no prediction and counts as misclassified; a model that overflows has to be mended, or run in fp32."),
        Alarm("images are only read", {"images": len(x), "written on": written}, written > 0,
              "Gradients know nothing of what a model writes on its input, so that attacks are weaker than they could be."),
        Alarm("outputs are logits", {"finite": len(finite), "their mean": float(finite.mean())}, are_probabilities(once),
              "Gradients vanish behind a softmax: a model must return its logits."),
        compare("outputs are deterministic", again,
                "A model that draws at random has to be attacked on the average (autoattack-rand), and evaluated several times."),
        compare("outputs do not depend on the batch", apart,
                "If the other images of a batch change an image's logits, so does attacking those."),
    ]  # fmt: skip


def without_gradient(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """bool [B]: where the margin has no gradient that an attack could follow."""
    with torch.inference_mode(False), torch.no_grad(), borrowed(model, "eval"), tf32_switches("fp32", x.device.type):
        batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return torch.cat([has_no_gradient(InputGradient(model), *batch) for batch in batches])


def gradients(zero: Tensor, unbroken: Tensor) -> Alarm:
    """Checks that the images without a gradient, `zero`, were broken all the same; both are bool [B]."""
    both = int((zero & unbroken).sum())
    share = 100 * int(zero.sum()) / len(zero)
    numbers = {"images": len(zero), "zero or NaN, %": share, "of them not broken": both}
    meaning = "Gradient attacks cannot move an image whose gradient is zero or NaN: it looks robust without being tested."
    return Alarm(NOT_ZERO, numbers, both > 0, meaning)


def compare(strong: Tensor, weak: Tensor, *names: str) -> tuple[dict[str, float], bool]:
    """Compare two attacks by what each left correct, bool [N]: numbers, and whether the first is the weaker one beyond chance."""
    only_strong, only_weak = int((weak & ~strong).sum()), int((strong & ~weak).sum())
    numbers = {f"{name}, %": 100 * int(left.sum()) / len(left) for name, left in zip(names, (strong, weak), strict=True)}
    p = sign_test(only_weak, only_strong)
    numbers |= {f"broken by {names[0]} alone": only_strong, f"by {names[1]} alone": only_weak, "p": p}
    return numbers, p < SIGNIFICANT


def sign_test(wins: int, losses: int) -> float:
    """The probability of at least `wins` heads in wins + losses tosses of a fair coin."""
    from scipy.stats import binomtest  # its import takes a second

    return float(binomtest(wins, wins + losses, alternative="greater").pvalue) if wins + losses else 1.0


def larger(ran: Evaluation, radii: dict[str, float]) -> Alarm:
    """Checks that the attacks `radii`, by rising radius, leave fewer and fewer images."""
    names = list(radii)
    numbers = {f"eps {radius:.4g}, %": ran.accuracy(name) for name, radius in radii.items()}
    raised = any(compare(ran.correct(b), ran.correct(a), b, a)[1] for a, b in pairwise(names))
    meaning = "A larger ball holds the smaller one: an attack that breaks less in it goes astray."
    return Alarm("larger eps break more", numbers, raised, meaning)


def unbounded(ran: Evaluation) -> Alarm:
    left = int(ran.correct(UNBOUNDED).sum())
    meaning = (
        "With eps 1 every image of another class is in the ball: an image that is left is one that the attack cannot handle."
    )
    return Alarm("unbounded attacks break all", {"images": len(ran), "left": left}, left > 0, meaning)


def beyond_chance(ran: Evaluation, source: bool = False) -> Alarm:
    """Checks that clean images are classified better than by chance; `ran` is of the model, or of the source."""
    low, high = ran.interval("clean")
    chance = 100 / ran.classes
    numbers = {"clean, %": ran.accuracy("clean"), "at least, %": low, "at most, %": high, "chance, %": chance}
    whose, option = ("the source's ", "--source-") if source else ("", "--")
    meaning = (
        f"Perhaps the network wants normalised images ({option}mean, {option}std), is another architecture than its weights are "
        "for, or numbers the classes in another order; or these are too few images to tell."
    )
    return Alarm(f"{whose}clean accuracy is beyond chance", numbers, low <= chance, meaning)


def rechecked(ran: Evaluation) -> Alarm:
    """Checks that adversarial images lie in the ball and the box."""
    numbers: dict[str, float] = {name: found.outside for name, found in ran.rechecks.items()}
    meaning = "An attack that leaves the ball, or the box of valid pixels, says nothing about robustness in it."
    return Alarm("adversarial images are inside", {"outside": sum(numbers.values())} | numbers, any(numbers.values()), meaning)
