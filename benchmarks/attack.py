"""Whole attacks against each other: L-infinity PGD (eps 8/255, step 2/255, random start, eval mode) on model x batch x precision.

    python -m benchmarks.attack --models wrn-16-4 preactresnet-18 --batches 64 --precisions fp32 bf16 --out attack.json

Models are initialised at random, their BatchNorm statistics calibrated; images are crops of scikit-learn's two photographs;
labels are what the model says of them. Before anything is timed, every provider attacks the same images and must agree with
the plain fp32 loop (`Judge`). One that does not, or raises, or is not installed, is recorded as such and never timed. All that
agree on a model and a batch then take turns in one process, over all precisions (`measure.race`).

Rivals run in their own favour: parameters are frozen for those that would compute weight gradients, the loops sum the loss, so
that fp16 gradients do not underflow, and the autocast loop casts its weights once an attack.

Memory is what a call needs beyond model and images. On the GPU: growth of the memory reserved (which a CUDA graph's pool is part
of) from before the provider was built to the peak of its second call, and the same of the memory allocated. On the CPU: growth of
the resident memory during the second call, in a process of its own.
"""

import copy
import ctypes
import gc
import itertools
import multiprocessing
import re
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import spat_kernels
from benchmarks import measure, report, workmodel
from benchmarks.measure import DTYPES, numerics
from spat_train.models.registry import create

EPS, STEP = 8 / 255, 2 / 255
CLASSES = 10
CHECKED = 256  # images of a batch that the judge looks at
STARTS = 4  # random starts of the judge's own attacks

Attack = Callable[[Tensor, Tensor], Tensor]

# --- providers ---


@dataclass(frozen=True)
class Provider:
    """One way to attack: `build(model)` gives a callable (x [B, 3, H, W], y [B]) -> x_adv. The model is not to be changed.

    A build that raises ImportError says that the provider is not installed.
    """

    name: str
    precision: str
    build: Callable[[nn.Module], Attack]
    ours: bool = False
    note: str = ""


def providers(device: str, steps: int = 10) -> list[Provider]:
    """Ours and the rivals, in every precision in which they run on `device`."""
    cuda = device.startswith("cuda")
    full, half = ["fp32", "tf32"] if cuda else ["fp32"], ["bf16", "fp16"]
    paths = {"spat eager": ("autograd", False), "spat plan": ("plan", False)}
    mode = "reduce-overhead" if cuda else "default"

    def spat(precision, path, graph):
        def build(model):
            attack = spat_kernels.PGD(EPS, steps=steps, step_size=STEP, precision=precision, input_gradient=path, graph=graph)
            return lambda x, y: attack(model, x, y)

        return build

    # On a GPU the graph is what is used; what the plan and the graph each bring, one precision tells.
    found = [
        Provider(name, precision, spat(precision, *path), ours=True)
        for precision in full + half
        for name, path in paths.items()
        if precision == "bf16" or not cuda
    ]
    found += [
        Provider("spat plan+graph", precision, spat(precision, "plan", True), ours=True) for precision in (full + half) * cuda
    ]
    found += [Provider("loop", precision, lambda model: plain_loop(model, steps)) for precision in full]
    found += [
        Provider("torchattacks", "fp32", lambda model: torchattacks_pgd(model, steps), note="as shipped"),
        Provider("foolbox", "fp32", lambda model: foolbox_pgd(model, steps), note="as shipped; parameters frozen"),
        Provider("ART", "fp32", lambda model: art_pgd(model, steps), note="as shipped; parameters frozen"),
    ]
    for precision in half:

        def loop(model, precision=precision):
            return autocast_loop(model, steps, precision)

        def compiled(model, precision=precision):
            return autocast_loop(model, steps, precision, compile_mode=mode)

        found.append(Provider("autocast loop", precision, loop, note="channels_last"))
        if precision == "bf16" or not cuda:  # compiling takes a minute
            found.append(
                Provider("compiled autocast loop", precision, compiled, note=f"channels_last; torch.compile, mode {mode}")
            )
    return found


def uniform(x: Tensor) -> Tensor:
    """A random start in the ball and the box."""
    return (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)


