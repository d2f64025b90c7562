"""Accuracy, clean and under attack: of a finished model with everything kept (`evaluate`), or as a few numbers (`accuracies`)."""

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from spat_kernels.predictions import model_logits, predictions
from spat_kernels.settings import GradientPath, Graph, Precision

from ..data.images import Floats, Folder, Images, fingerprint, floats
from ..errors import InputError
from ..models.registry import device_of
from ..runtime import logs
from ..runtime.distributed import World
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import derived_seed, model_draws
from . import checks
from .attack_specs import Attack, parse, parse_all
from .record_log import Samples, decoded, encoded
from .result import WORST, Evaluation, Example, Recheck, wilson

__all__ = ["TEST", "WORST", "Attack", "Evaluation", "accuracies", "evaluate", "table", "validation", "wilson"]

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
    return predictions(model_logits(model, x))


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
    on_progress: Callable[[str, int], object] = lambda what, done: None,
    **how,
) -> tuple[Tensor, Tensor, Tensor]:
    """All runs of `attack` on a batch, each on what is not broken yet.

    Args:
        x: images [B, C, H, W] in [0, 1]. y: int64 [B], their labels.
        eps: the radius.
        seed: of a run by its number.
        clean: int64 [B], what the model predicts of x: what is wrong already counts as broken and is not attacked. None attacks
            every image, and what counts is where that ends.
        source: the model that adversarial images are made on; None is `model`.
        classes: K, where the attack goes through targets.
        between: called before every part of every run with what comes, and with how many parts of all runs are done (to show
            it, or to stop by an exception).
        how: of `Attack.__call__`.

    Returns:
        predicted: int64 [B], the first wrong class that an image was brought to, else y.
        x_adv: like x, the image with that prediction.
        part: int64 [B], index in `attack.parts` of what brought it there, else -1.
    """
    predicted = torch.full_like(y, -1) if clean is None else clean.clone()
    images, left = x.clone(), torch.ones_like(y, dtype=torch.bool) if clean is None else clean == y
    part, runs = torch.full_like(y, -1), attack.runs(classes)
    for run in range(runs):
        generator = torch.Generator().manual_seed(seed(run))
        stages = attack.stages(source or model, x, y, eps, generator, run=run, only=left, **how)
        for number, name in enumerate(attack.parts):
            if not left.any():
                return predicted, images, part
            shown = [f"run {run + 1} of {runs}"] * (runs > 1) + [name] * bool(name)
            on_progress(" ".join(shown), run * len(attack.parts) + number)
            x_adv = next(stages)
            predicted[left] = predict(model, x_adv[left])
            images[left] = x_adv[left]
            part[left & (predicted != y)] = number
            left = left & (predicted == y)
    return predicted, images, part


