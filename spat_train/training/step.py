"""One training step: attack a batch, then update the weights. It needs no files, no loader and no log."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spat_kernels import ADT, APGD, PGD, ops
from spat_kernels.attacks._common import warn_of_nan
from spat_kernels.normalize import Normalize
from spat_kernels.ops._common import acc_dtype

from ..config import Config
from ..models.centres import CentreClassifier
from ..runtime.distributed import World
from .blocks import Checkpointing
from .optim import Average, learning_rate, load_optimizer, make_optimizer, perturbed_weights, restored

T = TypeVar("T")
Losses = tuple[Tensor, dict[str, Tensor]]  # the loss, its terms by name
# (model, x [B, C, H, W] in [0, 1], y int64 [B], generator) -> x_adv like x, nan_seen uint8 [B]
TrainingAttack = Callable[[nn.Module, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
# Called with the name of a part of a step, gives what surrounds that part: a timer, or a range of a profiler.
Span = Callable[[str], AbstractContextManager]


def spanned(span: Span, name: str, items: Iterator[T]) -> Iterator[T]:
    """`items`, with every wait for the next one in a span."""
    while True:
        with span(name):
            item = next(items, None)
        if item is None:
            return
        yield item


class Objective(nn.Module):
    """A method's loss as one module, so that DDP and torch.compile see one forward for each update.

    forward(x, x_adv, y): images [B, C, H, W] (a method that attacks nothing does not read `x_adv`), y int64 [B] -> (loss, its
    terms), in fp32 (fp64 for an fp64 model). The loss is the sum of the terms.
    """

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model = model
        self.head, reads = config.objective.head, config.objective.reads
        self.order = [kind for kind in config.forwards.split("-") if kind in reads]
        self.settings = {"beta": config.kl_weight, "label_smoothing": config.label_smoothing}

    def forward(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Losses:
        z: dict[str, Tensor] = {}
        for kind in self.order:
            images = x if kind == "clean" else x_adv
            if kind not in z:
                z[kind] = self.logits(images)
            else:  # the logits are the same again: only the statistics of batch norm move
                with torch.no_grad():
                    self.model(images)
        with torch.autocast(y.device.type, enabled=False):
            terms = self.head(z.get("clean"), z.get("adv"), y, **self.settings)
            return reduce(add, terms.values()), {name: term.detach() for name, term in terms.items()}

    def logits(self, x: Tensor) -> Tensor:
        z = self.model(x)
        return z if z.dtype == torch.float64 else z.float()


def training_attack(config: Config) -> TrainingAttack:
    """The attack of `config` as attack(model, x, y, generator) -> (x_adv, nan_seen).

    `x_adv` are the images to train on: x itself where the method attacks nothing. `nan_seen` is 1 for images whose input gradient
    had unusable elements, which counted as 0. Nothing waits for the device (see `PGD.launch`).
    """
    if not config.objective.attacks:
        return lambda model, x, y, generator: (x, torch.zeros_like(y, dtype=torch.uint8))
    eps, step_size, steps, start = config.attack_settings
    engine: dict[str, Any] = {"precision": config.precision_of_attacks, "input_gradient": config.input_gradient}
    engine |= {"graph": "auto" if config.graph == "auto" and not config.fsdp else False, "bn_mode": config.bn_mode}
    if config.objective.attack == "adt":
        attack: PGD | APGD = ADT(eps, loss=config.maximised, steps=steps, **config.adt_settings, **engine)
    elif config.attack == "apgd":
        attack = APGD(eps, loss=config.maximised, steps=steps, **engine)
    else:
        radius = 1.0 if start == "wide" else eps  # that ball holds every image: projecting onto it does nothing
        attack = PGD(radius, loss=config.maximised, steps=steps, step_size=step_size, random_start=start == "uniform", **engine)

    def perturb(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        attack.generator = generator
        noise = None
        if start == "normal":
            noise = x + 0.001 * torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
        elif start == "wide":
            noise = wide_start(x, eps, generator)
        elif start == "clean" and config.attack == "apgd":  # whose own start is random
            noise = x
        return attack.launch(model, x, y, start=noise)

    return perturb


def wide_start(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """A uniform random point of the ball of 2 eps around x, inside [0, 1]: where N-FGSM starts (arXiv 2202.01181, k = 2)."""
    seed = torch.randint(2**62, (2,), generator=generator, device=generator.device).to(x.device)
    radius = torch.full((1,), 2 * eps, dtype=acc_dtype(x.dtype), device=x.device)
    return ops.linf_random_start_(torch.empty_like(x), x, radius, seed)


@dataclass
class Launched:
    """A step that the device may still be working on: its batch, and its losses on their way to the host."""

    x: Tensor
    x_adv: Tensor
    y: Tensor
    names: list[str]  # "loss", then its terms
    values: Tensor
    nan_seen: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> dict[str, float]:
        """The loss and its terms. Waits for the device, and warns of unusable gradients in the attack."""
        if self.arrived:
            self.arrived.synchronize()
        warn_of_nan(int(self.nan_seen.sum()), len(self.nan_seen))
        return dict(zip(self.names, self.values.tolist(), strict=True))


class TrainStep:
    """Calls attack and update `model` as `config` says. Holds all that updates change: weights, averages, optimiser, scaler.

    Args:
        model: on the device of `world`, in train mode when it is called.
        world: the processes that share the batch. None: this one alone, on the model's device.
        span: surrounds "attack", "update" and, inside of it, "optimizer".
    """

    def __init__(self, config: Config, model: nn.Module, world: World | None = None, span: Span = nullcontext):
        self.config, self.model, self.span = config, model, span
        self.world = world or World(0, 1, next(model.parameters()).device)
        device = self.world.device
        kinds = (Normalize, CentreClassifier)  # their buffers stay; a mean of equal numbers over 7 processes may round to another
        fixed = {b for m in model.modules() if isinstance(m, kinds) for b in m.buffers(recurse=False)}
        self.statistics = [b for b in model.buffers() if b.is_floating_point() and b not in fixed]
        self.ema = Average(model, config.ema) if config.ema else None
        self.shards = None
        if config.fsdp:
            from .sharding import Shards  # takes a second

            self.shards = Shards(config, self.world, model, *([self.ema.module] if self.ema else []))
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        objective = Objective(model, config)
        self.objective: Callable[..., Any] = objective if config.fsdp else self.world.wrap(objective)
        if config.compile:
            self.objective = torch.compile(self.objective)
        self.checkpointed = Checkpointing(model) if config.checkpoint_activations else nullcontext
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
        self.attack = training_attack(config)
        self.generator = torch.Generator(device)

    def __call__(
        self, x: Tensor, y: Tensor, *, epoch: int, part: float, seed: int, weight: float = 1.0, length: float = 0.0
    ) -> Launched:
        """Attack and update. Nothing here waits for the device: the hundreds of launches of an update take longer than its
        kernels, and are made while the attack runs.

        Args:
            x, y: images [B, C, H, W] in [0, 1] and labels int64 [B] on the device.
            epoch: counted from 0. part: in (0, 1], how much of the epoch is done after this step.
            seed: of the attack's random numbers.
            weight: of this process's mean loss, where processes have parts of different sizes.
            length: of this step, as a share of the epoch: several updates in it share it out (`FreeStep`).
        """
        self.generator.manual_seed(seed)
        with self.span("attack"):
            found = [self.attack(self.model, a, b, self.generator) for a, b in self.parts(weight, x, y)]
            x_adv, nan_seen = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        self.set_learning_rate(epoch, part)
        with self.span("update"):
            loss, terms = self.update(x, x_adv, y, weight, perturb=self.config.awp > 0 and epoch >= self.config.awp_warmup)
        return self.launched(x, x_adv, y, ["loss", *terms], torch.stack([loss.detach(), *terms.values()]), nan_seen)

    def set_learning_rate(self, epoch: int, part: float) -> None:
        lr = learning_rate(self.config, epoch, part)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @property
    def lr(self) -> float:
        """The rate of the last update, with layer-wise rates that of the last layer."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def launched(self, x: Tensor, x_adv: Tensor, y: Tensor, names: list[str], values: Tensor, nan_seen: Tensor) -> Launched:
        """A step whose losses, `values`, are on their way to the host from here on."""
        values, nan_seen = (t.to("cpu", non_blocking=True) for t in (values, nan_seen))
        arrived = torch.cuda.current_stream().record_event() if self.world.device.type == "cuda" else None
        return Launched(x, x_adv, y, names, values, nan_seen, arrived)

    def update(self, x: Tensor, x_adv: Tensor, y: Tensor, weight: float = 1.0, perturb: bool = False) -> Losses:
        """Forward, backward and the optimiser. `perturb`: at adversarially perturbed weights (AWP).

        As in its authors' code, these maximise the loss of the method, all its terms, in train mode; and the optimiser's step is
        made at them too, so that weight decay reads the perturbed weights.
        """
        if perturb:
            with restored(list(self.model.buffers())):  # the statistics of batch norm move once
                self.differentiate(x, x_adv, y, weight)
        with perturbed_weights(self.model, self.config.awp) if perturb else nullcontext():
            self.optimizer.zero_grad()
            loss, terms = self.differentiate(x, x_adv, y, weight)
            with self.span("optimizer"):
                self.scaler.step(self.optimizer)
                self.scaler.update()
        self.optimizer.zero_grad()
        if self.shards:
            self.shards.forget()
        self.world.average_buffers(self.statistics)
        if self.ema:
            self.ema.update(self.model)
        return loss, terms

    def differentiate(self, x: Tensor, x_adv: Tensor, y: Tensor, weight: float) -> Losses:
        """Forward and backward of the parts of a batch. Their losses, means over their images, add up to that of the batch."""
        sums: dict[str, Tensor] = {}
        *first, last = self.parts(weight, x, x_adv, y)
        for part in (*first, last):
            share = len(part[-1]) / len(y)
            gathering = nullcontext() if part is last else self.world.no_sync(self.objective)
            with gathering, self.checkpointed():
                with torch.autocast(self.world.device.type, self.half, enabled=self.half is not None):
                    loss, terms = self.objective(*part)
                self.scaler.scale(loss * (weight * share)).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = value if share == 1 else value * share + sums.get(name, 0)
        return sums.pop("loss"), sums

    def parts(self, weight: float, *batch: Tensor) -> list[tuple[Tensor, ...]]:
        """The batch in `accumulate` equal parts, views of it. Fewer where they would have less than the 2 images that batch
        norm needs.

        How many is found from what all processes know, the mean size of their shares: those of FSDP run as many forwards each.
        """
        mean_size = round(len(batch[0]) / weight, 6)
        count = max(1, min(self.config.accumulate, int(mean_size / 2)))
        return [batch] if count == 1 else list(zip(*(t.tensor_split(count) for t in batch), strict=True))

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint has of every process by itself, on the CPU."""
        return {}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """What `own_state` gave."""

    @property
    def evaluated(self) -> nn.Module:
        """The model to validate and to test. All processes ask for it, as FSDP gathers it."""
        model = self.ema.module if self.ema else self.model
        return self.shards.model(model) if self.shards else model

    def state_dict(self) -> dict:
        """What a checkpoint has of all processes together. All ask for it; of what FSDP shards only the main one gets it."""
        return self.shards.whole(self._state()) if self.shards else self._state()

    def _state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "averaged": self.ema.count if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises: RuntimeError: the model's weights are others."""
        if self.shards:
            self.shards.forget()
            state = self.shards.parts(state, self._state(), self.optimizer)
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
            self.ema.count = state["averaged"]
