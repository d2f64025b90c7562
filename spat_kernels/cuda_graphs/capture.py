"""Whole attacks as CUDA graphs: random start, all steps and the choice of restarts in one launch.

`PGD(graph="auto")` captures the second attack of a kind and replays it for later batches; `graph=True` captures the first. A kind
is the model, the shape and layout of x, the settings except eps, step size, generator and number of restarts, and what steers
PyTorch (autocast, TF32, determinism). Of APGD each run is captured by itself: what it broke is left out of the next.

The attack that is captured is first run as it is, on the stream of the capture: it gives that call's result, and meanwhile cuDNN
chooses its algorithms. So an error of the model is raised as ever, and a failed capture costs nothing but time: the attack then
runs without a graph from there on, and says why, once. Random numbers for the start are drawn before each replay, by the
same calls as without a graph: equal seeds give equal starts. What the model draws itself (dropout) is drawn in the graph,
from torch's default generator, equally.

A graph knows addresses only, and no Python code of the model runs in a replay. So before each replay the model is compared with
the captured one (`structure.py`): other addresses, modes, hooks, attributes or modules mean a new capture. That makes freed
memory harmless: a graph is replayed only while the model's tensors *now* lie where the captured ones did, with their shapes and
types; whether they are the same objects does not matter to kernels that read whatever is there. Buffers that `borrowed` swaps
for copies are copied in the graph. What cannot be seen this way is kept out: see `Graphs.attack`.
"""

import atexit
import gc
import threading
import weakref
from contextlib import contextmanager, suppress
from itertools import count
from types import CellType, FunctionType, MethodType

import torch
from torch import Tensor, nn

from .. import checks
from .. import rng as host_random
from ..losses import OURS, AutogradLoss, Custom, Loss
from ..model_state.borrow import borrowed
from ..model_state.structure import Structure, freeze
from ..precision import backends
from .run import Batch, Run, drawing

Outcome = tuple[tuple[Tensor, ...], int | None]
# Attacks that were seen but not captured cost nothing but a key and some weak references.
REMEMBERED = 128
# Longer runs are captured only if they are told to be: each forward and backward is hundreds of kernels in the graph.
PASSES = 256
# Graphs whose capture could not end. torch 2.11's allocator of pinned memory, which Python cannot tell of the end, goes on asking
# them whether they capture: they hold nothing, but must stay.
_undead: list = []


class CudaGraph:
    """One capture, and the stream that it is replayed on.

    All that touches the tensors of a capture happens within `here()`, on its own stream. So uses from different streams follow
    one another, and memory that is freed is not used again before the last kernel on it is done.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph
        self._random: torch.Generator

    @contextmanager
    def here(self):
        """Within: on the stream of the capture, after all that the caller's stream was given, which later waits in turn."""
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            caller.wait_stream(self.stream)

    def capture(self, function) -> None:
        """Capture `function()`, which has run once within `here()`. Whatever it raises, CUDA and random numbers stay usable."""
        # The generator lends the graph a state of its own: a capture that fails leaves that in capture mode for good, and
        # replays on several streams would share its (seed, offset) on the device.
        generator = torch.cuda.default_generators[self.stream.device_index]
        state, lent = generator.graphsafe_get_state(), generator.clone_state()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        failures: list[BaseException] = []
        torch._C._cuda_clearCublasWorkspaces()  # it is to take its workspace from `pool`, where nobody else can free it
        generator.graphsafe_set_state(lent)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                try:
                    function()
                except Exception as error:
                    failures.append(error)
                    raise
        except BaseException as error:
            # If it is cudaStreamEndCapture that failed, torch has not told its allocators of the end; else this is refused.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, pool)
                torch._C._cuda_releasePool(self.stream.device_index, pool)
                _undead.append(graph)
            raise (failures or [error])[0] from None  # the cause, not that the capture could not end well
        finally:
            failures.clear()  # an exception knows this frame, and so the model
            generator.graphsafe_set_state(state)
            torch._C._cuda_clearCublasWorkspaces()
        self._graph, self._random = graph, lent

    def replay(self) -> None:
        generator = torch.cuda.default_generators[self.stream.device_index]
        self._random.set_state(generator.get_state())
        offset = self._random.get_offset()
        self._graph.replay()
        if self._random.get_offset() != offset:
            generator.set_offset(self._random.get_offset())


