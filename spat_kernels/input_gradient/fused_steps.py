"""Convolutions of a plan by an engine, with the pass behind them, or backward with that in front (grouping.py).

A step asks here first. What no engine takes is left to the step, with nothing changed.
"""

from collections import Counter
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from ..fused_conv import choose
from ..fused_conv.choose import Choice, Engine
from ..fused_conv.recipe import Epilogue, Recipe, Way, empty_results
from ..precision import backends
from ..settings import Fuse
from .gradients import Grads, give, rows, sum_
from .grouping import stream
from .steps import Conv, FusedConv, Pointwise, Step
from .weights import ConvWeights

if TYPE_CHECKING:
    from .planned_gradient import PlannedGradient

Sizes = tuple[int, int, int]


class Engines:
    """The engines of one attack in one thread: the recipes of its steps, and the weights in the form that each engine wants.

    Args:
        fuse: the caller's option.
        device: of the images.

    Attributes:
        chooser: who chooses.
        active: whether any engine may apply.
        masks: value of a pass that its convolution has done -> its mask, until the pass collects it.
        used: (output of a convolution, way) -> the last recipes that were asked for there.
    """

    def __init__(self, fuse: Fuse, device: torch.device):
        self.fuse, self.device, self.chooser = fuse, device, choose.chooser
        # Choices by time may differ from run to run.
        deterministic = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
        self.active = fuse is not False and not (fuse == "auto" and deterministic) and self.chooser.applies(device)
        self.masks: dict[int, Tensor | None] = {}
        self.used: dict[tuple[int, Way], list[Recipe]] = {}
        self._recipes: dict[tuple, Recipe] = {}
        self._choices: dict[tuple, Choice | None] = {}
        self._weights: dict[tuple, Tensor] = {}

    def begin(self) -> None:
        """Called first in every forward, since an error may have ended the last one anywhere."""
        self.masks.clear()

    def prepare(self) -> None:
        """The model's weights may have changed."""
        self._weights.clear()
        self._choices.clear()

    def run(
        self, step: Conv, way: Way, bound: ConvWeights, x: Tensor, sizes: tuple[Sizes, Sizes], tensors: dict[str, Tensor],
        epilogue: Epilogue | None,
    ) -> dict[str, Tensor] | None:  # fmt: skip
        """What an engine writes ("out", "total", "mask"), or None: no engine is chosen.

        Args:
            x: what the convolution reads, as in `fused_conv.recipe.apart`.
            sizes: of a sample of the convolution's input and output.
            tensors: what else is read, by name.
            epilogue: the pass, if one rides along.
        """
        key = step.out, way, len(x), epilogue
        recipe = self._recipes.get(key)
        if recipe is None:
            recipe = self._recipes[key] = _recipe(step, way, bound, x, sizes, "bias" in tensors, epilogue)
            self.used.setdefault((step.out, way), []).append(recipe)
        if key not in self._choices:  # looked up once an attack
            self._choices[key] = self.chooser.choose(recipe, x, bound.weight, tensors, self.fuse)
        choice = self._choices[key]
        if choice is None:
            return None
        results = empty_results(recipe, x.device)
        try:
            weight = self._weight((step.out, way, choice.engine.name), choice.engine, recipe, bound.weight)
            choice.engine.run(choice.variant, recipe, x, weight, **results, **tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.chooser.give_up(recipe, x.device, self.fuse, error)
            self._choices[key] = None
            return None
        return results

    def describe(self, steps: list[Step]) -> tuple[str, ...]:
        """Who does the convolutions and passes of `steps`, as far as they have run, in sentences."""
        sentences = [self._describe_way(steps, way) for way in get_args(Way)]
        problem = self.chooser.cache.problem if self.chooser.cache else ""
        return (*filter(None, sentences), problem) if problem else tuple(filter(None, sentences))

    def _describe_way(self, steps: list[Step], way: Way) -> str:
        """ "forward 12 of 31 passes ride in convolutions (12 hopper 128x160), 19 do not (19 no engine is faster ...)"."""
        passes = [s for s in steps if isinstance(s, Pointwise)]
        alone = Counter(s.alone if way == "forward" else s.back_alone for s in passes)
        carried, others = Counter[str](), Counter({reason: count for reason, count in alone.items() if reason})
        bare = Counter[str]()
        for (_, of), recipes in self.used.items():
            for recipe in recipes if of == way else ():
                decision = self.chooser.decision(recipe, self.device, self.fuse)
                choice, reason = (decision.choice, decision.reason) if decision else (None, "it was not chosen yet")
                if choice is not None:
                    (bare if recipe.epilogue is None else carried)[str(choice)] += 1
                elif recipe.epilogue is not None:
                    others[reason] += 1
        parts = [f"{way} {carried.total()} of {len(passes)} passes ride in convolutions{_counted(carried)}"]
        parts += [f"{others.total()} do not{_counted(others)}"] * bool(others)
        parts += [f"convolutions alone{_counted(bare)}"] * bool(bare)
        return ", ".join(parts)

    def _weight(self, key: tuple, engine: Engine, recipe: Recipe, weight: Tensor) -> Tensor:
        """The weights as the engine wants them, made once after each `prepare`."""
        if key not in self._weights:
            prepared = engine.prepare_weight(recipe, weight)
            self._weights[key] = weight if prepared is None else prepared
        return self._weights[key]


def _counted(names: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {name}' for name, count in names.most_common())})" if names else ""


def _recipe(
    step: Conv, way: Way, bound: ConvWeights, x: Tensor, sizes: tuple[Sizes, Sizes], bias: bool, epilogue: Epilogue | None
) -> Recipe:
    height, width = bound.weight.shape[2:]
    stride, padding, dilation = ((int(v), int(w)) for v, w in (step.conv[k] for k in ("stride", "padding", "dilation")))
    groups, (input_, output) = step.conv["groups"], sizes
    tf32 = x.is_cuda and x.dtype == torch.float32 and backends.cudnn.conv.fp32_precision == "tf32"
    return Recipe(
        way, x.dtype, len(x), input_, output, (height, width), stride, padding, dilation, groups, bound.layout, bias, epilogue,
        tf32,
    )  # fmt: skip


def forward(run: "PlannedGradient", step: Conv, bound: ConvWeights, x: Tensor, values: list, keep: bool):
    """What the step's forward returns, where an engine does it; a pass that rides along is done then. None: nothing is done.

    Where an engine takes the convolution only, it gets that.
    """
    sizes = _sizes(x.shape, step)
    bias = {} if bound.bias is None else {"bias": bound.bias}
    if isinstance(step, FusedConv) and step.behind is not None:
        behind = run.plan.steps[step.behind]
        assert isinstance(behind, Pointwise)
        epilogue, tensors = _pass(run, step, behind, values, keep)
        results = run.engines.run(step, "forward", bound, x, sizes, bias | tensors, epilogue)
        if results is not None:
            values[behind.out], total = results["out"], results.get("total")
            if behind.total is not None:
                values[behind.total] = total
            run.engines.masks[behind.out] = results.get("mask")
            return total if step.shared else None, x.shape
    results = run.engines.run(step, "forward", bound, x, sizes, bias, None)
    return None if results is None else (results["out"], x.shape)


def _pass(
    run: "PlannedGradient", step: FusedConv, behind: Pointwise, values: list, keep: bool
) -> tuple[Epilogue, dict[str, Tensor]]:
    assert step.behind is not None
    others = [j for j in behind.inputs if j != step.out]
    scale, shift, _ = run.bound[step.behind]
    tensors = {"b": rows(values[others[0]]) if others else None, "scale": scale, "shift": shift}
    given = {name: t for name, t in tensors.items() if t is not None}
    writes = ("total",) * (step.shared or behind.total is not None) + ("mask",) * (keep and behind.relu)
    return Epilogue(tuple(given), writes, behind.relu), given


def gradient(run: "PlannedGradient", step: Conv, bound: ConvWeights, grad: Tensor, shape: torch.Size) -> Tensor | None:
    """The gradient with respect to the convolution's input of `shape`, by an engine. None: no engine is chosen."""
    results = run.engines.run(step, "gradient", bound, grad, _sizes(shape, step), {}, None)
    return None if results is None else results["out"]


def gradient_with_pass(
    run: "PlannedGradient", step: Conv, bound: ConvWeights, grad: Tensor, shape: torch.Size, grads: Grads
) -> bool:
    """The same, and the way back of the pass in front, whose inputs get their gradients. False: nothing is done."""
    if not isinstance(step, FusedConv) or step.in_front is None:
        return False
    front = run.plan.steps[step.in_front]
    assert isinstance(front, Pointwise)
    others, before = grads[front.out], stream(front)
    tensors = {
        "grad2": rows(sum_(others)[0]) if others else None,
        "mask": run.mask(step.in_front),
        "scale": run.bound[step.in_front].scale,
        "residual": rows(sum_(grads[before])[0]) if before is not None and grads[before] else None,
    }
    given = {name: t for name, t in tensors.items() if t is not None}
    if not given:
        return False
    results = run.engines.run(step, "gradient", bound, grad, _sizes(shape, step), given, Epilogue(tuple(given)))
    if results is None:
        return False
    grads[front.out] = []
    if before is not None:
        grads[before] = []
    give(front, results["out"], True, grads)
    return True


def _sizes(shape: torch.Size, step: Conv) -> tuple[Sizes, Sizes]:
    """(C, H, W) of what the convolution reads, of `shape`, and of what it makes."""
    (channels, height, width), (out, *pixels) = shape[1:], step.shape
    return (channels, height, width), (out, pixels[0], pixels[1])
