"""One training step by each method, ours against the authors' loops.

    python -m benchmarks.training --model wrn-16-4 --batch 64 --out benchmarks/results/cpu/training.json

Ours is the trainer's own step (`spat_train.training.step.TrainStep`: attack, update, optimiser, and reading the loss).
"authors" is the loop that the method was published with, written out here from its formulas: fp32, contiguous,
`torch.autograd.grad` in eval mode for the attack. TRADES computes the clean probabilities again in every step of its attack and
runs three forwards in train mode for the update; MART runs two, Madry one. The same loop under autocast in channels_last, and
compiled as well, are rivals. All start alike: uniformly in the ball for Madry, at x + 0.001 randn for the others.

Before anything is timed, ours and the authors' loop must find the same examples from the same start on a small model, and have
the same loss and gradients on the same examples (`verify`). Then each provider makes one update of the same weights on the
same batch, which must be what the authors' does (`Expected`), or it is recorded and not timed.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.judge import CLASSES, photographs
from benchmarks.measure import DTYPES, numerics
from benchmarks.rivals import EPS, STEP, ascend, uniform
from benchmarks.tables import SETTINGS, environment, fastest, markdown, ratio
from spat_train.config import Config
from spat_train.models.registry import create
from spat_train.objectives import METHODS as OBJECTIVES
from spat_train.runtime.seeding import derived_seed
from spat_train.training.free import make_step
from spat_train.training.step import Launched, Objective

METHODS = "madry", "trades", "mart"
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}  # a small lr: the same batch comes again and again

Update = Callable[[Tensor, Tensor], Tensor]

# --- the authors' loops ---


def inner_loss(method: str, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What the examples maximise."""
    if method == "trades":
        return F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="sum")
    return F.cross_entropy(model(x_adv), y)


