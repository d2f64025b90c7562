"""Which engine does a convolution, maybe with its pass: the fastest right one at a recipe's first use, if it beats PyTorch + ops.

At its first use a recipe is tried on the tensors of that call. Every candidate (an engine and one of its variants) is held to the
exact result (judge.py). `apart` and those that are right are timed, and the fastest is kept, if it saves 2 % or more. The choice
is kept on disk (cache.py), and checked, but not timed, in other processes.

Nothing is chosen while a CUDA graph is captured or torch.compile traces: a recipe that was not met before runs `apart` there. An
attack that is captured has run before as it is. What fails keeps `apart`, with the reason,
and with a warning where an engine raised.
"""

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..cuda_graph import CudaGraph, undisturbed
from ..settings import Fuse
from .cache import Cache
from .hopper import Hopper
from .judge import UNFIT, Judge
from .recipe import Recipe, apart

BUDGET = 20.0  # seconds that choosing may take in a process
GAIN = 0.98  # an engine is taken for at most this share of the time that `apart` takes
CALLS, REPLAYS = 10, 3  # in a timed graph, and of it
APART = "apart"
SLOWER = "no engine is faster than PyTorch and ops"
SPENT = f"the {BUDGET:.0f} s for choosing in a process are spent"


class Engine(Protocol):
    """What does a convolution and its pass in one launch.

    Attributes:
        name: short, for `explain`, and unique.
    """

    name: str

    def runs_on(self, device: torch.device) -> bool:
        """Whether it does anything on `device`. Asked once an attack: where no engine does, nothing is looked up."""
        ...

    def variants(self, recipe: Recipe, device: torch.device) -> list[str]:
        """Its ways of doing `recipe` on `device`, by name; [] where there is none. Cheap: nothing is built or launched.

        They do not depend on the batch: batches up to the next power of two share a decision.
        """
        ...

    def prepare_weight(self, recipe: Recipe, weight: Tensor) -> Tensor | None:
        """The weights [K, C / groups, R, S] in another form, made once an attack, or None: as they are.

        The form may depend on the way of the recipe and on its convolution, not on its batch and pass.
        """
        ...

    def run(self, variant: str, recipe: Recipe, x: Tensor, weight: Tensor, out: Tensor, **tensors: Tensor) -> None:
        """Launch on the current stream, and write all of `out`, and "total" and "mask" if they are given.

        It may be captured in a CUDA graph: nothing waits for the device, and what it allocates is torch's.

        Args:
            x: as in `recipe.apart`, dense in `recipe.layout`.
            weight: what `prepare_weight` made, or as it is.
            out: in channels_last, never the memory of anything that is read.
            tensors: "bias" and what the pass reads and writes, by name: those that the recipe names, and no others.
        """
        ...


ENGINES: tuple[Engine, ...] = (Hopper(),)


@dataclass(frozen=True)
class Choice:
    engine: Engine
    variant: str

    def __str__(self) -> str:
        return f"{self.engine.name} {self.variant}".strip()


@dataclass(frozen=True)
class Decision:
    """What was found for a recipe.

    Attributes:
        choice: who does it, or None: `apart`.
        reason: why not, "" for a choice.
        seconds: what each took that was timed, by name, `apart` too.
        problems: why the others were left out.
        measured: whether it may be kept for other processes.
    """

    choice: Choice | None
    reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    measured: bool = False


