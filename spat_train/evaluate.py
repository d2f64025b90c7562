"""Accuracy, clean and under attack: of a finished model with everything kept (`evaluate`), or as a few numbers (`accuracies`)."""

import base64
import hashlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spat_kernels.engine import check_path
from spat_kernels.precision import tf32_switches

from . import files
from .attacks import Attack, parse, parse_all
from .distributed import World
from .evaluation import WORST, Evaluation, Example, Recheck, wilson
from .images import Floats, Folder, Images, InputError, fingerprint, floats
from .models import device_of, try_on
from .randomness import derived_seed
from .run_folder import RunFolder
from .samples import Samples

__all__ = ["TEST", "WORST", "Evaluation", "accuracies", "evaluate", "table", "validation", "wilson"]

BATCH = 512
EXAMPLES = 4  # images kept of each attack
LEVEL = 1 / 255

# The columns of the thesis's tables 6.1 and 6.2.
TEST = {"clean": parse("clean"), "FGSM": parse("fgsm"), "PGD-20": parse("pgd-20"), "C&W-inf-30": parse("cw-30")}


def validation(steps: int) -> dict[str, Attack]:
    return {"clean": TEST["clean"], "pgd": parse(f"pgd:steps={steps}:step=1/4")}


# ---- the core


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Classes, int64 [B], by logits in full precision; -1 where one is NaN, which is no prediction."""
    with torch.no_grad(), tf32_switches("fp32", x.device.type):
        logits = model(x)
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


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


# ---- with everything kept


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
    save_images: bool = False,
    bar: str | None = "evaluate",
    between: Callable[[], object] = lambda: None,
    memory_format: torch.memory_format = torch.channels_last,
    precision: str | None = "fp32",
    input_gradient: str = "auto",
    graph: bool | str = "auto",
) -> Evaluation:
    """Attack `model` at `images`, batch by batch, and keep what became of each.

    An image that the model gets wrong is broken under every attack and not attacked; one that an attack broke is not attacked by
    its further restarts. What comes out is a function of the arguments: interrupted and called again with the same `folder`,
    it goes on, and ends with the same files. Called with other attacks, it adds those.

    Args:
        model: in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        images: uint8 images, or a tuple of fp32 images [N, C, H, W] in [0, 1] and labels, int64 [N].
        attacks: specs as `spat_train.attacks.parse` takes them; a str is split at commas. "clean" is always among them.
        eps, eps_l2: the radii for images in [0, 1], where an attack has none of its own.
        source: make the adversarial images on this model, and count what they do to `model` (black box).
        attack_wrong: attack images that the model gets wrong too, and count what that ends at, so that an attack may raise
            accuracy, as PGD-LS does at alpha = 1 (thesis, Fig. 5.3).
        rows: int64 [N], which images; None is all.
        seed: of everything random, with an attack's name, the number of the batch and that of the run.
        batch_size: images attacked at once.
        folder: where the evaluation is kept, and gone on with; None keeps it in memory.
        save_images: write the adversarial images, rounded to 8 bits, to images/ATTACK/BATCH.npz in the folder.
        bar: the name of a progress bar; None shows none.
        between: called after every attack on a batch (to stop by an exception).
        memory_format: of the images.
        precision, input_gradient, graph: of the attacks, as in `spat_kernels.PGD`. Predictions are in the model's own precision.

    Raises:
        InputError: an argument does not fit, or `folder` holds another evaluation.
        SaveError: the disk is full.
    """
    attacks = parse_all(attacks)
    images = Floats(*images) if isinstance(images, tuple) else images
    rows = torch.arange(len(images)) if rows is None else rows
    classes = check(model, images, rows, eps, eps_l2, seed, batch_size, memory_format, source)
    check_arithmetic(precision, input_gradient, device_of(model))
    if save_images and folder is None:
        raise InputError("save_images=True: give a folder to save them in")
    settings = {
        "weights": weights_hash(model), "source_weights": weights_hash(source) if source else None,
        "data": fingerprint(images), "rows": tensor_hash(rows), "images": len(rows), "eps": eps, "eps_l2": eps_l2,
        "attack_wrong": attack_wrong, "seed": seed, "batch_size": batch_size, "precision": precision,
        "input_gradient": input_gradient, "save_images": save_images,
    }  # fmt: skip
    folder = RunFolder(Path(folder) if folder is not None else None)
    folder.claim()
    samples = progress = None
    try:
        samples = Samples(folder.path, settings, {name: attack.spec for name, attack in attacks.items()})
        work = _Work(model, source or model, images, classes, settings, samples, memory_format, graph)
        often = 0.5 if sys.stderr.isatty() else 30.0  # seconds; in a file each time is a line
        total = len(rows) * len(attacks)
        progress = tqdm(total=total, desc=bar, unit="img", disable=bar is None, mininterval=often)
        for number, batch in enumerate(rows.split(batch_size)):
            missing = [name for name in attacks if (name, number) not in samples.records]
            progress.update(len(batch) * (len(attacks) - len(missing)))
            x, y = floats(images, batch if missing else batch[:0], device_of(model), memory_format)
            for name in missing:
                samples.add(work.record(attacks[name], number, batch, x, y))
                progress.update(len(batch))
                between()
    finally:
        if progress:
            progress.close()
        if samples:
            samples.close()
        folder.release()
    return _collect(samples, settings, attacks, rows, images, folder.path)


@dataclass(frozen=True)
class _Work:
    model: nn.Module
    source: nn.Module
    images: Images | Folder | Floats
    classes: int
    settings: dict
    samples: Samples
    memory_format: torch.memory_format
    graph: bool | str

    def record(self, attack: Attack, number: int, rows: Tensor, x: Tensor, y: Tensor) -> dict:
        """What `samples` keeps of an attack on a batch."""
        record = {"attack": attack.name, "batch": number}
        if attack.name == "clean":
            return record | {"predicted": predict(self.model, x).tolist()}
        settings, name = self.settings, attack.name
        eps = attack.radius(settings["eps"], settings["eps_l2"])
        clean = torch.tensor(self.samples.records["clean", number]["predicted"], device=y.device)
        predicted, x_adv = broken_by(
            attack, self.model, x, y, eps, lambda run: derived_seed(settings["seed"], name, number, run),
            clean=None if settings["attack_wrong"] else clean, source=self.source, classes=self.classes,
            precision=settings["precision"], input_gradient=settings["input_gradient"], graph=self.graph,
        )  # fmt: skip
        broken = (clean == y) & (predicted != y)
        pixels = (x_adv * 255).round().to(torch.uint8)
        rounded = pixels[broken].to(x.dtype).div_(x.new_full((1,), 255)).contiguous(memory_format=self.memory_format)
        return (
            record
            | {
                "predicted": predicted.tolist(),
                "adversarial": int(broken.sum()),
                "outside": int(
                    (~inside(x_adv, x, eps, attack.norm) | ~inside(pixels / 255, x, eps, attack.norm, LEVEL / 2)).sum()
                ),
                "rounded": int((predict(self.model, rounded) != y[broken]).sum()) if len(rounded) else 0,
                "examples": self._examples(name, number, broken, pixels),
            }
            | self._saved(name, number, rows, y, predicted, pixels)
        )

    def _examples(self, name: str, number: int, broken: Tensor, pixels: Tensor) -> list[dict]:
        before = sum(len(self.samples.records[name, earlier]["examples"]) for earlier in range(number))
        chosen = broken.nonzero()[: EXAMPLES - before, 0].tolist()
        offset = number * self.settings["batch_size"]
        return [{"index": offset + i, "image": _encoded(pixels[i].movedim(0, -1).cpu())} for i in chosen]

    def _saved(self, name: str, number: int, rows: Tensor, y: Tensor, predicted: Tensor, pixels: Tensor) -> dict:
        if not self.settings["save_images"]:
            return {}
        content = io.BytesIO()
        arrays = {"x_adv": pixels.permute(0, 2, 3, 1), "y": y, "predicted": predicted, "rows": rows}
        np.savez(content, **{key: np.ascontiguousarray(t.cpu().numpy()) for key, t in arrays.items()})
        path = self.samples.path.parent / "images" / file_name(name) / f"{number:05}.npz"
        files.make_folder(path.parent)
        files.write(path, content.getbuffer())
        return {"saved": str(path.relative_to(self.samples.path.parent))}


def inside(x_adv: Tensor, x: Tensor, eps: float, norm: str, slack: float = 0.0) -> Tensor:
    """bool [B]: in the box [0, 1] exactly, and in the ball to one rounding and `slack` in each pixel."""
    slack += torch.finfo(x.dtype).eps
    moved = (x_adv.double() - x.double()).flatten(1)
    flat = x_adv.flatten(1)
    box = ((flat >= 0) & (flat <= 1)).all(1)
    if norm == "l2":
        return box & (moved.norm(dim=1) <= eps + slack * moved.shape[1] ** 0.5)
    return box & (moved.abs() <= eps + slack).all(1)


def file_name(attack: str) -> str:
    return re.sub(r"[^\w.+=-]", "_", attack)


def _encoded(image: Tensor) -> dict:
    return {"shape": list(image.shape), "bytes": base64.b64encode(image.numpy().tobytes()).decode()}


def _decoded(image: dict) -> Tensor:
    return torch.tensor(list(base64.b64decode(image["bytes"])), dtype=torch.uint8).view(image["shape"])


def _collect(samples: Samples, settings: dict, attacks, rows: Tensor, images, folder: Path | None) -> Evaluation:
    batches = range(len(rows.split(settings["batch_size"])))
    records = {name: [samples.records[name, number] for number in batches] for name in attacks}
    attacked = {name: found for name, found in records.items() if name != "clean"}
    return Evaluation(
        settings, attacks, rows, images.labels[rows],
        predicted={name: torch.tensor([p for r in found for p in r["predicted"]]) for name, found in records.items()},
        rechecks={
            name: Recheck(*(sum(r[key] for r in found) for key in ("adversarial", "outside", "rounded")))
            for name, found in attacked.items()
        },
        examples={
            name: [Example(e["index"], _decoded(e["image"])) for r in found for e in r["examples"]]
            for name, found in attacked.items()
        },
        folder=folder,
    )  # fmt: skip


# ---- what is asked of the arguments


def check(model, images, rows, eps, eps_l2, seed, batch_size, memory_format, source=None) -> int:
    """Raise InputError where an argument of `evaluate` does not fit; return the number of classes."""
    for name, value, most in (("eps", eps, 1), ("eps_l2", eps_l2, float("inf"))):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            remedy = f", for images in [0, 1]: 8/255, not {value}" if isinstance(value, (int, float)) and value > 1 else ""
            raise InputError(f"{name}={value!r}: give a number above 0{remedy}")
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise InputError(f"{name}={value!r}: give an integer from {least} to 2**31 - 1")
    for name, each in (("model", model), ("source", source)):
        if each is not None:
            _check_mode(name, each)
    _check_images(images)
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1 or not len(rows):
        raise InputError("rows: give an int64 tensor [N] of at least one row, or None for all")
    if rows.min() < 0 or rows.max() >= len(images):
        raise InputError(f"rows: they go from {int(rows.min())} to {int(rows.max())}, there are {len(images)} images")
    classes = None
    dtype = images.x.dtype if isinstance(images, Floats) else torch.float32
    for name, each in (("model", model), ("source", source)):
        if each is not None:
            try:
                classes = try_on(each, images.image_shape, classes, memory_format, dtype)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from error
    labels = images.labels[rows]
    if labels.min() < 0 or labels.max() >= classes:
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise InputError(f"images: there is a label {wrong}, and the model has classes 0 to {classes - 1}: give those labels")
    return classes


def check_arithmetic(precision: str | None, input_gradient: str, device: torch.device) -> None:
    try:
        check_path(precision, input_gradient)
    except ValueError as error:
        raise InputError(str(error)) from error
    if precision == "tf32" and device.type != "cuda":
        raise InputError("precision='tf32': TF32 is for GPUs: use fp32 or bf16")


def _check_mode(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}: give a torch.nn.Module, not a {type(model).__name__}")
    training = next((at or type(m).__name__ for at, m in model.named_modules() if m.training), None)
    if training:
        raise InputError(f"{name}: {training} is in training mode, where outputs depend on the batch: call {name}.eval() first")


def _check_images(images: Images | Folder | Floats) -> None:
    if not isinstance(images, (Images, Folder, Floats)):
        raise InputError(f"images: give Images, a Folder or a tuple (x, y), not a {type(images).__name__}")
    labels = images.labels
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
        raise InputError("images: labels must be an int64 tensor [N]")
    if not len(labels):
        raise InputError("images: there is none: give at least one")
    if isinstance(images, Folder):
        return
    pixels, dtypes, shape = (
        (images.x, (torch.float32, torch.float64), "[N, C, H, W]")
        if isinstance(images, Floats)
        else (images.pixels, (torch.uint8,), "[N, H, W, C]")
    )
    if not isinstance(pixels, Tensor) or pixels.dtype not in dtypes or pixels.ndim != 4:
        found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise InputError(f"images: they are {found}: give {' or '.join(map(str, dtypes))} {shape}")
    if len(pixels) != len(labels):
        raise InputError(f"images: there are {len(pixels)} and {len(labels)} labels: give one label for each")
    if isinstance(images, Floats) and not bool(((pixels >= 0) & (pixels <= 1)).all()):
        low, high = float(pixels.min()), float(pixels.max())
        remedy = "divide 8-bit images by 255" if high > 2 else "normalise inside the model"
        raise InputError(f"images: values go from {low:g} to {high:g}: give them in [0, 1], {remedy}")


def weights_hash(model: nn.Module) -> str:
    """A short hash of all parameters and buffers with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of the values."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
