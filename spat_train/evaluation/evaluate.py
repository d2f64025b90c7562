"""Accuracy, clean and under attack: of a finished model with everything kept (`evaluate`), or as a few numbers (`accuracies`)."""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from spat_kernels.settings import GradientPath, Graph, Precision

from ..data.images import Floats, Folder, Images, fingerprint, floats
from ..errors import InputError
from ..models.try_on import device_of
from ..runtime import rounding
from ..runtime.distributed import ALONE, Dealer, World
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import derived_seed, model_draws
from . import checks
from .attack_specs import Attack, parse, parse_all
from .batches import Task, attack_batches, broken_by, predict
from .record_log import Samples, tensor_hash, weights_hash
from .records import decoded, encoded
from .result import Evaluation, Example, Recheck, text_table

BATCH = 512
LEVEL = 1 / 255

# The columns of the thesis's tables 6.1 and 6.2.
TEST = {"clean": parse("clean"), "FGSM": parse("fgsm"), "PGD-20": parse("pgd-20"), "C&W-inf-30": parse("cw-30")}


def validation(steps: int) -> dict[str, Attack]:
    return {"clean": TEST["clean"], "pgd": parse(f"pgd:steps={steps}:step=1/4")}


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
    **attack_options,
) -> dict[str, float]:
    """Accuracy in percent under each attack, with the model in eval mode; afterwards it is in the mode that it was in.

    Every image is attacked, those that the model gets wrong too.

    Args:
        model: images [B, C, H, W] in [0, 1] -> logits [B, K].
        attacks: by name, each of one run: `evaluate` is for restarts and for all targets.
        eps: radius for images in [0, 1].
        rows: int64 [N], which images; None is all.
        seed: seeds the random starts, which depend on it, on `batch_size` and on a batch's place alone.
        world: processes that share the batches; each gets the same result.
        on_progress: called after every attack on a batch, equally often in every process (to stop by an exception).
        bar: the name of a progress bar; None shows none.
        memory_format: of the images.
        attack_options: `precision`, `input_gradient`, `graph` of the attacks.
    """
    if several := next((attack for attack in attacks.values() if attack.runs(3) > 1), None):
        raise InputError(f"attack {several.name}: it has several runs: use spat_train.evaluate")
    rows = torch.arange(len(images)) if rows is None else rows
    correct = dict.fromkeys(attacks, 0)

    def run(task: Task) -> None:
        predicted, *_ = broken_by(task.attack, model, task.x, task.y, eps, lambda run: seed + task.number, **attack_options)
        correct[task.name] += int((predicted == task.y).sum())

    training = model.training
    model.eval()
    try:
        attack_batches(
            run, model, images, rows, attacks, batch_size=batch_size, memory_format=memory_format, bar=bar, leave=False,
            on_progress=on_progress, world=world,
        )  # fmt: skip
    finally:
        model.train(training)
    counts = world.add(*correct.values()) if world else list(correct.values())
    return {name: 100 * count / len(rows) for name, count in zip(attacks, counts, strict=True)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Models down, attacks across, in percent."""
    columns = list(next(iter(rows.values())))
    lines = [(model, *(f"{row[name]:.1f}" for name in columns)) for model, row in rows.items()]
    return text_table([("accuracy, %", *columns), *lines])


# ---- with everything kept


def evaluate(
    model: nn.Module,
    images: Images | Folder | Floats | tuple[Tensor, Tensor],
    attacks: Sequence[str | Attack] | str,
    *,
    eps: float,
    eps_l2: float = 0.5,
    eps_l1: float = 12.0,
    source: nn.Module | None = None,
    attack_wrong: bool = False,
    budget: int | None = None,
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
    world: World | None = None,
) -> Evaluation:
    """Attack `model` at `images`, batch by batch, and keep the outcome for each image.

    An image that the model gets wrong is broken under every attack and not attacked; one that an attack broke is not attacked by
    its further restarts. The result is a function of the arguments: interrupted and called again with the same `folder`, it goes
    on, and ends with the same files. Called with other attacks, it adds those.

    Args:
        model: in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        images: uint8 images, or a tuple of images [N, C, H, W] in [0, 1], fp32 (or fp64, with precision=None), and labels,
            int64 [N].
        attacks: specs as `attack_specs.parse` takes them; a str is split at commas. "clean" is always among them.
        eps, eps_l2, eps_l1: the radii for images in [0, 1], where an attack has none of its own.
        source: make the adversarial images on this model, and count what they do to `model` (black box).
        attack_wrong: attack images that the model gets wrong too, and count what that ends at, so that an attack may raise
            accuracy, as PGD-LS does at alpha = 1 (thesis, Fig. 5.3).
        budget: forwards and backwards that an attack may spend on an image, over all its restarts and parts; None is no limit.
        rows: int64 [N], which images; None is all.
        seed: seeds everything random, with an attack's name, the number of the batch and that of the run.
        batch_size: images attacked at once.
        folder: where the evaluation is kept, so that the same call continues it; None keeps it in memory.
        save_images: write the adversarial images, rounded to 8 bits, to images/ATTACK/BATCH.npz in the folder.
        bar: the name of a progress bar; None shows none.
        on_progress: called after every attack on a batch, and before its runs and parts (to stop by an exception).
        memory_format: of the images. A model that fails on it gets contiguous ones, which `settings` then say.
        precision, input_gradient, graph: of the attacks, as in `spat_kernels.PGD`. Predictions are in the model's own precision.
        world: the processes that share the batches, as `spat_train.runtime.distributed.world` yields them. All have to call this
            alike, on a folder that all see; each gets the result, and the files are those of one process. None is this one.

    In the folder, for batches of B images:

        settings.json            what the results depend on, and the attacks
        samples.jsonl            a line for each attack on each batch, with `forwards` and `backwards` spent on each image;
                                 AutoAttack's has `part`, the index of what broke each
        samples-RANK.jsonl       until the end: lines that one of several processes finished before those that come first
        images/ATTACK/BATCH.npz  x_adv: uint8 [B, H, W, C]; y, predicted, rows: int64 [B]
        evaluation.json          by `spat-train evaluate`:
            about, settings, versions, classes
            attacks              by name: spec, settings in words, source
            results              by name, and "worst case": accuracy and interval in percent, broken (wrong ones included);
                                 of AutoAttack "after": the same after each of its parts; forwards and backwards, the mean of
                                 the images that were attacked
            checked              by name: adversarial, outside, rounded (`spat_train.evaluation.result.Recheck`)
            alarms               name, numbers, raised, meaning
            samples              by image: row in the data set, label, broken_by (names), predicted (by name; -1 is NaN)

    The .json files and each line of samples.jsonl have a `digest` of their content.

    Raises:
        InputError: an argument does not fit, or `folder` holds another evaluation, or an altered one.
        SaveError: the disk is full.
        RuntimeError: another process of `world` ended.
    """
    world = world or ALONE
    parsed = parse_all(attacks)
    checks.check_numbers(eps, eps_l2, eps_l1, seed, batch_size, budget)
    images = checks.check_images(images)
    rows = checks.check_rows(rows, len(images))
    classes, memory_format = checks.check_models(model, source, images, images.labels[rows], memory_format, parsed)
    black_box = source not in (None, model)
    checks.check_attacks(parsed, classes, (eps, eps_l2, eps_l1), images.image_shape, black_box=black_box, budget=budget)
    x, _ = floats(images, rows[:2], device_of(model), memory_format)
    checks.check_arithmetic(source or model, x, precision, input_gradient, graph)
    if save_images and folder is None:
        raise InputError("save_images=True: give a folder to save them in")
    settings = {
        "weights": weights_hash(model), "source_weights": weights_hash(source) if source else None,
        "data": fingerprint(images, contents=True), "rows": tensor_hash(rows), "images": len(rows), "eps": eps, "eps_l2": eps_l2,
        "eps_l1": eps_l1, "attack_wrong": attack_wrong, "budget": budget, "seed": seed, "batch_size": batch_size,
        "precision": precision, "input_gradient": input_gradient, "save_images": save_images,
        "memory_format": None if memory_format == torch.channels_last else "contiguous",
    }  # fmt: skip
    place, arithmetic = RunFolder(Path(folder) if folder is not None else None), rounding.arithmetic(device_of(model))
    world.on_main(place.claim)
    try:
        specs = {name: attack.spec for name, attack in parsed.items()}
        with closing(Samples(place.path, settings, specs, world, arithmetic)) as samples:
            batches = -(-len(rows) // batch_size)
            parsed |= _earlier(samples, batches, parsed)
            samples.expect((name, number) for number in range(batches) for name in parsed)
            if samples.turns and world.main:
                rounding.say_changes(samples.begun_with, arithmetic, "what is left to do is equal but for rounding")
            attack_batches(
                _Recorder(samples, model, source or model, classes, settings, graph), model, images, rows, parsed,
                batch_size=batch_size, memory_format=memory_format, bar=bar if world.main else None, leave=True,
                on_progress=on_progress, classes=classes, finished=lambda name, number: (name, number) in samples.records,
                dealer=Dealer(world),
            )  # fmt: skip
            samples.merge()
    finally:
        place.release()
    return _collect(samples, settings, parsed, classes, rows, images.labels[rows])


def _earlier(samples: Samples, batches: int, others: dict[str, Attack]) -> dict[str, Attack]:
    """The attacks besides `others` that the folder has all results of. Where it has some, a line says so."""
    found: dict[str, Attack] = {}
    finished = samples.finished(batches)
    for name, spec in samples.attacks.items():
        left_out = ""
        if name in others:
            continue
        try:
            found |= {name: replace(parse(spec), name=name)} if name in finished else {}
        except InputError as error:  # an attack or a loss of one's own, which another program defined
            left_out = f"which are left out: {error}"
        if name not in finished and any(attack == name for attack, _ in samples.records):
            left_out = f"but not of all images: left out until --attacks {name} goes on with it"
        if left_out and samples.world.main:
            print(f"spat-train: {samples.folder} has results of {name}, {left_out}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class _Recorder:
    """Adds a record to `samples` for each task."""

    samples: Samples
    model: nn.Module
    source: nn.Module
    classes: int
    settings: dict
    graph: Graph

    def __call__(self, task: Task) -> None:
        with model_draws(task.x.device, self.settings["seed"], task.name, task.number):
            found = {"predicted": predict(self.model, task.x).tolist()} if task.name == "clean" else self.attack(task)
        self.samples.add({"attack": task.name, "batch": task.number} | found)

    def attack(self, task: Task) -> dict:
        """The outcome of an attack on a batch, whose adversarial images are checked again."""
        attack, settings, x, y = task.attack, self.settings, task.x, task.y
        eps = attack.radius(settings["eps"], settings["eps_l2"], settings["eps_l1"])
        clean = torch.tensor(self.samples.records["clean", task.number]["predicted"], device=y.device)
        predicted, x_adv, part, forwards, backwards = broken_by(
            attack, self.model, x, y, eps, lambda run: derived_seed(settings["seed"], task.name, task.number, run),
            clean=None if settings["attack_wrong"] else clean, source=self.source, classes=self.classes,
            on_progress=task.on_progress, precision=settings["precision"], input_gradient=settings["input_gradient"],
            graph=self.graph, budget=settings["budget"],
        )  # fmt: skip
        broken = (clean == y) & (predicted != y)
        pixels = (255 * x_adv).round().to(torch.uint8)
        rounded = pixels.to(x.dtype).div_(x.new_full((1,), 255))
        outside = ~inside(x_adv, x, eps, attack.norm) | ~inside(rounded, x, eps, attack.norm, slack=LEVEL / 2)
        still = predict(self.model, rounded[broken]) != y[broken] if broken.any() else broken[:0]
        pixels = pixels.permute(0, 2, 3, 1).cpu()
        if settings["save_images"]:
            self.samples.save(task.name, task.number, x_adv=pixels, y=y, predicted=predicted, rows=task.rows)
        return {
            "predicted": predicted.tolist(), "forwards": forwards.tolist(), "backwards": backwards.tolist(),
            "adversarial": int(broken.sum()), "outside": int(outside.sum()), "rounded": int(still.sum()),
            "examples": self.examples(task, pixels, broken),
        } | ({"part": part.where(broken, -1).tolist()} if len(attack.parts) > 1 else {})  # fmt: skip

    def examples(self, task: Task, pixels: Tensor, broken: Tensor) -> list[dict]:
        """The first images that the attack broke, until there are EXAMPLES of it."""
        at, wanted = task.number * self.settings["batch_size"], self.samples.wanted(task.name, task.number)
        return [{"index": at + i, "image": encoded(pixels[i])} for i in broken.nonzero()[:wanted, 0].tolist()]


def inside(x_adv: Tensor, x: Tensor, eps: float, norm: str, slack: float = 0.0) -> Tensor:
    """bool [B]: in the box [0, 1] exactly, and in the ball to one rounding and `slack` in each pixel (L1: that has moved)."""
    slack += torch.finfo(x.dtype).eps
    moved = (x_adv.double() - x.double()).flatten(1)
    flat = x_adv.flatten(1)
    box = ((flat >= 0) & (flat <= 1)).all(1)
    if norm == "l2":
        return box & (moved.norm(dim=1) <= eps + slack * moved.shape[1] ** 0.5)
    if norm == "l1":
        return box & (moved.abs().sum(1) <= eps + slack * moved.count_nonzero(1))
    return box & (moved.abs() <= eps + slack).all(1)


def _collect(
    samples: Samples, settings: dict, attacks: dict[str, Attack], classes: int, rows: Tensor, labels: Tensor
) -> Evaluation:
    batches = range(-(-len(rows) // settings["batch_size"]))
    records = {name: [samples.records[name, number] for number in batches] for name in attacks}

    def joined(key: str) -> dict[str, Tensor]:
        having = {name: found for name, found in records.items() if all(key in r for r in found)}
        return {name: torch.tensor([p for r in found for p in r[key]]) for name, found in having.items()}

    found = Evaluation(
        settings, attacks, classes, rows, labels, joined("predicted"), joined("part"), joined("forwards"), joined("backwards"),
        folder=samples.folder,
    )  # fmt: skip
    for name in list(attacks)[1:]:
        counts = (sum(r[key] for r in records[name]) for key in ("adversarial", "outside", "rounded"))
        found.rechecks[name] = Recheck(*counts)
        found.examples[name] = [Example(e["index"], decoded(e["image"])) for r in records[name] for e in r["examples"]]
    return found