def outer_loss(method: str, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """What the weights minimise; the formulas of `spat_train.objectives`, with the forwards that the authors' code runs."""
    if method == "madry":
        return F.cross_entropy(model(x_adv), y)
    clean = model(x)
    if method == "trades":
        kl = F.kl_div(model(x_adv).log_softmax(1), model(x).softmax(1), reduction="batchmean")
        return F.cross_entropy(clean, y) + OBJECTIVES[method].beta * kl
    adv = model(x_adv)
    p, q, label = clean.softmax(1), adv.softmax(1), F.one_hot(y, clean.shape[1]).bool()
    bce = F.cross_entropy(adv, y) - torch.log(1.0001 - q.masked_fill(label, 0).amax(1) + 1e-12).mean()
    kl = F.kl_div(torch.log(q + 1e-12), p, reduction="none").sum(1)
    return bce + OBJECTIVES[method].beta * (kl * (1.0000001 - p[label])).mean()


class Authors:
    """The published loop on a copy of `model`: called with a batch, it updates the weights once and returns the loss.

    Args:
        precision: "fp32" or "tf32": as published. "bf16", "fp16": under autocast, channels_last.
        compiled: by torch.compile, and with parameters frozen in the attack, since it would differentiate all that ask for it.
    """

    def __init__(self, model: nn.Module, method: str, steps: int, precision: str = "fp32", compiled: bool = False):
        self.tuned = precision in ("bf16", "fp16")
        layout = torch.channels_last if self.tuned else torch.contiguous_format
        self.model = copy.deepcopy(model).to(memory_format=layout)
        self.network = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.method, self.steps, self.dtype, self.layout, self.compiled = method, steps, DTYPES[precision], layout, compiled
        self.optimizer = torch.optim.SGD(self.model.parameters(), **SGD)
        self.scaler = torch.amp.GradScaler(next(model.parameters()).device.type, enabled=precision == "fp16")

    def __call__(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=self.layout)
        if start is None:
            start = uniform(x) if self.method == "madry" else x + 0.001 * torch.randn_like(x)
        self.model.eval().requires_grad_(not self.compiled)
        with self.autocast():  # around all steps: it caches the casts of weights that require a gradient
            self.x_adv = self.examples(x, y, start)
        self.model.train().requires_grad_(True)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = outer_loss(self.method, self.logits, self.x_adv, x, y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def examples(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        def gradient(x_adv: Tensor) -> Tensor:
            return torch.autograd.grad(self.scaler.scale(inner_loss(self.method, self.logits, x_adv, x, y)), x_adv)[0]

        return ascend(x, start, self.steps, gradient)

    def autocast(self):
        return torch.autocast(next(self.model.parameters()).device.type, self.dtype, enabled=self.tuned)

    def logits(self, x: Tensor) -> Tensor:
        z = self.network(x)
        return z.float() if self.tuned else z


# --- ours ---


def settings(model: str, batch: int, method: str, precision: str, device: str, steps: int, **options) -> Config:
    """The trainer's options that do what `Authors` does."""
    start = "uniform" if method == "madry" else "normal"
    chosen = {"holdout": 0, "test": False, "track": "none", "start": start, "step_size": 255 * STEP, "eps": 255 * EPS}
    return Config(
        model=model, batch_size=batch, method=method, precision=precision, device=device, steps=steps,
        data="images", **chosen | SGD | options,
    )  # fmt: skip


class Ours:
    """The trainer's own step, from the weights of `model`; the interface of `Authors`."""

    def __init__(self, model: nn.Module, config: Config):
        self.model = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
        self.config, self.step, self.count = config, make_step(config, self.model), 0
        self.launched: Launched | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # as the loader gives it
        seed = derived_seed(self.config.seed, self.count, 0)
        before, self.launched = self.launched, self.step(x, y, epoch=0, part=1.0, seed=seed)
        self.count += 1
        if before:
            before.read()  # as the trainer does: the loss of one step during the next
        self.x_adv = self.launched.x_adv
        return self.launched.values[0]  # on its way from the device


# --- providers ---


@dataclass(frozen=True)
class Provider:
    """`build(model, method)` gives an update that starts from the weights of `model`."""

    name: str
    precision: str
    build: Callable[[nn.Module, str], Update]
    note: str = ""


def providers(options: "Options") -> list[Provider]:
    def ours(model: nn.Module, method: str, precision: str) -> Ours:
        return Ours(model, settings(options.model, options.batch, method, precision, options.device, options.steps))

    def authors(model: nn.Module, method: str, precision: str, compiled: bool = False) -> Authors:
        return Authors(model, method, options.steps, precision, compiled)

    cuda = options.device.startswith("cuda")
    full, half = ["fp32", "tf32"] if cuda else ["fp32"], ["bf16", "fp16"] if cuda else ["bf16"]
    found = [Provider("spat_train", p, partial(ours, precision=p)) for p in full + half]
    found += [Provider("authors", p, partial(authors, precision=p), "as published") for p in full]
    found += [Provider("autocast", p, partial(authors, precision=p), "channels_last") for p in half]
    found += [Provider("compiled autocast", "bf16", partial(authors, precision="bf16", compiled=True), "channels_last")]
    names = options.providers or [p.name for p in found]
    return [p for p in found if p.name in names and p.precision in options.precisions]


# --- agreement ---


def verify(method: str, device: str, model: str = "wrn-10-1", count: int = 16, steps: int = 3) -> None:
    """Ours and the authors' loop do the same, from the same start.

    Raises:
        AssertionError: the fp32 examples of ours differ from those of the authors' loop in fp64 on more than twice as many pixels
            (or 0.1 %) as those of the authors' in fp32 do: a gradient within rounding of 0 turns its pixel's step around. Or the
            loss or its gradients in fp64, on the same examples, differ by more than rounding.
    """
    torch.manual_seed(0)
    x = photographs(count, 32).to(device)
    y = torch.randint(CLASSES, (count,), device=device)
    network = create(model, CLASSES).to(device).train()
    config = settings(model, count, method, "fp32", device, steps, start="normal")  # which can be drawn again
    ours = Ours(network, config)
    authors, exact = Authors(network, method, steps), Authors(network.double(), method, steps)
    generator = torch.Generator(device).manual_seed(derived_seed(config.seed, 0, 0))
    start = x + 0.001 * torch.randn(x.shape, generator=generator, device=device)
    with numerics("fp32"):
        ours(x, y)
        authors(x, y, start)
    x, start = x.double(), start.double()
    exact(x, y, start)
    shares = [((loop.x_adv - exact.x_adv).abs() > 1e-6).float().mean().item() for loop in (ours, authors)]
    losses = Objective(network, config)(x, exact.x_adv, y)[0], outer_loss(method, network, exact.x_adv, x, y)
    gradients = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]) for loss in losses]
    relative = [((a - b).norm() / b.norm()).item() for a, b in (losses, gradients)]
    same = shares[0] <= 2 * shares[1] + 1e-3 and max(relative) < 1e-9
    assert same, f"{method} differs: on {shares} of the pixels, loss and gradients by {relative}"


def first(update: Update, model: nn.Module, precision: str, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """The loss, and the change of the weights from those of `model`, of one update."""
    with numerics(precision):
        loss = update(x, y)
    measure.synchronize(str(x.device))
    loss = float(loss)
    before, after = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, update.model))
    return loss, after - before


class Expected:
    """What an update does to the loss and the weights of `model`: the authors' loop in fp32, from two random starts.

    Half precision and other starts may differ by 1 % of the loss, and twice as much in direction as those two (and 0.02).
    """

    def __init__(self, model: nn.Module, method: str, steps: int, x: Tensor, y: Tensor):
        (self.loss, self.change), (_, other) = (first(Authors(model, method, steps), model, "fp32", x, y) for _ in range(2))
        self.cosine = 2 * F.cosine_similarity(other, self.change, dim=0).item() - 1.02

    def verdict(self, loss: float, change: Tensor) -> dict:
        cosine = F.cosine_similarity(change, self.change, dim=0).item()
        found = {"loss": loss, "expected_loss": self.loss, "cosine": cosine, "least_cosine": self.cosine}
        if abs(loss / self.loss - 1) <= 0.01 and cosine >= self.cosine:
            return found
        note = f"loss {loss:.4f} for {self.loss:.4f}, cosine of the change {cosine:.3f}, at least {self.cosine:.3f} expected"
        return found | {"status": "disagrees", "note": note}