def ascend(x: Tensor, start: Tensor, steps: int, gradient: Callable[[Tensor], Tensor]) -> Tensor:
    """The loop of TRADES' and MART's code: steps of the gradient's sign, clamped to the ball and the box."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach() + STEP * gradient(x_adv.detach().requires_grad_()).sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    return x_adv


def plain_loop(model: nn.Module, steps: int) -> Attack:
    def attack(x, y):
        def gradient(x_adv):
            return torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)[0]

        return ascend(x, uniform(x), steps, gradient)

    return attack


def autocast_loop(model: nn.Module, steps: int, precision: str, compile_mode: str | None = None) -> Attack:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    if compile_mode:
        model.requires_grad_(False)  # a compiled model differentiates every parameter that asks for it
        model = torch.compile(model, mode=compile_mode, dynamic=False)
    loop = plain_loop(model, steps)

    def attack(x, y):
        # One context around all steps: it caches the casts of weights (of those that require a gradient).
        with torch.autocast(x.device.type, DTYPES[precision]):
            return loop(x.contiguous(memory_format=torch.channels_last), y)

    return attack


def torchattacks_pgd(model: nn.Module, steps: int) -> Attack:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=True)


def foolbox_pgd(model: nn.Module, steps: int) -> Attack:
    import foolbox

    model = copy.deepcopy(model).requires_grad_(False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps, random_start=True)
    return lambda x, y: attack.run(wrapped, x, y, epsilon=EPS)


def art_pgd(model: nn.Module, steps: int) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model = copy.deepcopy(model).requires_grad_(False)

    @cache
    def attack_on(shape: tuple[int, ...], device_type: str):
        loss = nn.CrossEntropyLoss()
        classifier = PyTorchClassifier(model, loss, shape[1:], CLASSES, clip_values=(0, 1), device_type=device_type)
        settings = {"norm": "inf", "eps": EPS, "eps_step": STEP, "max_iter": steps, "num_random_init": 1, "verbose": False}
        return ProjectedGradientDescent(classifier, batch_size=shape[0], **settings)

    def attack(x, y):
        x_adv = attack_on(tuple(x.shape), "gpu" if x.is_cuda else "cpu").generate(x.cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(x_adv).to(x.device)

    return attack


# --- what is attacked ---


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
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average
    with torch.no_grad():
        for batch in images.split(32):
            model(batch)
    for norm in norms:
        norm.momentum = 0.1
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


# --- one cell: a model, a batch, all providers ---


def compete(chosen: list[Provider], judge: Judge, x: Tensor, y: Tensor, device: str, seconds: float) -> list[dict]:
    """Check every provider, then time those that agree against each other: one record each.

    A record has `provider`, `precision`, `ours` and `status`: "timed" (with `seconds`, a list; `median`, `min` and, on the GPU,
    the memory), "disagrees", "failed" or "absent", explained in `note`.
    """
    records, calls = [], {}
    for provider in chosen:
        record, call = admit(provider, judge, x, y, device)
        records.append(record)
        if call:
            calls[len(records) - 1] = call
        free(device)
    times, errors = measure.race(calls, device, seconds)
    for index, error in errors.items():
        records[index] |= {"status": "failed", "note": error}
    for index, taken in times.items():
        records[index] |= {"status": "timed", "seconds": taken, "median": statistics.median(taken), "min": min(taken)}
    return records


def admit(provider: Provider, judge: Judge, x: Tensor, y: Tensor, device: str) -> tuple[dict, Callable[[], Tensor] | None]:
    """The record of a provider before the race, and what to time if it agrees with the judge."""
    record = {"provider": provider.name, "precision": provider.precision, "ours": provider.ours, "note": provider.note}
    try:
        before = reserved(device)
        with numerics(provider.precision), warnings.catch_warnings():
            if provider.ours:  # such as that nothing could be captured, so that what is timed would not be what is named
                warnings.simplefilter("error", RuntimeWarning)
            attack = provider.build(judge.model)
            x_adv = attack(x, y)
        call = in_precision(provider.precision, attack, x, y)
        record |= judge.verdict(x_adv, provider.precision)
        if record["note"].startswith("disagrees"):
            return record | {"status": "disagrees"}, None
        return record | {"status": "agrees"} | peak(before, call, device), call
    except ImportError as error:
        return record | {"status": "absent", "note": measure.one_line(error)}, None
    except Exception as error:  # whatever a rival raises is a result of the benchmark
        return record | {"status": "failed", "note": measure.one_line(error)}, None


def in_precision(precision: str, attack: Attack, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def call():
        with numerics(precision):
            return attack(x, y)

    return call


def free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def reserved(device: str) -> tuple[int, int] | None:
    """Bytes (reserved, allocated) on the GPU, all caches emptied."""
    free(device)
    return (torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)) if device.startswith("cuda") else None


def peak(before: tuple[int, int] | None, call: Callable[[], object], device: str) -> dict:
    """Growth of the GPU's memory from `before` to the peak of `call`, in MiB."""
    if before is None:
        return {}
    free(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    after = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
    return dict(zip(("peak_mib", "allocated_mib"), ((b - a) / 2**20 for a, b in zip(before, after, strict=True)), strict=True))


def resident_growth(model: str, size: int, batch: int, provider: str, precision: str, steps: int, threads: int) -> float:
    """MiB by which the second call's peak exceeds the resident memory before it. For a fresh process, on Linux."""
    torch.set_num_threads(threads)
    network = create(model, CLASSES).eval()
    x, y = torch.rand(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    build = next(p.build for p in providers("cpu", steps) if (p.name, p.precision) == (provider, precision))
    attack = build(network)
    attack(x, y)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, and is counted again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    attack(x, y)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    return int(re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


def add_resident_growth(records: list[dict], model: str, size: int, steps: int) -> None:
    pool = multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1)
    for record in records:
        if record["status"] == "timed":
            cell = model, size, record["batch"], record["provider"], record["precision"], steps, torch.get_num_threads()
            record["peak_mib"] = pool.apply(resident_growth, cell)
    pool.close()
    pool.join()


# --- the matrix ---


@dataclass
class Options:
    """Race PGD implementations on models, batches and precisions. Prints a table; writes raw results and plots if asked."""

    models: list[str] = field(default_factory=lambda: ["wrn-16-4", "preactresnet-18"])
    """Names of spat_train.models, with "@SIZE" for images that are not 32x32 (resnet-18@96)."""
    batches: list[int] = field(default_factory=lambda: [64])
    """Batch sizes, the outer loop: put first what matters most."""
    precisions: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    """Of fp32, tf32 (GPU), bf16, fp16."""
    providers: list[str] = field(default_factory=list)
    """Names, all by default."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    steps: int = 10
    """Gradient steps of an attack."""
    seconds: float = 2.0
    """Time to measure each provider of a cell for."""
    memory: bool = True
    """Measure memory. On the CPU this takes a process for each provider."""
    small_ceilings: bool = False
    """Measure the ceilings on small matrices: for rehearsals."""
    out: Path | None = None
    """Write raw results here, after every cell. Cells that it already has are not measured again."""
    write_plots: Path | None = None
    """Write throughput.png and roofline.png into this folder."""


def run(options: Options) -> Iterator[dict]:
    """The results so far, before the first cell and after each."""
    chosen = [p for p in providers(options.device, options.steps) if p.precision in options.precisions]
    unknown = set(options.providers) - {p.name for p in chosen}
    if unknown or not chosen:
        names = ", ".join(sorted({p.name for p in providers(options.device, options.steps)}))
        wrong = f"--providers {' '.join(unknown)} --precisions {' '.join(options.precisions)}"
        raise SystemExit(f"{wrong}: choose from {names}")
    chosen = [p for p in chosen if not options.providers or p.name in options.providers]
    if options.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True  # for all alike
    settings = {"eps": EPS, "step_size": STEP, "steps": options.steps, "seconds": options.seconds, "memory": options.memory}
    settings["providers"] = [f"{p.name}, {p.precision}" for p in chosen]  # a race has all of them
    fresh = {"machine": measure.describe(options.device), "settings": settings, "ceilings": {}, "cells": []}
    results = measure.continued(options.out, fresh)
    wrong = {cell_of(r) for r in results["cells"] if r["ours"] and r["status"] != "timed"}  # ours are raced again
    done = {cell_of(r) for r in results["cells"]} - wrong
    precisions = list(dict.fromkeys(p.precision for p in chosen))
    # On a noisy CPU all take turns; on a GPU each precision is written when it is there.
    races = [[precision] for precision in precisions] if options.device.startswith("cuda") else [precisions]
    if not results["ceilings"]:
        results["ceilings"] = measure.ceilings(options.device, options.precisions, small=options.small_ceilings)
    yield results
    prepared: dict[str, tuple[Judge, list[workmodel.Layer]]] = {}
    for batch in options.batches:
        for model, race in itertools.product(options.models, races):
            cells = {(model, batch, precision) for precision in race}
            if cells <= done:
                continue
            name, _, size = model.partition("@")
            size = int(size or 32)
            if model not in prepared:
                prepared[model] = prepare(name, size, max(*options.batches, 128), options)
            judge, layers, x, y = prepared[model]
            racing = [p for p in chosen if p.precision in race]
            records = compete(racing, judge, x[:batch].clone(), y[:batch].clone(), options.device, options.seconds)
            measure.synchronize(options.device)  # where ours broke the device, its rivals' failures are no results
            for record in records:
                work = workmodel.Work(layers, batch, record["precision"])
                record |= {"model": model, "batch": batch, "flops": work.flops, "bytes": work.bytes}
                record["limit"] = work.limits(results["ceilings"])
            if options.memory and options.device == "cpu":
                add_resident_growth(records, name, size, options.steps)
            results["cells"] = [r for r in results["cells"] if cell_of(r) not in cells] + records
            torch._dynamo.reset()
            if options.device.startswith("cuda"):
                spat_kernels.graphs.free(judge.model)  # the next batch is to find the GPU's memory empty
            free(options.device)
            yield results


def cell_of(record: dict) -> tuple[str, int, str]:
    return record["model"], record["batch"], record["precision"]


def prepare(name: str, size: int, count: int, options: Options) -> tuple[Judge, list[workmodel.Layer], Tensor, Tensor]:
    x = photographs(count, size).to(options.device)
    model = calibrated(name, x[:128])
    with torch.no_grad():
        y = torch.cat([model(part).argmax(1) for part in x.split(CHECKED)])
    judge = Judge(model, x[: max(options.batches)], y, options.steps)
    return judge, workmodel.layers(model, tuple(x.shape[1:])), x, y


def main(options: Options) -> None:
    shown = 0
    for results in run(options):
        measure.write(options.out, results)
        if results["cells"][shown:]:
            print(report.attack_table(results | {"cells": results["cells"][shown:]}), flush=True)
        shown = len(results["cells"])
    if options.write_plots:
        from benchmarks import plots

        options.write_plots.mkdir(parents=True, exist_ok=True)
        plots.throughput(results, options.write_plots / "throughput.png")
        plots.roofline(results, options.write_plots / "roofline.png")
    measure.require_ours(results["cells"])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
