"""What is attacked, and whether adversarial images of it are what L-infinity PGD finds (`Judge`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import numerics
from benchmarks.rivals import EPS, autocast_loop, plain_loop
from spat_train.models.registry import create

CLASSES = 10
CHECKED = 256  # images of a batch that the judge looks at
STARTS = 4  # random starts of the judge's own attacks


def photographs(count: int, size: int, seed: int = 0) -> Tensor:
    """Random crops [count, 3, size, size] in [0, 1] of scikit-learn's two bundled photographs, at half their resolution."""
    from sklearn.datasets import load_sample_images

    sources = [torch.tensor(image).movedim(2, 0) / 255 for image in load_sample_images().images]
    sources = [F.avg_pool2d(image, 2) for image in sources]
    generator = torch.Generator().manual_seed(seed)

    def crop() -> Tensor:
        image = sources[int(torch.randint(len(sources), (), generator=generator))]
        top, left = (int(torch.randint(n - size + 1, (), generator=generator)) for n in image.shape[1:])
        return image[:, top : top + size, left : left + size]

    return torch.stack([crop() for _ in range(count)])


def calibrated(name: str, images: Tensor, seed: int = 0) -> nn.Module:
    """The model `name` in eval mode, its BatchNorm statistics those of `images`, so that activations keep their size.

    Raises:
        ValueError: less than half of the input gradient differs from zero, so an attack would mean nothing.
    """
    torch.manual_seed(seed)
    model = create(name, CLASSES).to(images.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
    with torch.no_grad():
        for batch in images.split(32):
            model(batch)
    model.eval()
    x = images[:8].clone().requires_grad_()
    gradient = torch.autograd.grad(model(x).logsumexp(1).sum(), x)[0]
    if not gradient.isfinite().all() or (gradient != 0).float().mean() < 0.5:
        raise ValueError(f"{name}: its input gradient is zero or not finite, so an attack on it means nothing")
    return model


class Judge:
    """Says whether adversarial images are what L-infinity PGD finds on `model`: inside ball and box, and as strong.

    Strength is the mean cross-entropy and the accuracy of `model` (fp32) on them. Both depend on the random start, so the plain
    fp32 loop runs from STARTS of them. From the variance between starts, per image, follows the standard error of a batch's
    mean; a provider may differ from the loop's mean over its starts by

        4 standard errors  +  twice what PyTorch's own eager loop differs in the provider's precision  +  a resolution:

    one image for the accuracy, and a thousandth of what the attack adds to the loss (for models on which all starts end alike).
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, steps: int):
        self.model, self.steps = model, steps
        self.x, self.y = x[:CHECKED], y[: min(len(x), CHECKED)]
        self._runs: dict[str, dict[str, Tensor]] = {}
        self.clean = self._measure(self.x)

    def _measure(self, x: Tensor) -> dict[str, Tensor]:
        y = self.y[: len(x)]
        with torch.no_grad(), numerics("fp32"):
            logits = self.model(x)
        return {"loss": F.cross_entropy(logits, y, reduction="none"), "accuracy": (logits.argmax(1) == y).float()}

    def _reference(self, precision: str) -> dict[str, Tensor]:
        """Loss and accuracy [STARTS, images] of PyTorch's own loop."""
        if precision not in self._runs:
            half = precision in ("bf16", "fp16")
            loop = autocast_loop(self.model, self.steps, precision) if half else plain_loop(self.model, self.steps)
            with numerics(precision):
                runs = [self._measure(loop(self.x, self.y)) for _ in range(STARTS)]
            self._runs[precision] = {key: torch.stack([run[key] for run in runs]) for key in runs[0]}
        return self._runs[precision]

    def tolerances(self, precision: str, count: int) -> dict[str, tuple[float, float]]:
        """What the loss and the accuracy of the first `count` images should be, and by how much they may differ."""
        result = {}
        for key in ("loss", "accuracy"):
            exact, rounded = (self._reference(p)[key][:, :count] for p in ("fp32", precision))
            expected = exact.mean()
            error = (exact.var(0).mean() / count * (1 + 1 / STARTS)).sqrt()
            resolution = 1 / count if key == "accuracy" else 1e-3 * (expected - self.clean[key][:count].mean()).abs()
            tolerance = 4 * error + 2 * (rounded.mean() - expected).abs() + resolution
            result[key] = expected.item(), tolerance.item()
        return result

    def verdict(self, x_adv: Tensor, precision: str) -> dict:
        """`loss` and `accuracy`, what was `expected` within which `tolerance`, and under `note` what is wrong, if anything is."""
        x_adv = x_adv[:CHECKED]
        x = self.x[: len(x_adv)]
        if x_adv.shape != x.shape or not x_adv.isfinite().all():
            return {"note": f"disagrees: shape {list(x_adv.shape)} for {list(x.shape)}, or not finite"}
        if (x_adv - x).abs().max() > EPS + 2**-23 or x_adv.min() < 0 or x_adv.max() > 1:
            return {"note": f"disagrees: up to {(x_adv - x).abs().max():.6f} from x, in [{x_adv.min():g}, {x_adv.max():g}]"}
        found = {key: value.mean().item() for key, value in self._measure(x_adv.float()).items()}
        allowed = self.tolerances(precision, len(x))
        expected, tolerance = ({key: pair[i] for key, pair in allowed.items()} for i in (0, 1))
        wrong = [
            f"{key} {found[key]:.4f}, expected {expected[key]:.4f} within {tolerance[key]:.4f}"
            for key in found
            if not abs(found[key] - expected[key]) <= tolerance[key]
        ]
        return (
            found | {"expected": expected, "tolerance": tolerance} | ({"note": f"disagrees: {'; '.join(wrong)}"} if wrong else {})
        )