class Chooser:
    """Chooses, and remembers. `chooser` is the one of the process.

    Args:
        engines: who may be chosen, None for `ENGINES` as they are at each look.
        timer: function -> seconds that a call takes on the current device.
        budget: seconds in all. fuse=True does not look at it.
        cache: of choices, None to keep none on disk.
        applies: device -> whether to choose there at all. None: on CUDA, where an engine runs.

    Attributes:
        spent: seconds so far.
    """

    def __init__(
        self,
        engines: tuple[Engine, ...] | None = None,
        timer: "Callable[[Callable[[], object]], float] | None" = None,
        budget: float = BUDGET,
        cache: Cache | None = None,
        applies: Callable[[torch.device], bool] | None = None,
    ):
        self._engines, self.timer, self.budget, self.cache = engines, timer or graph_seconds, budget, cache
        self.applies = applies or self._runs_on
        self.spent = 0.0
        self._decisions: dict[tuple, Decision] = {}
        self._lock = threading.RLock()

    def _runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda" and any(engine.runs_on(device) for engine in self.engines)

    @property
    def engines(self) -> tuple[Engine, ...]:
        return ENGINES if self._engines is None else self._engines

    def choose(self, recipe: Recipe, x: Tensor, weight: Tensor, tensors: dict[str, Tensor], fuse: Fuse = "auto") -> Choice | None:
        """Who does `recipe`; None is `apart`. `x`, `weight` and `tensors` are what it reads now, as in `recipe.apart`.

        "auto" takes the fastest if it beats `apart`; True takes the fastest engine that is right, even if it is slower.
        """
        decision = self.decision(recipe, x.device, fuse)
        if decision is None and fuse is not False and not _may_not_wait(x):
            with self._lock:  # never taken in a capture, which holds the lock of random numbers
                decision = self.decision(recipe, x.device, fuse)
                if decision is None:
                    decision = self._decide(recipe, x, weight, tensors, fuse)
                    if decision.reason != UNFIT:  # an attack may begin with a gradient of 0
                        self._decisions[_key(recipe, x.device, fuse)] = decision
        return decision.choice if decision else None

    def decision(self, recipe: Recipe, device: torch.device, fuse: Fuse = "auto") -> Decision | None:
        """What was found for `recipe` or one with a batch alike (`_key`), None before the first use."""
        return self._decisions.get(_key(recipe, device, fuse))

    def give_up(self, recipe: Recipe, device: torch.device, fuse: Fuse, error: Exception) -> None:
        """Leave `recipe`, and those with batches alike, to `apart` from now on: the engine failed at it."""
        _warn(f"{recipe} failed: {_said(error)}")
        self._decisions[_key(recipe, device, fuse)] = Decision(None, f"it failed: {_said(error)}")

    def forget(self) -> None:
        """What was found, in this process."""
        with self._lock:
            self._decisions.clear()
            self.spent = 0.0

    def _decide(self, recipe: Recipe, x: Tensor, weight: Tensor, tensors: dict[str, Tensor], fuse: Fuse) -> Decision:
        began = time.perf_counter()
        try:
            with _undisturbed(x.device):
                candidates, problems = self._candidates(recipe, x.device)
                if not candidates:
                    return Decision(None, "no engine does it", problems=problems)
                cache = self.cache if fuse == "auto" else None
                names = sorted(map(str, candidates))
                entry = cache.get(x.device, str(_alike(recipe))) if cache else None
                if entry is not None and entry["candidates"] != names:
                    entry = None
                if entry is not None and entry["choice"] == APART:
                    return Decision(None, SLOWER, entry["seconds"])
                if entry is None and self._is_spent(fuse):
                    return Decision(None, SPENT)
                trial = _Trial(recipe, x, weight, tensors, self.timer, problems)
                if entry is not None and (known := _recall(trial, candidates, entry)) is not None:
                    return known
                decision = self._tune(trial, candidates, fuse, began)
            if cache and decision.measured:
                chosen = str(decision.choice) if decision.choice else APART
                cache.put(x.device, str(_alike(recipe)), {"choice": chosen, "candidates": names, "seconds": decision.seconds})
            return decision
        except torch.OutOfMemoryError as error:  # the attack itself may have enough
            return Decision(None, f"choosing failed: {_said(error)}")
        except Exception as error:
            _warn(f"choosing who does {recipe} failed: {_said(error)}")
            return Decision(None, f"choosing failed: {_said(error)}")
        finally:
            self.spent += time.perf_counter() - began

    def _is_spent(self, fuse: Fuse, began: float | None = None) -> bool:
        now = 0.0 if began is None else time.perf_counter() - began
        return fuse is not True and self.spent + now >= self.budget

    def _candidates(self, recipe: Recipe, device: torch.device) -> tuple[list[Choice], dict[str, str]]:
        found, problems = [], {}
        for engine in self.engines:
            try:
                found += [Choice(engine, variant) for variant in engine.variants(recipe, device)]
            except Exception as error:
                problems[engine.name] = _said(error)
        return found, problems

    def _tune(self, trial: "_Trial", candidates: list[Choice], fuse: Fuse, began: float) -> Decision:
        """Check and time `candidates`, as far as the budget goes."""
        if reason := trial.judge.unfit:
            return Decision(None, reason)
        apart_seconds = trial.time_apart()
        if apart_seconds is None and fuse is not True:
            return Decision(None, f"it could not be timed: {trial.problems[APART]}", problems=trial.problems)
        times: dict[Choice, float] = {}
        complete = True
        for candidate in candidates:
            if self._is_spent(fuse, began):
                trial.problems[str(candidate)], complete = SPENT, False
            elif (seconds := trial.time(candidate)) is not None:
                times[candidate] = seconds
        named = {str(c): s for c, s in times.items()} | ({} if apart_seconds is None else {APART: apart_seconds})
        best = min(times, key=times.__getitem__, default=None)
        reason = ""
        if best is None:
            reason = f"no engine is right: {_first(trial.problems)}" if complete else SPENT
        elif fuse is not True and apart_seconds is not None and times[best] > GAIN * apart_seconds:
            reason = SLOWER
        return Decision(None if reason else best, reason, named, trial.problems, complete)


