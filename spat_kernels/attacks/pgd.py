"""PGD: projected gradient ascent on a loss of the logits (Madry et al., arXiv 1706.06083; thesis, Eq. 2.7).

    x_0     = a random point of the ball around x, or x
    x_{t+1} = project(x_t + step_size * direction(d loss / d x_t))

    direction: the sign (L-infinity); g / ||g|| (L2); the signs of the largest 1 % of g, at L1 norm 1 (L1)

Only the direction of the input gradient counts, so nothing else is computed: one fused kernel from logits to their gradient, the
model's backward to its input, one fused kernel for the step and both projections.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import checks
from ..cuda_graphs.cache import graphs
from ..cuda_graphs.capture import Outcome
from ..cuda_graphs.run import Batch, Passes
from ..input_gradient.choose import check_precision
from ..input_gradient.plan_cache import is_planned
from ..losses import DLR, OURS, LossLike, as_loss
from ..settings import SELECT, STOPS, Graph, Select, Stop
from ._common import RestartedAttack, Result, Tally, all_or_nothing, as_dense, warn_of_nan
from .early_stop import EarlyStop
from .pgd_run import PGDRun


@dataclass(eq=False, kw_only=True)
class PGD(RestartedAttack):
    """Projected gradient descent as a reusable object: `attack = PGD(8/255, loss="ce")`, then `attack(model, x, y)`.

    Args:
        eps: radius of the ball in the units of x, a number or one per sample as a tensor [B]. 0 is valid.
        loss: what is maximised: "ce", "kl", "margin", "dlr", "pma", "mmc", or another name in `losses.LOSSES`; an object of
            `spat_kernels.losses`; or a callable `(logits [B, K], y [B]) -> [B]`, differentiated by autograd.
        steps: gradient steps, >= 0.
        step_size: length of a step in the units of x, a number or [B]. None is eps / 4 for L-infinity (thesis, chapter 6) and
            2.5 * eps / steps for L2 and L1 (the same at 10 steps).
        random_start: begin at a uniform random point of the ball, else at x.
        norm: "linf", "l2" or "l1".
        targeted: move towards the classes y instead of away from them.
        restarts: runs from different random starts, of which the best is kept per sample. One forward more each.
        bounds: (lo, hi) of valid x.
        precision: what the model runs in: "fp32", "tf32", "bf16", "fp16" or "half" (fp16 on GPUs, bf16 on CPUs); None is the
            caller's autocast, or the model's own dtype. Images, steps and projections stay in x's dtype. "fp32" and "tf32" set
            PyTorch's `fp32_precision` switches on CUDA meanwhile: there code of the model must not read the older `allow_tf32`,
            which PyTorch refuses while both are in use (RuntimeError), but `torch.backends.cuda.matmul.fp32_precision`.
        input_gradient: "plan" is the fused path through convolutional networks (see `explain`), "autograd" goes through any
            model (in half precision in channels_last, where the model can read that), "auto" takes the plan where the model
            allows it. Code of the model does not run in a plan: changes of modules, attributes, modes and hooks are noticed; of
            globals, closures and the insides of other objects they are not. "compile" is for other modules: torch.compile
            (Inductor) of the forward and its backward to the input. That takes up to minutes at the first batch of a shape, and
            once more for all other batch sizes. A model that cannot be compiled as a whole goes through autograd, and a
            RuntimeWarning says why. "auto" compiles where there is no plan if `spat_kernels.compile_auto` is True.
        fuse: whether convolutions of a plan do the passes next to them in one launch, on GPUs that have kernels for that. "auto"
            takes the fastest kernel that was found right and faster, at the first use of each shape. That takes seconds once (and
            CUDA graphs, whatever `graph` is), and is kept in ~/.cache/spat_kernels (or SPAT_KERNELS_CACHE). Where PyTorch is to
            be deterministic it takes none, since choices by time may differ. True takes one even if it is slower; False never.
        bn_mode: mode of the whole model meanwhile: "eval", "train" (batch statistics, dropout) or "keep" (as it is). Running
            statistics never change. Where those of the batch may mix samples, the loss takes its `unnormalized` form.
        select: which restart is best: "success" (misclassified, or classified as the target; among equals the larger loss) or
            "loss" alone.
        generator: source of the random starts, on any device; None is torch's default one of x's device.
        stop: what ends the attack on a sample before its last step. "success": an iterate that is misclassified (or at its
            target), which is what comes out. "cycle": an iterate that was there before (Doldo et al., arXiv 2503.19347): the last
            one is known then and comes out, so that nothing changes but the time (on GPUs roundings change too: `early_stop.py`).
            "exact": either. None: nothing. Samples must not depend on each other: neither batch statistics nor random layers, and
            a loss of ours. It pays where there are tens of steps, and waits for the device every few of them.
        budget: forwards and backwards that a sample may take part in, a number or int64 [B]: the attack takes the steps and
            restarts that they suffice for; where `stop` compares batches, it pays for that too. None is no limit.
        graph: whether a CUDA graph replays the whole attack, which frees small batches from the time that launches take. "auto"
            captures an attack on an nn.Module when it comes for the second time with the same shapes and settings; True the
            first time, or it is an error (x on the CPU, a plain callable); False never. Python code of the model does not run
            in a replay; changes of its modules, attributes, modes, hooks and of where its tensors are are noticed, and values
            of parameters and buffers are read each time. What cannot be captured runs without, and a RuntimeWarning says why;
            "auto" leaves out attacks of more than 256 forwards, whose graphs are large.
            `spat_kernels.graphs` frees the memory of captures (`.free(model)`) and bounds their number (`.capacity`, 8).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.
    """

    loss: LossLike = "ce"
    steps: int = 10
    step_size: float | Tensor | None = None
    random_start: bool = True
    targeted: bool = False
    select: Select = "success"
    stop: Stop | None = None
    graph: Graph = "auto"

    run_class: ClassVar[type[PGDRun]] = PGDRun  # what `graphs` runs and captures
    looks_first: ClassVar[bool] = True  # whether `SegmentRun` tests the iterate it starts from for success

    def __post_init__(self):
        checks.check_flag("targeted", self.targeted)
        checks.check_flag("random_start", self.random_start)
        self.loss = loss = as_loss(self.loss)
        loss.check_targeted(self.targeted)
        super().__post_init__()
        checks.check_choice("select", self.select, SELECT)
        checks.check_auto_or_flag("graph", self.graph)
        checks.check_count("steps", self.steps, 0)
        self._check_stop()
        if self.step_size is not None:
            longest, width = checks.check_length("step_size", self.step_size), self.bounds[1] - self.bounds[0]
            if self.norm == "linf" and longest > width:
                checks.warn(f"step_size={longest:g} exceeds the width of bounds={self.bounds}: it is in the units of x (2/255)")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts={self.restarts} with random_start=False repeats one run: set random_start=True")

    def __call__(self, model, x: Tensor, y: Tensor | None, *, start: Tensor | None = None) -> Tensor:
        """Attack `model` at the images `x`.

        The model (modes, gradients, statistics), x and y are afterwards as they were, also when the model raises; a plain
        callable is called as it is, so modes and statistics of what it closes over are the caller's to mind. Works in any grad
        mode and under autocast.

        Args:
            model: module or callable, x -> logits [B, K].
            x: images [B, ...] inside `bounds` in fp32, fp16, bf16 or fp64, which is the dtype of the iterates too.
            y: int64 [B], the true labels, or the targets. None where neither the loss nor the choice of restarts needs any.
            start: the first iterate, like x, instead of a random one: taken as it is, projected by the first step.

        Returns:
            Tensor: adversarial images with x's shape, dtype, device and memory format, without a graph: inside the ball (to one
            rounding of x's dtype) and exactly inside `bounds`.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it, its value and the remedy.

        Warns:
            RuntimeWarning: the gradient was NaN (L2: or infinite) for some samples. It counts as 0, which looks like robustness
                and is none.

        On GPUs values in x, y and start are checked after everything has been launched, where wrong ones can do no harm. After
        an error `generator` and the device's default one are as they were.
        """
        return self._attack(model, x, y, start)[0]

    def run(self, model, x: Tensor, y: Tensor | None, *, start: Tensor | None = None) -> Result:
        """A call, which also returns what each sample cost."""
        x_adv, passes = self._attack(model, x, y, start)
        tally = Tally(x)
        tally.add(slice(None), *passes)
        return tally.result(x_adv)

    @all_or_nothing
    def _attack(self, model, x: Tensor, y: Tensor | None, start: Tensor | None) -> tuple[Tensor, Passes]:
        self._check(model, x, y, start)
        if x.numel() == 0:
            return x.detach().clone(), Passes(0, 0)
        values = checks.Values(x, y, start, self.bounds)
        highest_label = -1 if self._may_check_late(model, x) else values.read()[0]
        try:
            (x_adv, nan_seen), classes, passes = self._outcome(model, self._batch(x, y, start), highest_label)
        except Exception:
            values.read()  # if these are wrong, that is the error
            raise
        highest_label, with_nan = values.read(nan_seen.sum())  # waits for the device
        checks.check_classes(highest_label, classes)
        warn_of_nan(with_nan, len(x))
        return x_adv, passes

    def _outcome(self, model, batch: Batch, highest_label: int) -> Outcome:
        if self.stop is None and self.budget is None:
            return graphs.attack(self, model, batch, highest_label)
        attack = EarlyStop(self, model, batch, highest_label)
        attack.run()
        passes = Passes(attack.tally.forwards, attack.tally.backwards)
        return Outcome((attack.x_adv, attack.nan_seen), attack.classes, passes)

    def _may_check_late(self, model, x: Tensor) -> bool:
        """Whether wrong values do no harm, so that a GPU need not wait until they are checked.

        They do none in a plan that has been made, and our losses turn labels that are no classes into NaN. Code of the model, and
        of other losses, may fail on them: on a GPU for good.
        """
        planned = self.input_gradient in ("auto", "plan") and is_planned(model, x)
        looks_up_targets = self.targeted and isinstance(self.loss, DLR)
        waits = self.stop is not None or self.budget is not None
        return x.is_cuda and planned and type(self.loss) in OURS and not looks_up_targets and not waits

    @all_or_nothing
    def launch(self, model, x: Tensor, y: Tensor | None, *, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A call that does not wait for the device, so that a training loop can launch what follows while the attack still runs.

        Nobody looks at the values in x, y and start, which must be such as a call asks for. The first attack on a model through
        autograd does wait once, to see whether the model writes on its input, and warns if it does. So does the first attack on
        images of a shape, where kernels are chosen (`fuse`).

        Returns:
            tuple: adversarial images, as of a call; uint8 [B], 1 for samples that met an unusable gradient.
        """
        if self.stop is not None or self.budget is not None:
            raise ValueError(
                f"stop={self.stop!r} and budget={self.budget} wait for the device, which launch does not: call the attack, or "
                "leave them out"
            )
        self._check(model, x, y, start)
        if x.numel() == 0:
            return x.detach().clone(), x.new_zeros(len(x), dtype=torch.uint8)
        (x_adv, nan_seen), *_ = graphs.attack(self, model, self._batch(x, y, start), highest_label=-1)
        return x_adv, nan_seen

    def _batch(self, x: Tensor, y: Tensor | None, start: Tensor | None) -> Batch:
        x, y = as_dense(x, y)
        step_size = self._default_step_size() if self.step_size is None else self.step_size
        return Batch(x, y, self.eps, step_size, start, runs=self.restarts)

    def kind(self) -> tuple:
        """What tells captures of this class apart, beside what all attacks have."""
        return self.steps, self.targeted, self.random_start, self.restarts > 1 and self.select, self.stop, self.looks_first

    @property
    def looks_for_success(self) -> bool:
        return self.stop in ("success", "exact")

    @property
    def looks_for_cycles(self) -> bool:
        return self.stop in ("cycle", "exact")

    @property
    def passes(self) -> int:
        """Forwards of a run, at most."""
        return self.steps + 2

    def _check(self, model, x, y, start) -> None:
        loss = as_loss(self.loss)  # which it is since `__post_init__`
        checks.check_images(x)
        checks.check_callable(model)
        check_precision(self.precision, x)
        self._check_radius(x)
        checks.check_per_sample("step_size", self.step_size, x)
        if y is not None:
            checks.check_labels(y, x)
        elif loss.uses_labels or (self.restarts > 1 and self.select == "success") or self.looks_for_success:
            raise TypeError("y=None, but the loss, the choice of restarts or stop needs labels: give y, int64 [B]")
        if start is not None:
            checks.check_start(start, x)
            if self.restarts > 1:
                raise ValueError(f"restarts={self.restarts} from one start repeat one run: leave out start, or restarts")
        elif loss.needs_random_start and not self.random_start:
            raise ValueError(
                "random_start=False, but the gradient of this loss is zero at x itself: set it True, or give a start"
            )

    def _check_stop(self) -> None:
        if self.stop is None:
            return
        checks.check_choice("stop", self.stop, (None, *STOPS))
        if self.looks_for_cycles and self.norm != "linf":
            raise ValueError(
                f"stop={self.stop!r} looks for cycles, which the sign and the projection of norm='linf' lead to: with "
                f"norm={self.norm!r} iterates do not come back: use stop='success'"
            )
        if self.bn_mode == "train":
            raise ValueError(
                f"stop={self.stop!r} makes the batch smaller, on which the results of bn_mode='train' depend: use bn_mode='eval'"
            )
        if type(self.loss) not in OURS:
            raise ValueError(
                f"stop={self.stop!r} needs a loss that is a function of a sample's logits and nothing else, and code of your own "
                "may be anything: use one of spat_kernels.losses, or leave out stop"
            )

    def _default_step_size(self) -> float | Tensor:
        return self.eps / 4 if self.norm == "linf" else self.eps * (2.5 / max(self.steps, 1))
