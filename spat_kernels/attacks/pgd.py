"""PGD: projected gradient ascent on a loss of the logits (Madry et al., arXiv 1706.06083; thesis, Eq. 2.7).

    x_0     = a random point of the ball around x, or x
    x_{t+1} = project(x_t + step_size * direction(d loss / d x_t))

    direction: the sign (L-infinity); g / ||g|| (L2); the signs of the largest 1 % of g, at L1 norm 1 (L1)

Only the direction of the input gradient counts, so nothing else is computed: one fused kernel from logits to their gradient, the
model's backward to its input, one fused kernel for the step and both projections.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks, ops
from ..cuda_graphs.cache import graphs
from ..cuda_graphs.run import Batch, Run
from ..input_gradient.choose import check_precision
from ..input_gradient.plan_cache import is_planned
from ..losses import DLR, OURS, LossLike, as_loss, value_dtype
from ..ops._common import acc_dtype
from ..predictions import predictions
from ..rng import default_generator, rewound_on_error
from ..settings import SELECT, Graph, Select
from ._common import RestartedAttack, as_dense, warn_of_nan


class PGDRun(Run):
    """Projected gradient descent. With restarts the best so far is kept over the runs since the last `load`.

    Its outcome: adversarial images; nan_seen, uint8 [B], 1 for samples that met an unusable gradient.
    """

    def __init__(self, settings: "PGD", batch: Batch):
        super().__init__(settings, batch)
        self.steps, self.targeted = settings.steps, settings.targeted
        self.starts_at = "given" if batch.start is not None else "random" if settings.random_start else "clean"
        self.random_start = self.starts_at == "random"
        self.x_adv = torch.empty_like(batch.x)
        self.best: Tensor | None = None  # with restarts
        self.best_value: Tensor
        self.best_success: Tensor | None = None
        if settings.restarts > 1:
            self.best = torch.empty_like(batch.x)
            self.best_value = batch.x.new_empty(len(batch.x), dtype=acc_dtype(batch.x.dtype))
            if settings.select == "success":
                self.best_success = batch.x.new_empty(len(batch.x), dtype=torch.bool)
        self._begin_batch(batch)

    def _begin_batch(self, batch: Batch) -> None:
        super()._begin_batch(batch)
        if batch.start is not None:
            self.x_adv[: self.n].copy_(batch.start)
        if self.best is not None:
            self.best.copy_(self.ball.x)
            self.best_value.fill_(-torch.inf)
            if self.best_success is not None:
                self.best_success.zero_()

    def attempt(self, captured: bool) -> None:
        x_adv, ball = self.x_adv, self.ball
        if self.starts_at == "random":
            ball.random_start_(x_adv, self.draws)
        elif self.starts_at == "clean":
            x_adv.copy_(ball.x)
        if self.steps == 0 and self.starts_at == "given":
            ball.project_(x_adv)
        with self.model.arithmetic(x_adv.device.type):
            iterate = self.inner.laid_out(x_adv)
            for _ in range(self.steps):
                logits = self.model.forward(iterate)
                self.inner.step_(iterate, self.model.backward(self._logit_gradient(logits, self.reference)))
            if iterate is not x_adv:
                x_adv.copy_(iterate)
            if self.best is not None:
                self._keep_best(self.best, self.model.logits(iterate))

    @staticmethod
    def empty_outcome(x: Tensor) -> tuple[Tensor, ...]:
        return torch.empty_like(x), x.new_empty(len(x), dtype=torch.uint8)

    def _outcome(self) -> tuple[Tensor, ...]:
        return self.x_adv if self.best is None else self.best, self.ball.nan_seen

    def _keep_best(self, best: Tensor, logits: Tensor) -> None:
        value = torch.empty(len(logits), dtype=value_dtype(logits), device=logits.device)
        self._logit_gradient(logits, self.reference, value)
        found = None if self.best_success is None or self.y is None else predictions(logits).eq(self.y)
        success = found if found is None or self.targeted else ~found
        value = value.to(self.best_value.dtype)
        ops.keep_best_(best, self.best_value, self.best_success, self.x_adv, value, success)


@dataclass(eq=False, kw_only=True)
class PGD(RestartedAttack):
    """Projected gradient descent as a reusable object: `attack = PGD(8/255, loss="ce")`, then `attack(model, x, y)`.

    Args:
        eps: radius of the ball in the units of x, a number or one per sample as a tensor [B]. 0 is valid.
        loss: what is maximised: "ce", "kl", "margin", "dlr", or another name in `losses.LOSSES`; an object of
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
            globals, closures and the insides of other objects they are not.
        bn_mode: mode of the whole model meanwhile: "eval", "train" (batch statistics, dropout) or "keep" (as it is). Running
            statistics never change.
        select: which restart is best: "success" (misclassified, or classified as the target; among equals the larger loss) or
            "loss" alone.
        generator: source of the random starts, on any device; None is torch's default one of x's device.
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
    graph: Graph = "auto"

    run_class = PGDRun  # what `graphs` runs and captures

    def __post_init__(self):
        self.loss = loss = as_loss(self.loss)
        loss.check_targeted(self.targeted)
        super().__post_init__()
        checks.check_choice("select", self.select, SELECT)
        checks.check_graph(self.graph)
        checks.check_count("steps", self.steps, 0)
        if self.step_size is not None:
            checks.check_length("step_size", self.step_size)
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
        self._check(model, x, y, start)
        if x.numel() == 0:
            return x.detach().clone()
        with torch.inference_mode(False), torch.no_grad():
            values = checks.Values(x, y, start, self.bounds)
            highest_label = -1 if self._may_check_late(model, x) else values.read()[0]
            with rewound_on_error(self.generator, default_generator(x.device)):
                try:
                    (x_adv, nan_seen), classes = graphs.attack(self, model, self._batch(x, y, start), highest_label)
                except Exception:
                    values.read()  # if these are wrong, that is the error
                    raise
                highest_label, with_nan = values.read(nan_seen.sum())  # waits for the device
                checks.check_classes(highest_label, classes)
            warn_of_nan(with_nan, len(x))
        return x_adv

    def _may_check_late(self, model, x: Tensor) -> bool:
        """Whether wrong values do no harm, so that a GPU need not wait until they are checked.

        They do none in a plan that has been made, and our losses turn labels that are no classes into NaN. Code of the model, and
        of other losses, may fail on them: on a GPU for good.
        """
        planned = self.input_gradient != "autograd" and is_planned(model, x)
        looks_up_targets = self.targeted and isinstance(self.loss, DLR)
        return x.is_cuda and planned and type(self.loss) in OURS and not looks_up_targets

    def launch(self, model, x: Tensor, y: Tensor | None, *, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A call that does not wait for the device, so that a training loop can launch what follows while the attack still runs.

        Nobody looks at the values in x, y and start, which must be such as a call asks for. The first attack on a model through
        autograd does wait once, to see whether the model writes on its input, and warns if it does.

        Returns:
            tuple: adversarial images, as of a call; uint8 [B], 1 for samples that met an unusable gradient.
        """
        self._check(model, x, y, start)
        if x.numel() == 0:
            return x.detach().clone(), x.new_zeros(len(x), dtype=torch.uint8)
        with torch.inference_mode(False), torch.no_grad():
            (x_adv, nan_seen), _ = graphs.attack(self, model, self._batch(x, y, start), highest_label=-1)
        return x_adv, nan_seen

    def _batch(self, x: Tensor, y: Tensor | None, start: Tensor | None) -> Batch:
        x, y = as_dense(x, y)
        step_size = self._default_step_size() if self.step_size is None else self.step_size
        return Batch(x, y, self.eps, step_size, start, runs=self.restarts)

    def kind(self) -> tuple:
        """What tells captures of this class apart, beside what all attacks have."""
        return self.steps, self.targeted, self.random_start, self.restarts > 1 and self.select

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
        elif loss.uses_labels or (self.restarts > 1 and self.select == "success"):
            raise TypeError("y=None, but the loss or the choice of restarts needs labels: give y, int64 [B]")
        if start is not None:
            checks.check_start(start, x)
            if self.restarts > 1:
                raise ValueError(f"restarts={self.restarts} from one start repeat one run: leave out start, or restarts")
        elif loss.needs_random_start and not self.random_start:
            raise ValueError(
                "random_start=False, but the gradient of this loss is zero at x itself: set it True, or give a start"
            )

    def _default_step_size(self) -> float | Tensor:
        return self.eps / 4 if self.norm == "linf" else self.eps * (2.5 / max(self.steps, 1))
