"""What a step of an adversarial distribution costs: `python -m benchmarks.adt --out adt.json`.

ADT and PGD take as many gradient steps on the same model and images, in turns. The rival is ADT as its authors write it, in plain
PyTorch by autograd and torch.optim.Adam, but with one sample a step, as ours. Its noise is other, so the losses that both reach
are compared.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.judge import CLASSES, photographs
from benchmarks.tables import Formula, environment, markdown
from spat_kernels import ADT, PGD
from spat_train.models.registry import create

EPS = 8 / 255
MODELS = {"resnet-18": (32, (3, 32, 32)), "small-cnn": (50, (1, 28, 28))}  # batch, and shape of an image


@dataclass
class Options:
    """What a step of an adversarial distribution costs."""

    steps: int = 7
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seconds: float = 20.0
    """To time each attack for."""
    out: Path | None = None
    """Write the results here, after every model."""


def eager(model: nn.Module, x: Tensor, y: Tensor, steps: int, entropy: float = 0.01) -> Tensor:
    mu, rho = (torch.zeros_like(x, requires_grad=True) for _ in range(2))
    adam = torch.optim.Adam([mu, rho], lr=0.3, betas=(0.0, 0.0))

    def sample() -> tuple[Tensor, Tensor]:
        r, sigma = torch.randn_like(x), F.softplus(rho)
        tanh = torch.tanh(mu + sigma * r)
        h = r**2 / 2 + (sigma + 1e-8).log() + (1 - tanh**2 + 1e-8).log()
        return torch.clamp(x + EPS * tanh, 0, 1), h.mean()

    for _ in range(steps):
        adam.zero_grad()
        x_adv, h = sample()
        (-F.cross_entropy(model(x_adv), y) - entropy * h).backward()
        adam.step()
    return sample()[0].detach()


def compare(name: str, options: Options) -> dict:
    batch, shape = MODELS[name]
    torch.manual_seed(0)
    x = photographs(batch, shape[1])[:, : shape[0]].to(options.device)
    model = create(name, CLASSES, shape).to(options.device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # so one batch gives the statistics
    model(x)
    model.eval().requires_grad_(False)
    y = model(x).argmax(1)
    calls = {
        "PGD": lambda: PGD(EPS, steps=options.steps)(model, x, y),
        "ADT": lambda: ADT(EPS, steps=options.steps)(model, x, y),
        "eager": lambda: eager(model, x, y, options.steps),
    }
    for _ in range(2):  # the second attack of a kind is captured as a graph
        losses = {way: F.cross_entropy(model(call()), y).item() for way, call in calls.items()}
    if abs(losses["ADT"] / losses["eager"] - 1) > 0.1:
        raise SystemExit(f"{name}: ADT reaches a loss of {losses['ADT']:.3f}, its rival {losses['eager']:.3f}")
    seconds, errors = measure.race(calls, options.device, options.seconds)
    if errors:
        raise SystemExit(f"{name}: {errors}")
    return {"model": name, "batch": batch, "losses": losses, "seconds": seconds}


def table(results: dict) -> str:
    """Medians, and the medians of the ratios in each round, whose calls come one after the other."""

    def step(way: str) -> Formula:
        return lambda r: 1e3 * median(r["seconds"][way]) / results["steps"]

    def ratio(above: str, below: str) -> Formula:
        return lambda r: median(a / b for a, b in zip(r["seconds"][above], r["seconds"][below], strict=True))

    return markdown(
        results, results["models"],
        "model || batch | PGD, ms a step | ADT | of PGD's | eager ADT | of ours",
        "{model} || {batch} | {pgd:.2f} | {adt:.2f} | {ratio:.2f}x | {eager:.2f} | {eager_ratio:.2f}x",
        "Attacks of {steps} steps, fp32.", environment,
        pgd=step("PGD"), adt=step("ADT"), eager=step("eager"), ratio=ratio("ADT", "PGD"), eager_ratio=ratio("eager", "ADT"),
    )  # fmt: skip


def main(options: Options) -> None:
    results = measure.begun("adt", options.device, steps=options.steps, models=[])
    for name in MODELS:
        results["models"].append(compare(name, options))
        measure.write(options.out, results)
    print(table(results))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
