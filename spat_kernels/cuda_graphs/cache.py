"""Whole attacks as CUDA graphs: random start, all steps and the choice of restarts in one launch.

`PGD(graph="auto")` captures the second attack of a kind and replays it for later batches. `graph=True` captures the first. A kind
is the model, the shape and layout of x, the settings except eps, step size, generator and number of restarts, and what steers
PyTorch (autocast, TF32, determinism): see `key.py`. APGD's runs are captured one by one: what one broke is left out of the next.

The attack that is captured is first run as it is, on the stream of the capture. It gives that call's result, and meanwhile cuDNN
chooses its algorithms. So an error of the model is raised as ever, and a failed capture costs nothing but time: the attack then
runs without a graph from there on, and says why, once. Random numbers for the start are drawn before each replay, by the
same calls as without a graph: equal seeds give equal starts. What the model draws itself (dropout) is drawn in the graph,
from torch's default generator, equally.

A graph knows addresses only, and no Python code of the model runs in a replay. So before each replay the model is compared with
the captured one (`model_state/structure.py`): other addresses, modes, hooks, attributes or modules mean a new capture. That
makes freed memory harmless: a graph is replayed only while the model's tensors *now* lie where the captured ones did, with
their shapes and types. Whether they are the same objects does not matter to kernels that read whatever is there. Buffers that
`borrowed` swaps for copies are copied in the graph. What cannot be seen this way is kept out: see `Graphs.attack`.
"""

import atexit
import threading
import weakref
from itertools import count
from operator import attrgetter

import torch
from torch import Tensor, nn

from .. import checks
from ..cuda_graph import CudaGraph
from ..losses import AutogradLoss
from .capture import CapturedAttack, Outcome, eager_attack
from .key import attack_key
from .run import Batch

# Attacks that were seen but not captured cost nothing but a key and some weak references.
REMEMBERED = 128
# Longer runs are captured only with graph=True: each forward and backward is hundreds of kernels in the graph.
PASSES = 256


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
        self._models: dict[int, _AttacksOnModel] = {}
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
            return eager_attack(settings, model, batch, highest_label)
        samples = len(batch.x)
        known, entry = self._find(model, attack_key(settings, batch), samples)
        with entry.lock:
            if entry.refused is None:
                unchanged = entry.matches(model)
                if unchanged and entry.captured is not None:
                    return entry.replay(settings, batch, highest_label)
                entry.captured = None
                if entry.samples == samples and (settings.graph is True or unchanged):
                    outcome = entry.capture(self._graph, settings, model, batch, highest_label)
                    if entry.refused is not None:
                        known.warn(type(model).__name__, entry.refused)
                    self._evict()
                    return outcome
        outcome = eager_attack(settings, model, batch, highest_label)
        if entry.refused is None:
            with entry.lock:
                if entry.captured is None:
                    entry.remember(model, settings)
            self._evict()
        return outcome

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

    def _find(self, model: nn.Module, key: tuple, samples: int) -> "tuple[_AttacksOnModel, CapturedAttack]":
        with self._lock:
            known = self._models.get(id(model))
            if known is None or known.ref() is not model:
                models, i = self._models, id(model)
                known = self._models[i] = _AttacksOnModel(weakref.ref(model, lambda _: models.pop(i, None)))
            entry = known.find(key, samples, model)
            entry.used = next(self._clock)
        return known, entry

    def _entries(self) -> "list[tuple[_AttacksOnModel, tuple, CapturedAttack]]":
        return [(known, key, entry) for known in list(self._models.values()) for key, entry in list(known.entries.items())]

    def _evict(self) -> None:
        with self._lock:
            entries = sorted(self._entries(), key=lambda found: -found[2].used)
            captured = [found for found in entries if found[2].captured is not None]
            for known, key, _ in (*captured[self._capacity :], *entries[REMEMBERED:]):
                known.entries.pop(key, None)


class _AttacksOnModel:
    """The attacks on one model, which is held weakly, by their keys and numbers of samples."""

    def __init__(self, ref: "weakref.ref[nn.Module]"):
        self.ref = ref
        self.entries: dict[tuple, CapturedAttack] = {}
        self.warned: set[str] = set()

    def find(self, key: tuple, samples: int, model: nn.Module) -> CapturedAttack:
        """The attack of that kind on that many samples, which may be a new one.

        Where it is not captured, the smallest capture of up to twice as many serves, if no sample's result depends on the others.
        """
        entry = self.entries.get((key, samples))
        if entry is None or entry.captured is None:
            larger = [
                found
                for (other, n), found in list(self.entries.items())
                if other == key and samples < n <= 2 * samples and found.captured is not None and found.independent
            ]
            smallest = min(larger, key=attrgetter("samples"), default=None)
            if smallest is not None and smallest.matches(model):
                return smallest
        return entry or self.entries.setdefault((key, samples), CapturedAttack(samples))

    def warn(self, name: str, reason: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            checks.warn(
                f"attacks on this {name} run without a CUDA graph, which is slower for small batches: {reason}. "
                "graph=False says that this is fine"
            )


graphs = Graphs()
atexit.register(graphs.free)  # while CUDA is still there
