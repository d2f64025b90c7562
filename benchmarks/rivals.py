"""L-infinity PGD (eps 8/255, step 2/255, random start, eval mode) by everyone who offers it: ours, plain loops, and libraries.

Rivals run in their own favour: parameters are frozen for those that would compute weight gradients, the loops sum the loss, so
that fp16 gradients do not underflow, and the autocast loop casts its weights once an attack.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spat_kernels
from benchmarks.measure import DTYPES
from spat_kernels.settings import Fuse

EPS, STEP = 8 / 255, 2 / 255
Attack = Callable[[Tensor, Tensor], Tensor]  # x [B, 3, H, W] in [0, 1], y [B] -> x_adv


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
    # On a GPU the graph is what is used. What the plan and the graph each bring, one precision tells.
    ours = [(name, p, *path) for p in full + half for name, path in paths.items() if p == "bf16" or not cuda]
    ours += [("spat plan+graph", p, "plan", True) for p in (full + half) * cuda]
    attack = partial(spat_pgd, steps=steps)
    found = [Provider(n, p, partial(attack, precision=p, path=path, graph=graph), ours=True) for n, p, path, graph in ours]
    apart = partial(attack, path="plan", graph=True, fuse=False)
    found += [Provider("spat plan+graph, fuse=False", p, partial(apart, precision=p), ours=True) for p in half * cuda]
    found += [Provider("loop", p, partial(plain_loop, steps=steps)) for p in full]
    found += [
        Provider("torchattacks", "fp32", partial(torchattacks_pgd, steps=steps), note="as shipped"),
        Provider("foolbox", "fp32", partial(foolbox_pgd, steps=steps), note="as shipped; parameters frozen"),
        Provider("ART", "fp32", partial(art_pgd, steps=steps), note="as shipped; parameters frozen"),
    ]
    mode = "reduce-overhead" if cuda else "default"
    for p in half:
        loop = partial(autocast_loop, steps=steps, precision=p)
        found.append(Provider("autocast loop", p, loop, note="channels_last"))
        if p == "bf16" or not cuda:  # compiling takes a minute
            note = f"channels_last; torch.compile, mode {mode}"
            found.append(Provider("compiled autocast loop", p, partial(loop, compile_mode=mode), note=note))
    return found


def spat_pgd(model: nn.Module, steps: int, precision: str, path: str, graph: bool, fuse: Fuse = "auto") -> Attack:
    settings = {"precision": precision, "input_gradient": path, "graph": graph, "fuse": fuse}
    attack = spat_kernels.PGD(EPS, steps=steps, step_size=STEP, **settings)
    return lambda x, y: attack(model, x, y)


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
        with torch.autocast(x.device.type, DTYPES[precision], enabled=precision != "fp32"):
            return loop(x.contiguous(memory_format=torch.channels_last), y)

    return attack


def torchattacks_pgd(model: nn.Module, steps: int, eps: float = EPS, step: float = STEP) -> Attack:
    import torchattacks

    return torchattacks.PGD(model, eps=eps, alpha=step, steps=steps, random_start=True)


def foolbox_pgd(model: nn.Module, steps: int, eps: float = EPS, step: float = STEP, start: Tensor | None = None) -> Attack:
    """From a random start, or from `start`."""
    import foolbox

    model = copy.deepcopy(model).requires_grad_(False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=True)
    if start is not None:
        attack.get_random_start = lambda x0, epsilon: type(x0)(start.to(x0.raw.dtype))
    return lambda x, y: attack.run(wrapped, x, y, epsilon=eps)


def art_pgd(model: nn.Module, steps: int, eps: float = EPS, step: float = STEP, random_starts: int = 1) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model = copy.deepcopy(model).requires_grad_(False)
    settings = {"norm": "inf", "eps": eps, "eps_step": step, "max_iter": steps, "num_random_init": random_starts}

    @cache
    def attack_on(shape: torch.Size, device_type: str):
        classes = model(torch.zeros(1, *shape[1:], device=next(model.parameters()).device)).shape[1]
        loss = nn.CrossEntropyLoss()
        classifier = PyTorchClassifier(model, loss, shape[1:], classes, clip_values=(0, 1), device_type=device_type)
        return ProjectedGradientDescent(classifier, batch_size=shape[0], verbose=False, **settings)

    def attack(x, y):
        x_adv = attack_on(x.shape, "gpu" if x.is_cuda else "cpu").generate(x.cpu().numpy(), y.cpu().numpy())
        return torch.from_numpy(x_adv).to(x.device)

    return attack
