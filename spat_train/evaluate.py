"""Accuracy, clean and under attack: of a finished model with everything kept (`evaluate`), or as a few numbers (`accuracies`)."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spat_kernels.precision import tf32_switches

from .attacks import Attack, parse, parse_all
from .distributed import World
from .images import Floats, Folder, Images, fingerprint, floats
from .randomness import derived_seed
from .samples import Samples

BATCH = 512
WORST = "worst case"
Z95 = 1.959963984540054  # of a standard normal, two-sided 95 %

# The columns of the thesis's tables 6.1 and 6.2.
TEST = {"clean": parse("clean"), "FGSM": parse("fgsm"), "PGD-20": parse("pgd-20"), "C&W-inf-30": parse("cw-30")}


def validation(steps: int) -> dict[str, Attack]:
    return {"clean": TEST["clean"], "pgd": parse(f"pgd:steps={steps}:step=1/4")}


# ---- the core


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Classes, int64 [B], by logits in full precision."""
    with torch.no_grad(), tf32_switches("fp32", x.device.type):
        return model(x).argmax(1)


def broken_by(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    seed: Callable[[int], int],
    *,
    clean: Tensor | None = None,
    source: nn.Module | None = None,
    classes: int = 0,
    **how,
) -> tuple[Tensor, Tensor]:
    """All runs of `attack` on a batch, each on what is not broken yet.

    Args:
        x: images [B, C, H, W] in [0, 1]. y: int64 [B], their labels.
        eps: the radius.
        seed: of a run by its number.
        clean: int64 [B], what the model predicts of x: what is wrong already counts as broken and is not attacked. None attacks
            every image, and what counts is where that ends.
        source: the model that adversarial images are made on; None is `model`.
        classes: K, where the attack goes through targets.
        how: of `Attack.__call__`.

    Returns:
        predicted: int64 [B], the first wrong class that an image was brought to, else y.
        x_adv: like x, the image with that prediction.
    """
    predicted = torch.full_like(y, -1) if clean is None else clean.clone()
    images, left = x.clone(), torch.ones_like(y, dtype=torch.bool) if clean is None else clean == y
    for run in range(attack.runs(classes)):
        if not left.any():
            break
        generator = torch.Generator().manual_seed(seed(run))
        x_adv = attack(source or model, x, y, eps, generator, run=run, only=left, **how)
        predicted[left] = predict(model, x_adv[left])
        images[left] = x_adv[left]
        left = left & (predicted == y)
    return predicted, images


# ---- a few numbers


