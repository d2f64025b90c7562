"""The input gradient by torch.compile: the model's forward and its backward to the input, each one graph of Inductor's kernels.

For models that no plan knows. The weights are inputs of the graphs and never constants, so that each attack reads them as they
are then. What depends on them alone is computed once an attack (`hoisting.py`). A graph serves one batch size; from the second
size on, a graph of any size serves the others. Graphs live as long as their model, and all attacks on it share them.

What torch.compile cannot do as a whole goes through autograd, and a warning says why, once a model.
"""

import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._functorch import config as functorch

from ..checks import warn
from ..precision import half_dtype
from .autograd import InputGradient
from .hoisting import Hoisted, Hoisting, Values
from .nodes import CannotPlan
from .plan_cache import unwrapped
from .trace import first_line

KINDS = 16  # graphs of a model are kept for this many shapes and dtypes of images
SIZES = 4  # of batches that get a graph each, where a graph of any size fails
COMPILATIONS = 6  # of one graph: Dynamo compiles it again where something has changed that the model's code looks at
REMEDIES = {  # by what PyTorch says
    "C++ compiler": "Install one, such as g++, or name it in the environment variable CXX",
    "Triton": "Install the triton that belongs to this PyTorch",
    "graph break": "Let the model's forward be one graph (see torch._dynamo.explain)",
}

T = TypeVar("T")
_models: "weakref.WeakKeyDictionary[nn.Module, _Graphs]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_running = threading.local()  # .graph: the one that is called in this thread


class CannotCompile(Exception):
    """Why a model goes through autograd."""


class CompiledGradient(InputGradient):
    """`InputGradient` by compiled graphs. They are made at the first use of a shape, which takes seconds to minutes.

    Args:
        model: borrowed.
        x: images like those to come.
        precision, highest_label: as of `InputGradient`.

    Raises:
        CannotCompile: the model is no module, or has failed on such images before. A warning has said so.
    """

    def __init__(self, model, x: Tensor, precision: str | None = None, highest_label: int = -1):
        super().__init__(model, precision, highest_label)
        self._kind = (tuple(x.shape[1:]), x.dtype, x.device, precision, half_dtype(precision, x.device.type))
        self._graphs = _graphs_of(model)
        if self.failure:
            raise CannotCompile(self.failure)
        try:
            self._inner: nn.Module | None = unwrapped(model)
        except CannotPlan as reason:
            self._graphs.fail(self._kind, str(reason), model)
            raise CannotCompile(str(reason)) from reason
        self._values: dict[_Graph, Values] = {}
        self._last: _Graph | None = None  # what the last forward went through

    @property
    def failure(self) -> str | None:
        """Why such images go through autograd after all."""
        return self._graphs.failed.get(self._kind)

    def prepare(self) -> None:
        """Called first in every run: what depends on the weights alone is computed again."""
        self._values = {}

    def release(self) -> None:
        super().release()
        self._inner = None

    def backward(self, dlogits: Tensor, keep: bool = False) -> Tensor:
        graph, images = self._last, self._given
        if graph is None:
            return super().backward(dlogits, keep)
        try:
            return self._within(graph, lambda: super(CompiledGradient, self).backward(dlogits, keep))
        except (torch.OutOfMemoryError, ValueError):  # the latter is what `InputGradient` says of a model
            raise
        except Exception as error:
            reason = _reason(error)
        self._graphs.fail(self._kind, reason, self.model)
        self.forward(images)
        return self.backward(dlogits, keep)

    def _outputs(self, images: Tensor) -> Any:
        inner = self._inner
        assert inner is not None
        layout = images.requires_grad, images.is_contiguous(), inner.training
        self._last = graph = self._graphs.find((self._kind, *layout), len(images))
        if graph is None:
            if not self.failure:
                self._graphs.warn(self.model, f"its code knows the number of images, and {SIZES} numbers have been compiled")
            return self.model(images)
        try:
            return self._within(graph, lambda: graph(inner, images))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = _reason(error)
        self._last = None
        if graph.any_size:
            self._graphs.one_by_one.add(self._kind)
            return self._outputs(images)
        outputs = self.model(images)  # an error of the model's own is raised here
        self._graphs.fail(self._kind, reason, self.model)
        return outputs

    def _within(self, graph: "_Graph | None", call: Callable[[], T]) -> T:
        """`call()`, in which `graph` finds what has been computed of the weights."""
        if graph is None:
            return call()
        graph.hoisted.values = self._values.setdefault(graph, {})
        try:
            return call()
        finally:
            graph.hoisted.values = None


class _Graph:
    """A model's call, compiled as a whole, for batches of one size or of any. It knows no model."""

    def __init__(self, any_size: bool):
        self.any_size, self.hoisted, self.compilations = any_size, Hoisted(), 0
        # Dynamo keeps and counts what it compiles at the code object: this is one of its own.
        function = FunctionType(_call.__code__.replace(), globals(), "call")
        self._function = torch.compile(function, backend=_backend, fullgraph=True, dynamic=False)

    def __call__(self, model: nn.Module, images: Tensor) -> Any:
        before, caching = getattr(_running, "graph", None), torch.is_autocast_cache_enabled()
        _running.graph = self
        torch.set_autocast_cache_enabled(
            False
        )  # as in a capture: what was compiled with the cache, Dynamo compiles again without
        try:
            with nullcontext() if self.compilations else _unmarked([*model.parameters(), *model.buffers(), images]):
                if self.any_size:
                    torch._dynamo.mark_dynamic(images, 0)
                outputs = self._function(model, images)
        finally:
            torch.set_autocast_cache_enabled(caching)
            _running.graph = before
        if not self.compilations:
            raise RuntimeError("torch.compile is switched off (TORCH_COMPILE_DISABLE, set_stance or suppress_errors)")
        return outputs


