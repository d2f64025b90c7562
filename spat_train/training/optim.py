"""Optimiser, learning rate, weight averaging and weight perturbation, as functions of the config."""

import copy
import math
from collections.abc import Collection
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spat_kernels.ops._common import is_dense

from ..config import Config
from ..errors import InputError


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW. Without `decay_norm`, what has one dimension (biases, norms) is not decayed, nor is what the network
    names in a `no_weight_decay` of its own, as timm's do (position embeddings). A group's "lr_scale" is its share of the rate.

    Raises:
        InputError: `config.layer_decay` is for a network that does not say which layers it has.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = _groups(model, config) if config.layer_decay is None else _groups_by_layer(model, config)
    fused = all(p.is_floating_point() and is_dense(p) for p in parameters)  # what the fused kernels take for granted
    if config.optimizer != "sgd":
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(groups, lr=config.peak_lr, betas=(config.momentum, config.beta2), fused=fused)
    fused = fused and not config.fsdp  # for whose shards torch 2.11 has no fused SGD
    sgd = torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
    if config.momentum:  # a first step that GradScaler skips would leave what torch 2.11 allocates, uninitialised
        for p in parameters:
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


def _groups(model: nn.Module, config: Config) -> list[dict]:
    kept = {p for m in model.modules() if (names := _kept_names(m)) for name, p in m.named_parameters() if name in names}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if config.decay_norm or (p.ndim > 1 and p not in kept)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if not config.decay_norm:
        groups.append({"params": [p for p in parameters if p.ndim <= 1 or p in kept], "weight_decay": 0.0})
    return groups


def _kept_names(network: nn.Module) -> Collection[str]:
    """The parameters that `network` itself says are not to be decayed."""
    named: Any = getattr(network, "no_weight_decay", tuple)
    return named()


def _groups_by_layer(model: nn.Module, config: Config) -> list[dict]:
    """Layer-wise rates as for BEiT and ConvNeXt: those of a layer are `layer_decay` times those of the next one."""
    network = next((m for m in model.modules() if hasattr(m, "group_matcher")), None)
    if network is None:
        who = f"{config.model} does not say which layers it has"
        raise InputError(f"--layer-decay {config.layer_decay}: {who}: give timm:NAME, or leave it out")
    if outside := {p for p in model.parameters() if p.requires_grad} - set(network.parameters()):
        what = f"{len(outside)} weights of {config.model} are in no layer of its {type(network).__name__}"
        raise InputError(f"--layer-decay {config.layer_decay}: {what}: leave it out")
    from timm.optim import param_groups_layer_decay

    kept = () if config.decay_norm else _kept_names(network)
    settings: Any = {"weight_decay_exclude_1d": not config.decay_norm, "layer_decay": config.layer_decay}
    return param_groups_layer_decay(network, config.weight_decay, kept, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state dict, also one of a run whose weights lay otherwise, in shards: which kernels there are stays, and moments get
    the layouts of the weights, which fused kernels take for granted."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]

    def laid_out(name: str, p: Tensor, t: Tensor) -> Tensor:
        return torch.empty_like(p, dtype=t.dtype).copy_(t) if name != "step" and t.shape == p.shape else t

    moments = {
        i: {name: laid_out(name, weights[i], t) if isinstance(t, Tensor) else t for name, t in values.items()}
        for i, values in state["state"].items()
    }
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=False)  # torch compares their numbers
    groups = [saved | {"fused": own["fused"]} for saved, own in pairs]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def learning_rate(config: Config, epoch: int, part: float) -> float:
    """In epoch `epoch`, of which `part` in (0, 1] is done when the update is. A function of time alone: nothing to save."""
    t = epoch + part
    if config.schedule == "piecewise":
        factor = config.gamma ** sum(epoch + 1 >= drop for drop in config.lr_drops)
    elif config.schedule == "cosine":
        factor = _cosine(1, 0, epoch / config.epochs)  # by epochs, as RST's code: above 0 in the last
    elif config.schedule == "warmup-cosine":  # the part from the warm-up on, which is below
        factor = _cosine(1, 0, max(0.0, t - config.warmup) / (config.epochs - config.warmup))
    elif config.schedule == "one-cycle":  # Smith and Topin, arXiv 1708.07120, with PyTorch's default shape
        peak = 0.3 * config.epochs
        factor = _cosine(1 / 25, 1, t / peak) if t < peak else _cosine(1, 1 / 25e4, (t - peak) / (config.epochs - peak))
    elif config.schedule == "cyclic":  # Wong et al., arXiv 2001.03994
        factor = 1 - abs(2 * t / config.epochs - 1)
    else:
        factor = 1.0
    return config.peak_lr * factor * (min(1.0, t / config.warmup) if config.warmup else 1.0)


def _cosine(first: float, last: float, part: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2


class Average:
    """An exponential moving average of the weights and statistics of `model`, in a model of its own: `module`.

    The first of `count` updates takes the model as it is. Nothing waits for the device, as torch's AveragedModel does: it copies
    its counter there in every update.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.count = copy.deepcopy(model), decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(_tensors(self.module, True), _tensors(model, True), 1 - self.decay if self.count else 1.0)
        if counters := _tensors(self.module, False):
            torch._foreach_copy_(counters, _tensors(model, False))
        self.count += 1


def _tensors(model: nn.Module, floating: bool) -> list[Tensor]:
    """Parameters and buffers; of what is sharded, this process's part."""
    tensors = (*model.parameters(), *model.buffers())
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t.is_floating_point() == floating]


@contextmanager
def perturbed_weights(model: nn.Module, size: float):
    """Within: every weight of more than one dimension moved up its gradient (AWP, Wu et al., arXiv 2004.05884).

    By v = size ||w|| g / ||g||, with g read from `.grad`. Afterwards v is taken away again: what the optimiser did within stays,
    and without a step the weights are as before, bit for bit. The authors take g from a step of plain SGD on a copy of the model,
    which is the same but for the rounding of that step. As there, "weight" is in the name of what moves.
    """
    weights = [(p, p.grad) for name, p in model.named_parameters() if "weight" in name and p.ndim > 1 and p.grad is not None]
    undo = []
    try:
        with torch.no_grad():
            for p, grad in weights:
                grad = grad.nan_to_num(0, 0, 0)  # where fp16 overflowed, which GradScaler deals with
                moved = p + grad * (size * p.norm() / (grad.norm() + 1e-20))
                undo.append((p, p.detach().clone(), moved))
                p.copy_(moved)
        yield
    finally:
        with torch.no_grad():
            for p, w, moved in undo:
                p.copy_(w + (p - moved))


@contextmanager
def restored(tensors: list[Tensor]):
    """Within, `tensors` may change; afterwards they are as before."""
    before = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, saved in zip(tensors, before, strict=True):
                t.copy_(saved)