def accuracies(
    model: nn.Module,
    images: Images | Folder,
    attacks: dict[str, Attack],
    eps: float,
    *,
    rows: Tensor | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
    world: World | None = None,
    between: Callable[[], object] = lambda: None,
    bar: str | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    **how,
) -> dict[str, float]:
    """Accuracy in percent under each attack, the model in eval mode and given back in the mode it came in.

    Every image is attacked, those that the model gets wrong too.

    Args:
        model: images [B, C, H, W] in [0, 1] -> logits [B, K].
        eps: radius for images in [0, 1].
        rows: int64 [N], which images; None is all.
        seed: of the random starts, which depend on it, on `batch_size` and on a batch's place alone.
        world: processes that share the batches; each gets the same result.
        between: called after every attack on a batch, equally often in every process (to stop by an exception).
        bar: the name of a progress bar; None shows none.
        memory_format: of the images.
        how: `precision`, `input_gradient`, `graph` of the attacks.
    """
    rows = torch.arange(len(images)) if rows is None else rows
    device = device_of(model)
    rank, size = (world.rank, world.size) if world else (0, 1)
    correct = dict.fromkeys(attacks, 0)
    training = model.training
    progress = tqdm(total=len(rows) * len(attacks) // size, desc=bar, unit="img", leave=False, disable=bar is None)
    batches = rows.split(batch_size)
    model.eval()
    try:
        for number in range(rank, rank + len(batches), size):  # as many rounds for every process: the last may be without a batch
            x, y = floats(images, batches[number] if number < len(batches) else rows[:0], device, memory_format)
            for name, attack in attacks.items():
                if len(x):
                    predicted, _ = broken_by(attack, model, x, y, eps, lambda run, number=number: seed + number, **how)
                    correct[name] += int((predicted == y).sum())
                    progress.update(len(x))
                between()
    finally:
        progress.close()
        model.train(training)
    counts = world.add(*correct.values()) if world else list(correct.values())
    return {name: 100 * count / len(rows) for name, count in zip(attacks, counts, strict=True)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Models down, attacks across, in percent."""
    columns = list(next(iter(rows.values())))
    lines = [f"{'accuracy, %':<14}" + "".join(f"{name:>12}" for name in columns)]
    lines += [f"{model:<14}" + "".join(f"{row[name]:>12.1f}" for name in columns) for model, row in rows.items()]
    return "\n".join(lines)


def device_of(model: nn.Module) -> torch.device:
    return next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


# ---- with everything kept


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What became of every image under every attack.

    Attributes:
        settings: all that the results depend on.
        attacks: by name, "clean" first.
        rows: int64 [N], which images of the data set. labels: int64 [N].
        predicted: by attack, int64 [N]: the wrong class that an image was brought to, else its label.
    """

    settings: dict
    attacks: dict[str, Attack]
    rows: Tensor
    labels: Tensor
    predicted: dict[str, Tensor]
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def correct(self, name: str) -> Tensor:
        """bool [N]: not broken by the attack; of `WORST`: by none."""
        if name == WORST:
            return torch.stack([self.correct(each) for each in self.attacks]).all(0)
        return self.predicted[name] == self.labels

    def accuracy(self, name: str) -> float:
        """In percent."""
        return 100 * int(self.correct(name).sum()) / len(self)

    def interval(self, name: str) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, in percent."""
        low, high = wilson(int(self.correct(name).sum()), len(self))
        return 100 * low, 100 * high

    def worst_case(self) -> float:
        """Percent of the images that no attack broke."""
        return self.accuracy(WORST)

    def table(self) -> str:
        """Attacks down: accuracy and its interval in percent."""
        names = [*self.attacks, WORST]
        width = max(map(len, names))
        lines = [f"{'accuracy, %':<{width}}           95 % interval"]
        for name in names:
            low, high = self.interval(name)
            lines.append(f"{name:<{width}}  {self.accuracy(name):6.2f}   {low:6.2f} to {high:6.2f}")
        return "\n".join(lines)


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, 1927; Brown, Cai and DasGupta, 2001): inside [0, 1], and right at 0 and 1."""
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / shrink
    # At the ends rounding would leave some 1e-17.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half


def evaluate(
    model: nn.Module,
    images: Images | Folder | Floats | tuple[Tensor, Tensor],
    attacks: Sequence[str | Attack] | str,
    *,
    eps: float,
    eps_l2: float = 0.5,
    source: nn.Module | None = None,
    attack_wrong: bool = False,
    rows: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    folder: str | Path | None = None,
    bar: str | None = "evaluate",
    between: Callable[[], object] = lambda: None,
    memory_format: torch.memory_format = torch.channels_last,
    precision: str = "fp32",
    input_gradient: str = "auto",
) -> Evaluation:
    """Attack `model` at `images`, batch by batch, and keep what became of each.

    An image that the model gets wrong is broken under every attack and not attacked; one that an attack broke is not attacked by
    its further restarts. What comes out is a function of the arguments: interrupted and called again with the same `folder`,
    it goes on, and ends with the same files.

    Args:
        model: in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        images: uint8 images, or a tuple of fp32 images [N, C, H, W] in [0, 1] and labels, int64 [N].
        attacks: specs as `spat_train.attacks.parse` takes them.
        eps, eps_l2: the radii for images in [0, 1], where an attack has none of its own.
        source: make the adversarial images on this model (black box).
        attack_wrong: attack images that the model gets wrong too, and count what that ends at, so that an attack may raise
            accuracy, as PGD-LS does at alpha = 1 (thesis, Fig. 5.3).
        rows: int64 [N], which images; None is all.
        seed: of everything random, with an attack's name, the number of the batch and that of the run.
        folder: where the evaluation is kept, and gone on with; None keeps it in memory.
        bar: the name of a progress bar; None shows none.
        between: called after every attack on a batch (to stop by an exception).
        precision, input_gradient: of the attacks. Predictions are fp32.

    Raises:
        InputError: an argument does not fit, or `folder` holds another evaluation.
        SaveError: the disk is full.
    """
    attacks = parse_all(attacks)
    images = Floats(*images) if isinstance(images, tuple) else images
    rows = torch.arange(len(images)) if rows is None else rows
    device = device_of(model)
    settings = {
        "model": weights_hash(model), "source": weights_hash(source) if source else None, "data": fingerprint(images),
        "rows": tensor_hash(rows), "eps": eps, "eps_l2": eps_l2, "attack_wrong": attack_wrong, "seed": seed,
        "batch_size": batch_size, "precision": precision, "input_gradient": input_gradient,
    }  # fmt: skip
    folder = Path(folder) if folder is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    samples = Samples(folder, settings, {name: attack.spec for name, attack in attacks.items()})
    batches = rows.split(batch_size)
    progress = tqdm(total=len(rows) * len(attacks), desc=bar, unit="img", disable=bar is None)
    classes = 0
    try:
        for number, batch in enumerate(batches):
            missing = [name for name in attacks if (name, number) not in samples.records]
            progress.update(len(batch) * (len(attacks) - len(missing)))
            if not missing:
                continue
            x, y = floats(images, batch, device, memory_format)
            if not classes:
                with torch.no_grad():
                    classes = model(x[:1]).shape[1]
            for name in missing:
                if name == "clean":
                    predicted = predict(model, x)
                else:
                    clean = torch.tensor(samples.records["clean", number]["predicted"], device=device)
                    attack = attacks[name]
                    predicted, _ = broken_by(
                        attack, model, x, y, attack.radius(eps, eps_l2),
                        lambda run, name=name, number=number: derived_seed(seed, name, number, run),
                        clean=None if attack_wrong else clean, source=source, classes=classes, precision=precision,
                        input_gradient=input_gradient, graph=False,
                    )  # fmt: skip
                samples.add({"attack": name, "batch": number, "predicted": predicted.tolist()})
                progress.update(len(batch))
                between()
    finally:
        progress.close()
        samples.close()
    predicted = {
        name: torch.tensor([p for number in range(len(batches)) for p in samples.records[name, number]["predicted"]])
        for name in attacks
    }
    return Evaluation(settings, attacks, rows, images.labels[rows], predicted, folder)


def weights_hash(model: nn.Module) -> str:
    """A short hash of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