@contextmanager
def _unmarked(tensors: list[Tensor]):
    """Within: Dynamo compiles. Its marks on `tensors` go again, but for those that they had."""
    before = [set(vars(t)) for t in tensors]
    try:
        yield
    finally:
        for t, names in zip(tensors, before, strict=True):
            for name in [name for name in vars(t) if name.startswith("_dynamo") and name not in names]:
                delattr(t, name)


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without what Dynamo and Inductor wrap it in."""
    while isinstance(inner := getattr(error, "inner_exception", None), Exception):
        error = inner
    return first_line(error)


def _call(model, images):
    return model(images)


def _backend(graph_module: fx.GraphModule, inputs: list):
    """What Dynamo calls with the whole graph. It is one object for all, since Dynamo never forgets a backend."""
    graph: _Graph = _running.graph
    graph.compilations += 1
    if graph.compilations > COMPILATIONS:
        raise RuntimeError(f"what its code looks at changes: it has been compiled {COMPILATIONS} times")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("it would have to be compiled while a CUDA graph is captured")
    return compile_graph(graph_module, inputs, graph.hoisted)


def compile_graph(graph_module: fx.GraphModule, inputs: list, hoisted: Hoisted):
    """Inductor's kernels for a graph of Dynamo's. Its backward is compiled at once, so that it fails here if it does."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # a slow import, which most attacks do not need

    _replace_global_pooling(graph_module)
    _refuse_wrong_pooling(graph_module)
    nodes = graph_module.graph.find_nodes(op="placeholder")
    weights = [isinstance(t, Tensor) and not _is_images(node) for node, t in zip(nodes, inputs, strict=True)]
    inner = Hoisting(compile_fx_inner, weights, hoisted)
    # Buffers are not donated, since a backward may come again; AOTAutograd's cache cannot keep what `Hoisting` returns.
    with functorch.patch(donated_buffer=False, force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        options = {"triton.cudagraphs": False, "freezing": False}  # the attack is captured as a whole; weights are no constants
        return compile_fx(graph_module, inputs, inner_compile=inner, config_patches=options)


def _replace_global_pooling(graph_module: fx.GraphModule) -> None:
    """Global average pooling becomes the mean that it is.

    In channels_last PyTorch sets the result's strides by `as_strided_`, whose backward Inductor 2.11 puts in the wrong order.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=nn.functional.adaptive_avg_pool2d):
        if not node.kwargs and node.args[1] in (1, (1, 1), [1, 1]):
            node.target, node.args = torch.mean, (node.args[0], (-2, -1), True)
    graph_module.recompile()


def _refuse_wrong_pooling(graph_module: fx.GraphModule) -> None:
    """Inductor divides the gradients of a last window that overhangs by the whole window (pytorch/pytorch#198119)."""
    for node in graph_module.graph.find_nodes(op="call_function", target=nn.functional.avg_pool2d):
        given = dict(zip(("ceil_mode", "count_include_pad"), node.args[4:], strict=False)) | node.kwargs
        if given.get("ceil_mode") and given.get("count_include_pad", True):
            raise RuntimeError("Inductor's gradient of avg_pool2d is wrong with ceil_mode and count_include_pad")


def _is_images(node: fx.Node) -> bool:
    argument = node.meta.get("grapharg")
    return argument is None or argument.source.name == "L['images']"


class _Graphs:
    """The graphs of one model.

    Attributes:
        failed: kinds of images that go through autograd, and why.
        one_by_one: kinds of images for which a graph of any batch size fails.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple, dict[int | None, _Graph]] = {}  # by the batch size; None is any
        self.failed: dict[tuple, str] = {}
        self.one_by_one: set[tuple] = set()
        self._warned = False

    def find(self, kind: tuple, size: int) -> _Graph | None:
        """The graph for batches of `size`, a new one if there is none; None where autograd takes them."""
        with _lock:
            if kind[0] in self.failed:
                return None
            graphs = self._graphs.setdefault(kind, {})
            apart = not graphs or size == 1 or kind[0] in self.one_by_one  # Dynamo takes a size of 1 for a constant
            key = size if apart or size in graphs else None
            if key not in graphs:
                if len(graphs) > SIZES:  # one of them is that of any size
                    return None
                graphs[key] = _Graph(any_size=key is None)
                if len(self._graphs) > KINDS:
                    del self._graphs[next(iter(self._graphs))]
            return graphs[key]

    def fail(self, kind: tuple, reason: str, model: nn.Module) -> None:
        """Images of that kind go through autograd from now on."""
        with _lock:
            self.failed[kind] = reason
        self.warn(model, reason)

    def warn(self, model: nn.Module, reason: str) -> None:
        """Say why, but once a model."""
        with _lock:
            warned, self._warned = self._warned, True
        if not warned:
            _warn(model, reason)


def _graphs_of(model) -> _Graphs:
    """The graphs of `model`. CannotCompile, if it is no module."""
    if not isinstance(model, nn.Module):
        reason = "it is a plain callable and no torch.nn.Module"
        _warn(model, reason)
        raise CannotCompile(reason)
    with _lock:
        return _models.setdefault(model, _Graphs())


def _warn(model, reason: str) -> None:
    remedy = next((remedy for said, remedy in REMEDIES.items() if said in reason), None)
    warn(
        f"attacks on this {type(model).__name__} go through autograd, since it cannot be compiled: {reason}. "
        f"{remedy + ', or use' if remedy else 'Use'} input_gradient='auto' (the plan, where there is one) or 'autograd'"
    )