# --- the race ---


@dataclass
class Options:
    """Race training steps by each method."""

    model: str = "wrn-16-4"
    batch: int = 64
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    """Some of fp32, tf32 (GPU), bf16, fp16 (GPU)."""
    providers: list[str] = field(default_factory=list)
    """Names, all by default."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    steps: int = 10
    """Gradient steps of the attack."""
    seconds: float = 20.0
    """Time to measure each provider for."""
    out: Path | None = None
    """Write raw results here, after every method. Methods that it already has are not measured again."""

    def run(self) -> Iterator[dict]:
        if self.device.startswith("cuda"):
            torch.backends.cudnn.benchmark = True  # for all alike
        settings = {"model": self.model, "batch": self.batch, "steps": self.steps, "seconds": self.seconds}
        settings["providers"] = [f"{p.name}, {p.precision}" for p in providers(self)]  # a race has all of them
        results = measure.continued(self.out, measure.begun("training", self.device, settings=settings, steps=[]))
        yield results
        wrong = {r["method"] for r in results["steps"] if r["ours"] and r["status"] != "timed"}  # these are raced again
        results["steps"] = [r for r in results["steps"] if r["method"] not in wrong]
        for method in [m for m in self.methods if m not in {r["method"] for r in results["steps"]}]:
            results["steps"] += [{"method": method} | record for record in self.race(method)]
            torch._dynamo.reset()
            measure.free(self.device)
            yield results

    def race(self, method: str) -> list[dict]:
        verify(method, self.device)
        torch.manual_seed(0)
        model = create(self.model, CLASSES).to(self.device)
        x = photographs(self.batch, 32).to(self.device)
        y = torch.randint(CLASSES, (self.batch,), device=self.device)
        expected = Expected(model, method, self.steps, x, y)
        records, calls = [], {}
        for index, provider in enumerate(providers(self)):
            record = {"provider": provider.name, "precision": provider.precision, "note": provider.note}
            records.append(record := record | {"ours": provider.name == "spat_train"})
            try:
                update = provider.build(model, method)
                record |= expected.verdict(*first(update, model, provider.precision, x, y))
            except Exception as error:  # whatever a rival raises is a result of the benchmark
                record |= {"status": "failed", "note": measure.one_line(error)}
            if "status" not in record:
                calls[index] = measure.in_precision(provider.precision, update, x, y)
        for _ in range(2 if self.device.startswith("cuda") else 0):  # the second attack of a kind is captured as a graph
            for call in calls.values():
                call()
        measure.race_records(records, calls, self.device, self.seconds)
        measure.synchronize(self.device)  # where ours broke the device, its rivals' failures are no results
        return records

    def main(self) -> None:
        for results in self.run():
            measure.write(self.out, results)
        print(full_table(results))
        measure.require_ours(results["steps"])


# --- the table ---


def full_table(results: dict, full: bool = True) -> str:
    """Every record, and how many times faster than the authors' loop in fp32 it is."""
    rows = []
    for method in dict.fromkeys(r.get("method") for r in results["steps"]):
        records = [r for r in results["steps"] if r.get("method") == method]
        base = fastest([r for r in records if r.get("provider") == "authors"], False, "fp32")
        rows += [r | {"base": base, "rival": fastest(records, False, r.get("precision"))} for r in records]
    heads = "method | precision | provider || s an update | images/s"
    cells = "{method} | {precision} | {provider} || {seconds_or_why} | {rate:.1f}"
    if not full:
        rows = [r for r in rows if r.get("provider") == "spat_train" and "median" in r]
        heads = "method | spat_train || s an update | images/s | fastest rival in that precision"
        cells = "{method} | {precision} || {median:.3f} | {rate:.1f} | {faster:.2f}x ({rival[provider]})"
    return markdown(
        results, rows, f"{heads} | authors' loop, fp32", f"{cells} | {{than_base:.2f}}x", f"{SETTINGS}.", environment,
        seconds_or_why=lambda r: f"{r['median']:.3f}" if "median" in r else f"{r['status']}: {r['note']}",
        rate=lambda r: results["settings"]["batch"] / r["median"], faster=ratio("rival", ""), than_base=ratio("base", ""),
    )  # fmt: skip


def table(results: dict) -> str:
    """A row for each method and precision: the trainer's step, and how many times faster it is than what it replaces."""
    return full_table(results, full=False)


if __name__ == "__main__":
    tyro.cli(Options, description=__doc__).main()
