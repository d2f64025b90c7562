"""The loop that every evaluation shares: each attack on each batch, with restarts on what is not broken yet, and progress."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spat_kernels.attacks._common import Tally
from spat_kernels.predictions import model_logits, predictions

from ..data.images import Floats, Folder, Images, floats
from ..models.try_on import device_of
from ..runtime import logs
from ..runtime.distributed import Dealer, World
from .attack_specs import Attack


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Classes, int64 [B], by logits in full precision; -1 where one is NaN, which is no prediction."""
    return predictions(model_logits(model, x))


class Broken(NamedTuple):
    """What an attack did to a batch.

    Attributes:
        predicted: int64 [B], the first wrong class that an image was brought to, else y.
        x_adv: like x, the image with that prediction.
        part: int64 [B], index in `attack.parts` of the part that brought it there, else -1.
        forwards, backwards: int64 [B], the passes of the model that an image was in. A look at what came out counts where another
            run depends on it.
    """

    predicted: Tensor
    x_adv: Tensor
    part: Tensor
    forwards: Tensor
    backwards: Tensor


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
    budget: int | None = None,
    on_progress: Callable[[str, int], object] = lambda what, done: None,
    **attack_options,
) -> Broken:
    """All runs of `attack` on a batch, each on what is not broken yet.

    Args:
        x, y, eps, attack_options: as for `Attack.stages`.
        seed: the seed of a run, by its number.
        clean: int64 [B], what the model predicts of x: what is wrong already counts as broken and is not attacked. None attacks
            every image, and the prediction after the attack counts.
        source: the model that adversarial images are made on; None is `model`.
        classes: K, where the attack goes through targets.
        budget: forwards and backwards that an image may take part in, over all runs; None is no limit.
        on_progress: called before every part of every run with its name and the number of parts that are done.
    """
    predicted = torch.full_like(y, -1) if clean is None else clean.clone()
    images, left = x.clone(), torch.ones_like(y, dtype=torch.bool) if clean is None else clean == y
    part, runs = torch.full_like(y, -1), attack.runs(classes)
    judged = int(runs > 1)  # a forward that decides on whether the next run attacks an image
    tally, everyone = Tally(x, budget), torch.arange(len(x), device=x.device)
    for run in range(runs):
        generator = torch.Generator().manual_seed(seed(run))
        limit = {} if budget is None else {"budget": tally.left(everyone) - judged}
        only = left & ~tally.spent(everyone, attack.least_passes(classes) + judged)
        stages = attack.stages(source or model, x, y, eps, generator, run=run, only=only, **attack_options, **limit)
        spent: list[Tensor] = []
        for number, name in enumerate(attack.parts):
            now = left & only
            if not now.any():
                break
            shown = [f"run {run + 1} of {runs}"] * (runs > 1) + [name] * bool(name)
            on_progress(" ".join(shown), run * len(attack.parts) + number)
            x_adv, *spent = next(stages)
            predicted[now] = predict(model, x_adv[now])
            images[now] = x_adv[now]
            part[now & (predicted != y)] = number
            left = left & (predicted == y)
        if spent:
            tally.add(slice(None), *spent)
            tally.add(only, judged)
    return Broken(predicted, images, part, tally.forwards, tally.backwards)


@dataclass(frozen=True)
class Task:
    """One attack on one batch: its number, the rows of its images in the data set, the images and their labels."""

    name: str
    attack: Attack
    number: int
    rows: Tensor
    x: Tensor
    y: Tensor
    on_progress: Callable[[str, int], None]  # of `broken_by`


def attack_batches(
    run: Callable[[Task], None],
    model: nn.Module,
    images: Images | Folder | Floats,
    rows: Tensor,
    attacks: dict[str, Attack],
    *,
    batch_size: int,
    memory_format: torch.memory_format,
    bar: str | None,
    leave: bool,
    on_progress: Callable[[], object],
    classes: int = 2,
    finished: Callable[[str, int], bool] = lambda name, number: False,
    world: World | None = None,
    dealer: Dealer | None = None,
) -> None:
    """Call `run` for every attack on every batch that is not `finished`, batch by batch, and show the progress.

    Several processes of a `world` work in rounds: each takes a batch, and all call `on_progress` equally often, even without a
    batch in the last round. With a `dealer` each takes the next batch when it is done with one, and waits for the others in the
    end.

    Args:
        rows: int64 [N], which images.
        leave: whether the bar stays on the terminal.
        on_progress: called after every attack on a batch, and by `Task.on_progress`.
        classes: K, which the number of runs of an attack may depend on.
        finished: whether the attack `name` on batch `number` is done already, which all processes know alike.
    """
    batches = rows.split(batch_size)
    rounds = _dealt(dealer, batches) if dealer else _in_rounds(world, batches)
    total = dealer.total if dealer else lambda own: own  # a round counts the images of all
    parts = {name: attack.runs(classes) * len(attack.parts) for name, attack in attacks.items()}
    with logs.bar(len(rows) * sum(parts.values()), bar, leave=leave) as progress:

        def show(name: str, begun: int, count: int, what: str, done: int) -> None:
            progress.set_postfix_str(f"{name} {what}".strip(), refresh=bool(what))
            progress.update(total(begun + count * done) - progress.n)
            on_progress()

        own = 0
        for number, count in rounds:
            batch = batches[number] if number < len(batches) else rows[:0]
            missing = [name for name in attacks if not finished(name, number)]
            own += count * sum(parts[name] for name in attacks if name not in missing)
            progress.update(total(own) - progress.n)
            if not missing:
                continue
            x, y = floats(images, batch, device_of(model), memory_format)
            for name in missing:
                tell = partial(show, name, own, count)
                if len(batch):
                    run(Task(name, attacks[name], number, batch, x, y, tell))
                tell("", parts[name])
                own += count * parts[name]
        if dealer:
            dealer.join(partial(show, "", own, 0, "waiting for the other processes", 0))
            progress.update(total(own) - progress.n)


def _in_rounds(world: World | None, batches: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The number of this process's batch in each round, perhaps of none, and how many images the round has."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    for first in range(0, len(batches), size):
        yield first + rank, sum(map(len, batches[first : first + size]))


def _dealt(dealer: Dealer, batches: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The numbers of the batches that this process gets, and how many images each has."""
    for number in dealer.deal(len(batches)):
        yield number, len(batches[number])
