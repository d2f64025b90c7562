"""One kind of attack on one model: run as it is, captured on the way, and replayed for later batches."""

import threading
from typing import NamedTuple

from torch import Tensor, nn

from .. import checks, interrupts, rng
from ..cuda_graph import CudaGraph, undisturbed
from ..losses import OURS
from ..model_state.borrow import borrowed
from ..model_state.structure import Structure
from .key import loss_key
from .run import Batch, Passes, Run


class Outcome(NamedTuple):
    """What a run returns, the number of classes (None before a forward), and the passes that it took."""

    tensors: tuple[Tensor, ...]
    classes: int | None
    passes: Passes


class CapturedAttack:
    """What is known of one kind of attack on a model: the model's structure at the last one, a capture, or why there is none.

    Attributes:
        captured: the graph and the run whose tensors it works on, or None.
        refused: why it cannot be captured, or None.
        passes: forwards and backwards of a replay.
        independent: whether the capture may serve a shorter batch, since no sample's result depends on the others.
        settled: whether an attack has run before, so that the model has made what it makes on its first use.
    """

    def __init__(self, samples: int):
        self.samples, self.lock = samples, threading.RLock()
        self.structure: Structure | None = None
        self.captured: tuple[CudaGraph, Run] | None = None
        self.refused: str | None = None
        self.passes = Passes(0, 0)
        self.independent = False
        self.settled = False
        self.used = 0

    def matches(self, model: nn.Module) -> bool:
        """Whether `model` is as it was at the last attack."""
        return self.structure is not None and self.structure.matches(model)

    def remember(self, model: nn.Module, settings) -> None:
        """Keep the structure that `model` has now."""
        self.settled = True
        try:
            self.structure = Structure(model, training=settings.bn_mode == "keep")
        except TypeError as error:
            self.refused = str(error)

    def replay(self, settings, batch: Batch, highest_label: int) -> Outcome:
        assert self.captured is not None
        graph, run = self.captured
        checks.check_classes(highest_label, run.classes)
        outcome = run.empty_outcome(batch.x)
        with graph.here():
            run.load(batch)
            for _ in range(batch.runs):
                run.draw(settings.generator)
                interrupts.check()
                with rng.rng_lock:
                    graph.replay()
            for ours, found in zip(outcome, run.outcome, strict=True):
                ours.copy_(found)
        return Outcome(outcome, run.classes, Passes(*(count * batch.runs for count in self.passes)))

    def capture(self, graph_class: type[CudaGraph], settings, model, batch: Batch, highest_label: int) -> Outcome:
        """Attack without a graph, and capture that on the way, or keep the reason why not."""
        checks.check_model(model, batch.x)
        settled = self.settled
        if settings.graph is True:
            self.remember(model, settings)
        if self.refused is None:
            assert self.structure is not None
            self.refused = _obstacle(model, self.structure, batch.x)
        if self.refused is not None:
            return eager_attack(settings, model, batch, highest_label)
        graph, outcome, loss = graph_class(batch.x.device), settings.run_class.empty_outcome(batch.x), loss_key(settings.loss)
        with graph.here():
            run = settings.run_class(settings, batch.copy())
            with borrowed(model, settings.bn_mode):
                run.attack(model, settings.generator, batch.runs, highest_label)
            for ours, found in zip(outcome, run.outcome, strict=True):
                ours.copy_(found)
            passes, counted = run.passes, (run.model.forwards, run.model.backwards)
            if self._has_changed(model, settings, loss, settled):
                return Outcome(outcome, run.classes, passes)
            self.refused = _capture(graph, run, model, settings.bn_mode)
        if self.refused is None:
            self.passes = Passes(run.model.forwards - counted[0], run.model.backwards - counted[1])
            run.release()
            self.captured = graph, run
            self.independent = run.model.independent_samples and type(settings.loss) in OURS
        return Outcome(outcome, run.classes, passes)

    def _has_changed(self, model, settings, loss, settled: bool) -> bool:
        """Whether the attack just run changed the model, or the loss, whose key was `loss`: then nothing is captured."""
        assert self.structure is not None
        if change := self.structure.difference(model):
            self.remember(model, settings)
            if settled:
                self.refused = f"the model changes as it runs ({change})"
            return True
        if loss_key(settings.loss) != loss:
            self.refused = "the loss changes its attributes as it runs"
            return True
        return False


def eager_attack(settings, model, batch: Batch, highest_label: int) -> Outcome:
    """The attack as it is, without a graph."""
    checks.check_model(model, batch.x)
    run = settings.run_class(settings, batch)
    with borrowed(model, settings.bn_mode):
        run.attack(model, settings.generator, batch.runs, highest_label)
    return Outcome(run.outcome, run.classes, run.passes)


def _obstacle(model: nn.Module, structure: Structure, x: Tensor) -> str | None:
    """Why a capture of `model` would be wrong although nothing would fail."""
    if structure.hooked is not None:
        return f"{structure.hooked} has hooks, which would not run in a replay"
    if any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in model.modules()):
        return "nn.DataParallel works on several devices: attack its .module"
    if others := structure.devices - {x.device}:
        return f"it has tensors on {', '.join(sorted(map(str, others)))} and x is on {x.device}: move them by .to(device)"
    return None


def _capture(graph: CudaGraph, run: Run, model: nn.Module, bn_mode: str) -> str | None:
    """Capture `run()` on the borrowed model into `graph`. Return why that failed, or None."""

    def borrow_and_run():
        with borrowed(model, bn_mode):
            run()

    failure = None
    with undisturbed():
        host_states = rng.states()
        try:
            graph.capture(borrow_and_run)
        except Exception as error:
            interrupts.reraise(error)
            text = str(error).strip().split("\n")[0]
            failure = f"{type(error).__name__}: {text}"
        if rng.restore(host_states) and failure is None:
            failure = "random numbers were drawn on the host meanwhile, which a replay would not draw again"
    return failure