def _always(value: int) -> Callable[[int], int]:
    return lambda run: value


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
    on_progress: Callable[[], object] = lambda: None,
    bar: str | None = None,
    memory_format: torch.memory_format = torch.channels_last,
    **how,
) -> dict[str, float]:
    """Accuracy in percent under each attack, the model in eval mode and given back in the mode it came in.

    Every image is attacked, those that the model gets wrong too.

    Args:
        model: images [B, C, H, W] in [0, 1] -> logits [B, K].
        attacks: by name, of one run each: `evaluate` is for restarts and for all targets.
        eps: radius for images in [0, 1].
        rows: int64 [N], which images; None is all.
        seed: of the random starts, which depend on it, on `batch_size` and on a batch's place alone.
        world: processes that share the batches; each gets the same result.
        between: called after every attack on a batch, equally often in every process (to stop by an exception).
        bar: the name of a progress bar; None shows none.
        memory_format: of the images.
        how: `precision`, `input_gradient`, `graph` of the attacks.
    """
    if several := next((attack for attack in attacks.values() if attack.runs(3) > 1), None):
        raise InputError(f"attack {several.name}: it has several runs: use spat_train.evaluation.evaluate.evaluate")
    rows = torch.arange(len(images)) if rows is None else rows
    device = device_of(model)
    rank, size = (world.rank, world.size) if world else (0, 1)
    correct = dict.fromkeys(attacks, 0)
    training = model.training
    progress = logs.bar(len(rows) * len(attacks), bar, leave=False)
    batches = rows.split(batch_size)
    model.eval()
    try:
        for first in range(0, len(batches), size):  # as many rounds for every process: the last may be without a batch
            number, shared = first + rank, sum(map(len, batches[first : first + size]))
            x, y = floats(images, batches[number] if number < len(batches) else rows[:0], device, memory_format)
            for name, attack in attacks.items():
                if len(x):
                    predicted, *_ = broken_by(attack, model, x, y, eps, _always(seed + number), **how)
                    correct[name] += int((predicted == y).sum())
                progress.update(shared)  # by all processes
                on_progress()
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
    on_progress: Callable[[], object] = lambda: None,
    memory_format: torch.memory_format = torch.channels_last,
    precision: Precision | None = "fp32",
    input_gradient: GradientPath = "auto",
    graph: Graph = "auto",
) -> Evaluation:
    """Attack `model` at `images`, batch by batch, and keep what became of each.

    An image that the model gets wrong is broken under every attack and not attacked; one that an attack broke is not attacked by
    its further restarts. What comes out is a function of the arguments: interrupted and called again with the same `folder`,
    it goes on, and ends with the same files. Called with other attacks, it adds those.

    Args:
        model: in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        images: uint8 images, or a tuple of images [N, C, H, W] in [0, 1], fp32 (or fp64, with precision=None), and labels,
            int64 [N].
        attacks: specs as `attack_specs.parse` takes them; a str is split at commas. "clean" is always among them.
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
        between: called after every attack on a batch, and before its runs and parts (to stop by an exception).
        memory_format: of the images. A model that fails on it gets contiguous ones, which `settings` then say.
        precision, input_gradient, graph: of the attacks, as in `spat_kernels.PGD`. Predictions are in the model's own precision.

    In the folder, for batches of B images:

        settings.json            what the results depend on, and the attacks
        samples.jsonl            a line for each attack on each batch; AutoAttack's has `part`, the index of what broke each
        images/ATTACK/BATCH.npz  x_adv: uint8 [B, H, W, C]; y, predicted, rows: int64 [B]
        evaluation.json          by `spat-train evaluate`:
            about, settings, versions, classes
            attacks              by name: spec, settings in words, source
            results              by name, and "worst case": accuracy and interval in percent, broken (wrong ones included);
                                 of AutoAttack "after": the same after each of its parts
            checked              by name: adversarial, outside, rounded (`spat_train.evaluation.result.Recheck`)
            alarms               name, numbers, raised, meaning
            samples              by image: row in the data set, label, broken_by (names), predicted (by name; -1 is NaN)

    Raises:
        InputError: an argument does not fit, or `folder` holds another evaluation.
        SaveError: the disk is full.
    """
    parsed = parse_all(attacks)
    checks.check_numbers(eps, eps_l2, seed, batch_size)
    images = checks.check_images(images)
    rows = checks.check_rows(rows, len(images))
    classes, memory_format = checks.check_models(model, source, images, images.labels[rows], memory_format, parsed)
    checks.check_attacks(parsed, classes, eps, eps_l2, images.image_shape, black_box=source not in (None, model))
    x, _ = floats(images, rows[:2], device_of(model), memory_format)
    checks.check_arithmetic(source or model, x, precision, input_gradient, graph)
    if save_images and folder is None:
        raise InputError("save_images=True: give a folder to save them in")
    settings = {
        "weights": weights_hash(model), "source_weights": weights_hash(source) if source else None,
        "data": fingerprint(images, contents=True), "rows": tensor_hash(rows), "images": len(rows), "eps": eps, "eps_l2": eps_l2,
        "attack_wrong": attack_wrong, "seed": seed, "batch_size": batch_size, "precision": precision,
        "input_gradient": input_gradient, "save_images": save_images,
        "memory_format": None if memory_format == torch.channels_last else "contiguous",
    }  # fmt: skip
    work = _Work(model, source or model, classes, parsed, settings, memory_format, graph)
    place = RunFolder(Path(folder) if folder is not None else None)
    place.claim()
    try:
        with closing(Samples(place.path, settings, {name: attack.spec for name, attack in parsed.items()})) as samples:
            parsed |= _earlier(samples, -(-len(rows) // batch_size), parsed)
            work.all(samples, images, rows, bar, on_progress)
    finally:
        place.release()
    return _collect(samples, settings, parsed, classes, rows, images.labels[rows])


def _earlier(samples: Samples, batches: int, others: dict[str, Attack]) -> dict[str, Attack]:
    """The attacks besides `others` that the folder has the results of."""
    found = {}
    for name, spec in samples.finished(batches).items():
        if name not in others:
            try:
                found[name] = replace(parse(spec), name=name)
            except InputError as error:  # an attack or a loss of one's own, which another program defined
                print(f"spat-train: {samples.folder} has results of {name}, which are left out: {error}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class _Work:
    model: nn.Module
    source: nn.Module
    classes: int
    attacks: dict[str, Attack]
    settings: dict
    memory_format: torch.memory_format
    graph: Graph

    def all(self, samples: Samples, images, rows: Tensor, bar: str | None, on_progress: Callable[[], object]) -> None:
        """What is not among the samples yet."""
        parts = {name: attack.runs(self.classes) * len(attack.parts) for name, attack in self.attacks.items()}
        with logs.bar(len(rows) * sum(parts.values()), bar) as progress:

            def show(name: str, begun: int, size: int, what: str, done: int) -> None:
                progress.set_postfix_str(f"{name} {what}".strip(), refresh=bool(what))
                progress.update(begun + size * done - progress.n)
                on_progress()

            for number, batch in enumerate(rows.split(self.settings["batch_size"])):
                missing = [name for name in self.attacks if (name, number) not in samples.records]
                progress.update(len(batch) * sum(count for name, count in parts.items() if name not in missing))
                if not missing:
                    continue
                x, y = floats(images, batch, device_of(self.model), self.memory_format)
                for name in missing:
                    tell = partial(show, name, progress.n, len(batch))
                    with model_draws(x.device, self.settings["seed"], name, number):
                        if name == "clean":
                            found = {"predicted": predict(self.model, x).tolist()}
                        else:
                            found = self.attack(samples, name, number, batch, x, y, tell)
                    samples.add({"attack": name, "batch": number} | found)
                    tell("", parts[name])

    def attack(self, samples: Samples, name: str, number: int, rows: Tensor, x: Tensor, y: Tensor, on_progress) -> dict:
        """What became of a batch, and its adversarial images looked at again."""
        attack, settings = self.attacks[name], self.settings
        eps = attack.radius(settings["eps"], settings["eps_l2"])
        clean = torch.tensor(samples.records["clean", number]["predicted"], device=y.device)
        predicted, x_adv, part = broken_by(
            attack, self.model, x, y, eps, lambda run: derived_seed(settings["seed"], name, number, run),
            clean=None if settings["attack_wrong"] else clean, source=self.source, classes=self.classes,
            on_progress=on_progress, precision=settings["precision"], input_gradient=settings["input_gradient"], graph=self.graph,
        )  # fmt: skip
        broken = (clean == y) & (predicted != y)
        pixels = (255 * x_adv).round().to(torch.uint8)
        rounded = pixels.to(x.dtype).div_(x.new_full((1,), 255))
        outside = ~inside(x_adv, x, eps, attack.norm) | ~inside(rounded, x, eps, attack.norm, slack=LEVEL / 2)
        still = predict(self.model, rounded[broken]) != y[broken] if broken.any() else broken[:0]
        pixels, at = pixels.permute(0, 2, 3, 1).cpu(), number * settings["batch_size"]
        wanted = EXAMPLES - sum(len(samples.records[name, before]["examples"]) for before in range(number))
        if settings["save_images"]:
            samples.save(name, number, x_adv=pixels, y=y, predicted=predicted, rows=rows)
        return {
            "predicted": predicted.tolist(),
            "adversarial": int(broken.sum()), "outside": int(outside.sum()), "rounded": int(still.sum()),
            "examples": [{"index": at + i, "image": encoded(pixels[i])} for i in broken.nonzero()[:wanted, 0].tolist()],
        } | ({"part": part.where(broken, -1).tolist()} if len(attack.parts) > 1 else {})  # fmt: skip


def inside(x_adv: Tensor, x: Tensor, eps: float, norm: str, slack: float = 0.0) -> Tensor:
    """bool [B]: in the box [0, 1] exactly, and in the ball to one rounding and `slack` in each pixel."""
    slack += torch.finfo(x.dtype).eps
    moved = (x_adv.double() - x.double()).flatten(1)
    flat = x_adv.flatten(1)
    box = ((flat >= 0) & (flat <= 1)).all(1)
    if norm == "l2":
        return box & (moved.norm(dim=1) <= eps + slack * moved.shape[1] ** 0.5)
    return box & (moved.abs() <= eps + slack).all(1)


def _collect(
    samples: Samples, settings: dict, attacks: dict[str, Attack], classes: int, rows: Tensor, labels: Tensor
) -> Evaluation:
    batches = range(-(-len(rows) // settings["batch_size"]))
    records = {name: [samples.records[name, number] for number in batches] for name in attacks}
    attacked = {name: found for name, found in records.items() if name != "clean"}
    return Evaluation(
        settings, attacks, classes, rows, labels,
        predicted={name: torch.tensor([p for r in found for p in r["predicted"]]) for name, found in records.items()},
        part={
            name: torch.tensor([p for r in found for p in r["part"]])
            for name, found in attacked.items() if all("part" in r for r in found)
        },
        rechecks={
            name: Recheck(*(sum(r[key] for r in found) for key in ("adversarial", "outside", "rounded")))
            for name, found in attacked.items()
        },
        examples={
            name: [Example(e["index"], decoded(e["image"])) for r in found for e in r["examples"]]
            for name, found in attacked.items()
        },
        folder=samples.folder,
    )  # fmt: skip


def weights_hash(model: nn.Module) -> str:
    """A short hash of all parameters and buffers with their names, and of the modules with the settings that they print: an
    activation, a stride or a dilation leaves no trace in the weights."""
    kinds = " ".join(f"{name} {type(m).__name__}({m.extra_repr()})" for name, m in model.named_modules())
    # Without the addresses of functions and the devices of parameters in lists, which are not alike everywhere.
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+| \((cuda|xpu|mps)[^)]*\)", "", kinds).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def tensor_hash(tensor: Tensor) -> str:
    """A short hash of the values."""
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