class _Trial:
    """Candidates at one recipe, on the tensors of one call. `problems` says why some are out."""

    def __init__(self, recipe: Recipe, x: Tensor, weight: Tensor, tensors: dict[str, Tensor], timer, problems: dict[str, str]):
        self.recipe, self.x, self.weight, self.tensors = recipe, x, weight, tensors
        self.timer, self.problems = timer, problems
        self.judge = Judge(recipe, x, weight, tensors)
        self._prepared: dict[str, Tensor] = {}

    def is_right(self, candidate: Choice) -> bool:
        try:
            problem = self.judge.problem(lambda results: self._run(candidate, results))
        except Exception as error:
            problem = _said(error)
        if problem:
            self.problems[str(candidate)] = problem
        return not problem

    def time(self, candidate: Choice) -> float | None:
        """Seconds, or None: it is wrong, or fails."""
        if not self.is_right(candidate):
            return None
        results = self.judge.buffers()
        return self._timed(str(candidate), lambda: self._run(candidate, results))

    def time_apart(self) -> float | None:
        scratch = {name: t for name, t in self.judge.buffers().items() if name != "out"}
        return self._timed(APART, lambda: apart(self.recipe, self.x, self.weight, None, **scratch, **self.tensors))

    def _timed(self, name: str, function: Callable[[], object]) -> float | None:
        try:
            seconds = float(self.timer(function))
            if math.isfinite(seconds) and seconds > 0:
                return seconds
            self.problems[name] = f"its time came out as {seconds}"
        except Exception as error:
            self.problems[name] = _said(error)
        return None

    def _run(self, candidate: Choice, results: dict[str, Tensor]) -> None:
        engine = candidate.engine
        if engine.name not in self._prepared:
            prepared = engine.prepare_weight(self.recipe, self.weight)
            self._prepared[engine.name] = self.weight if prepared is None else prepared
        engine.run(candidate.variant, self.recipe, self.x, self._prepared[engine.name], **results, **self.tensors)


def _recall(trial: _Trial, candidates: list[Choice], entry: dict) -> Decision | None:
    """The choice that is on disk, once it is found to be right here; None: it is not."""
    choice = next((c for c in candidates if str(c) == entry["choice"]), None)
    if choice is None or trial.judge.unfit or not trial.is_right(choice):
        return None
    return Decision(choice, seconds=entry["seconds"])


def _key(recipe: Recipe, device: torch.device, fuse: Fuse) -> tuple:
    """What a decision is for. Batches up to the next power of two share it: where batches shrink, none would be met twice."""
    return _alike(recipe), device, fuse is True, torch.backends.cudnn.benchmark


def _alike(recipe: Recipe) -> Recipe:
    """`recipe` with its batch up to the next power of two. An empty one shares with no other, as it shows nothing."""
    return replace(recipe, batch=recipe.batch and 1 << (recipe.batch - 1).bit_length())


def _warn(what: str) -> None:
    text = f"spat_kernels: {what}: PyTorch's convolution and our pass take its place. fuse=False leaves kernels for both alone"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def _may_not_wait(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def _first(problems: dict[str, str]) -> str:
    return next((f"{name}: {problem}" for name, problem in problems.items() if name != APART), "")


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Within: no autograd, no autocast, `device` the current one, and random numbers that nobody misses."""
    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(undisturbed())
        for context in (torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False)):
            stack.enter_context(context)
        if devices:
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.random.fork_rng(devices))
        yield


def graph_seconds(function: Callable[[], object]) -> float:
    """Seconds that `function()` takes on the current GPU: a CUDA graph of 10 calls, the fastest of 3 replays."""
    graph = CudaGraph(torch.device("cuda", torch.cuda.current_device()))

    def calls() -> None:
        for _ in range(CALLS):
            function()

    with graph.here():
        calls()  # builds kernels, and lets cuDNN choose its algorithms
        graph.capture(calls)
        events = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # the GPU is busy while the host gets ready
            begin.record()
            graph.replay()
            end.record()
            events.append((begin, end))
        graph.stream.synchronize()
    del graph
    torch.cuda.empty_cache()  # memory of a capture is of no use to anybody else
    return min(begin.elapsed_time(end) for begin, end in events) / 1000 / CALLS


chooser = Chooser(cache=Cache())