class Graphs:
    """The captured attacks of a process, the most recently used ones. `spat_kernels.graphs` is the one that attacks use.

    Each holds memory for its batch and for the intermediate results of a forward and backward. It goes with its model, by `free`,
    or when `capacity` others have been used since.

    Args:
        capacity: how many captures to hold, >= 1.
        graph: the class that captures.
    """

    def __init__(self, capacity: int = 8, graph: type[CudaGraph] = CudaGraph):
        self._graph = graph
        self._models: dict[int, _Model] = {}
        self._lock = threading.Lock()
        self._clock = count()
        self.capacity = capacity

    @property
    def capacity(self) -> int:
        """How many captures are held; setting it frees those above it."""
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: int) -> None:
        checks.check_count("capacity", capacity, 1)
        self._capacity = capacity
        self._evict()

    def __len__(self) -> int:
        """How many captures are held now."""
        return sum(entry.captured is not None for _, _, entry in self._entries())

    def free(self, model: nn.Module | None = None) -> None:
        """Free the captures of `model`, or all; and forget what could not be captured, so that it is tried again."""
        with self._lock:
            if model is None:
                self._models.clear()
            else:
                self._models.pop(id(model), None)

    def attack(self, settings, model, batch: Batch, highest_label: int) -> Outcome:
        """The outcome of an attack (see `settings.run_class`, a class of runs), and the model's number of classes.

        With graph="auto" only what can be checked is captured: an nn.Module, and losses other than callables and `AutogradLoss`
        (Python code that may read what is out of sight), outside of dispatch modes (which would not see a replay); and no run of
        more than PASSES forwards. With graph=True the caller vouches for the globals that such a loss reads.

        Raises:
            ValueError: graph=True, but x is not on a CUDA device, or the model is a plain callable.
        """
        if not self._is_wanted(settings, model, batch.x):
            return _attack(settings, model, batch, highest_label)
        key, samples = _key(settings, batch), len(batch.x)
        known, entry = self._find(model, key, samples)
        with entry.lock:
            if entry.refused is None:
                unchanged = entry.structure is not None and entry.structure.matches(model)
                if entry.captured is not None and unchanged:
                    return entry.replay(*entry.captured, settings, batch, highest_label)
                entry.captured = None
                if entry.samples == samples and (settings.graph is True or unchanged):
                    outcome = self._capture(entry, settings, model, batch, highest_label)
                    if entry.refused is not None:
                        known.warn(type(model).__name__, entry.refused)
                    self._evict()
                    return outcome
        result = _attack(settings, model, batch, highest_label)
        if entry.refused is None:
            with entry.lock:
                if entry.captured is None:
                    entry.remember(model, settings)
            self._evict()
        return result

    def _is_wanted(self, settings, model, x: Tensor) -> bool:
        if settings.graph is False:
            return False
        on_device, is_module = x.device.type == self._graph.device_type, isinstance(model, nn.Module)
        if settings.graph is True:
            if not on_device:
                raise ValueError(f"graph=True, but x is on {x.device}: move x, y and model to a CUDA device, or set graph='auto'")
            if not is_module:
                raise ValueError(
                    f"graph=True, but model is a plain {type(model).__name__}, whose parts cannot be checked for changes: "
                    "make it an nn.Module (nn.Sequential(normalize, net)), or set graph='auto'"
                )
            return True
        if settings.passes > PASSES or isinstance(settings.loss, AutogradLoss):
            return False
        seen_by_a_mode = torch._C._len_torch_dispatch_stack() > 0
        return on_device and is_module and not seen_by_a_mode

    def _find(self, model: nn.Module, key: tuple, samples: int) -> "tuple[_Model, _Entry]":
        with self._lock:
            known = self._models.get(id(model))
            if known is None or known.ref() is not model:
                models, i = self._models, id(model)
                known = self._models[i] = _Model(weakref.ref(model, lambda _: models.pop(i, None)))
            entry = known.entries.get((key, samples))
            if entry is None or entry.captured is None:
                entry = known.roomier(key, samples, model) or entry or known.entries.setdefault((key, samples), _Entry(samples))
            entry.used = next(self._clock)
        return known, entry

    def _entries(self) -> "list[tuple[_Model, tuple, _Entry]]":
        return [(known, key, entry) for known in list(self._models.values()) for key, entry in list(known.entries.items())]

    def _evict(self) -> None:
        with self._lock:
            entries = sorted(self._entries(), key=lambda found: -found[2].used)
            captured = [found for found in entries if found[2].captured is not None]
            for known, key, _ in (*captured[self._capacity :], *entries[REMEMBERED:]):
                known.entries.pop(key, None)

    def _capture(self, entry: "_Entry", settings, model, batch: Batch, highest_label: int) -> Outcome:
        """Attack as ever, and on the way capture that into `entry`, or the reason why not."""
        checks.check_model(model, batch.x)
        settled = entry.settled
        if settings.graph is True:
            entry.remember(model, settings)
        structure = entry.structure
        if entry.refused is None:
            assert structure is not None
            entry.refused = _obstacle(model, structure, batch.x)
        if entry.refused is not None:
            return _attack(settings, model, batch, highest_label)
        assert structure is not None
        graph, outcome, loss = self._graph(batch.x.device), settings.run_class.empty_outcome(batch.x), _loss_key(settings.loss)
        with graph.here():
            run = settings.run_class(settings, batch.copy())
            with borrowed(model, settings.bn_mode):
                run.attack(model, settings.generator, batch.runs, highest_label)
            _copy(outcome, run.outcome)
            if change := structure.difference(model):
                entry.remember(model, settings)
                if settled:  # before this attack there was another: it is not what a model makes on its first use
                    entry.refused = f"the model changes as it runs ({change})"
                return outcome, run.classes
            if _loss_key(settings.loss) != loss:
                entry.refused = "the loss changes its attributes as it runs"
                return outcome, run.classes

            def everything():
                with borrowed(model, settings.bn_mode):
                    run()

            with _quiet_capture():
                random_states = host_random.states()
                try:
                    graph.capture(everything)
                except Exception as error:
                    text = str(error).strip().split("\n")[0]
                    entry.refused = f"{type(error).__name__}: {text}"
                if host_random.restore(random_states) and entry.refused is None:
                    entry.refused = "random numbers were drawn on the host meanwhile, which a replay would not draw anew"
            if entry.refused is not None:
                return outcome, run.classes
        run.release()
        entry.captured = graph, run
        entry.independent = run.model.independent_samples and type(settings.loss) in OURS
        return outcome, run.classes


class _Entry:
    """What is known of one kind of attack on a model: the model's structure at the last one, a capture, or why there is none."""

    def __init__(self, samples: int):
        self.samples, self.lock = samples, threading.RLock()
        self.structure: Structure | None = None
        self.captured: tuple[CudaGraph, Run] | None = None
        self.refused: str | None = None
        self.independent = False  # whether a shorter batch may be replayed
        self.settled = False  # whether an attack has run
        self.used = 0

    def remember(self, model: nn.Module, settings) -> None:
        self.settled = True
        try:
            self.structure = Structure(model, training=settings.bn_mode == "keep")
        except TypeError as error:
            self.refused = str(error)

    @staticmethod
    def replay(graph: CudaGraph, run: Run, settings, batch: Batch, highest_label: int) -> Outcome:
        checks.check_classes(highest_label, run.classes)
        outcome = run.empty_outcome(batch.x)
        with graph.here():
            run.load(batch)
            for _ in range(batch.runs):
                run.draw(settings.generator)
                with drawing:
                    graph.replay()
            _copy(outcome, run.outcome)
        return outcome, run.classes


class _Model:
    """The attacks on one model, which is held weakly."""

    def __init__(self, ref: "weakref.ref[nn.Module]"):
        self.ref = ref
        self.entries: dict[tuple, _Entry] = {}
        self.warned: set[str] = set()

    def roomier(self, key: tuple, samples: int, model: nn.Module) -> _Entry | None:
        """The smallest capture of up to twice as many samples, if one sample's result does not depend on the others."""
        fitting = [
            (n, entry)
            for (other, n), entry in list(self.entries.items())
            if other == key and samples < n <= 2 * samples and entry.captured is not None and entry.independent
        ]
        entry = min(fitting, key=lambda found: found[0])[1] if fitting else None
        return entry if entry is not None and entry.structure is not None and entry.structure.matches(model) else None

    def warn(self, name: str, reason: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            checks.warn(
                f"attacks on this {name} run without a CUDA graph, which is slower for small batches: {reason}. "
                "graph=False says that this is fine"
            )


def _attack(settings, model, batch: Batch, highest_label: int) -> Outcome:
    checks.check_model(model, batch.x)
    run = settings.run_class(settings, batch)
    with borrowed(model, settings.bn_mode):
        run.attack(model, settings.generator, batch.runs, highest_label)
    return run.outcome, run.classes


def _copy(outcome: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(outcome, found, strict=True):
        ours.copy_(theirs)


def _obstacle(model: nn.Module, structure: Structure, x: Tensor) -> str | None:
    """Why a capture of `model` would be wrong although nothing would fail."""
    if structure.hooked is not None:
        return f"{structure.hooked} has hooks, which would not run in a replay"
    if any(isinstance(m, nn.DataParallel) and len(m.device_ids) > 1 for m in model.modules()):
        return "nn.DataParallel works on several devices: attack its .module"
    if others := structure.devices - {x.device}:
        return f"it has tensors on {', '.join(sorted(map(str, others)))} and x is on {x.device}: move them by .to(device)"
    return None


@contextmanager
def _quiet_capture():
    """Within: no random numbers drawn by other attacks, no garbage collected (which may free graphs and memory, and is no part of
    the attack), no weights cast by autocast that outlive it."""
    collecting, caching = gc.isenabled(), torch.is_autocast_cache_enabled()
    with drawing:
        gc.disable()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(caching)
            if collecting:
                gc.enable()


def _key(settings, batch: Batch) -> tuple:
    """All that a captured attack takes for granted, apart from the model and the number of samples."""
    x, cuda, cudnn = batch.x, backends.cuda.matmul, backends.cudnn
    return (
        (x.shape[1:], x.dtype, x.device, x.is_contiguous()),
        (*(t is None for t in (batch.y, batch.start, batch.targets)),),
        (*(isinstance(v, Tensor) and v.numel() > 1 for v in (batch.eps, batch.step_size)),),
        (settings.run_class, settings.kind(), _loss_key(settings.loss), settings.norm, tuple(settings.bounds)),
        (settings.bn_mode, settings.precision, settings.input_gradient),
        (torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)),
        (cuda.fp32_precision, cuda.allow_fp16_accumulation, cuda.allow_fp16_reduced_precision_reduction),
        (cuda.allow_bf16_reduced_precision_reduction, cudnn.conv.fp32_precision, cudnn.enabled, cudnn.benchmark),
        (cudnn.deterministic, torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()),
    )


def _loss_key(loss: Loss):
    """Losses of ours by value; others by their class and attributes, and callables as below. Nothing is kept alive."""
    if type(loss) in OURS:
        return loss
    if type(loss) is Custom:
        return _function_key(loss.function)
    return freeze(type(loss)), freeze(vars(loss) if hasattr(loss, "__dict__") else loss)


def _function_key(function):
    """A function by its code and what it closes over, since it may be made anew for each attack; other callables by identity."""
    if isinstance(function, MethodType):
        return freeze(function.__self__), _function_key(function.__func__)
    if not isinstance(function, FunctionType):
        return freeze(function)
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]  # an empty one raises
    return freeze((function.__code__, function.__defaults__, function.__kwdefaults__, cells))


graphs = Graphs()
atexit.register(graphs.free)  # while CUDA is still there
