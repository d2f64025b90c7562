"""Work on a model's weights alone, taken out of a compiled graph: it is done once an attack, not in every pass.

Casts of weights, folded BatchNorm statistics, standardised weights, tables of position biases: whatever depends on parameters
and buffers, and not on the images. Weights stay inputs of the graph: an optimiser's update counts from the next attack on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._guards import TracingContext

Values = dict["Hoisting", dict[str, Tensor]]
VIEWS = {  # cost nothing where they stand
    getattr(torch.ops.aten, name).default
    for name in ("view", "permute", "expand", "unsqueeze", "t", "alias", "_unsafe_view", "_reshape_alias", "as_strided", "detach")
} | {torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims, torch.ops.aten.transpose.int, torch.ops.aten.slice.Tensor,
     torch.ops.aten.select.int}  # fmt: skip


class Hoisted:
    """Where the graphs of one compiled function find what was taken out of them.

    Attributes:
        values: of the attack that runs now; None where there is none, and then they are computed in the call.
    """

    values: Values | None = None


class Hoisting:
    """Stands between AOTAutograd and Inductor: splits each graph, a forward and its backward, and compiles what is left.

    Args:
        compile_graph: Inductor's compiler of one graph.
        weights: which of the graph's inputs are the model's; the others are the images and their sizes.
        hoisted: where the graphs look.
    """

    def __init__(self, compile_graph: Callable, weights: Sequence[bool], hoisted: Hoisted):
        self._compile_graph, self._weights, self._hoisted = compile_graph, weights, hoisted
        self._known: set[str] = set()  # nodes of the forward that depend on weights alone: some are inputs of the backward

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence, **options):
        graph = graph_module.graph
        if options.get("is_backward"):
            _note_that_nothing_is_donated()
        else:
            self._known = self._known_inputs(graph)
        known = self._from_weights(graph)
        names = self._needed(graph, known)
        if not names:
            return self._compile_graph(graph_module, inputs, **options)
        before = _cut_out(graph, names)
        placeholders = [node.meta["val"] for node in _replace_by_inputs(graph_module, names)]
        # Only their shapes and strides count.
        compiled = self._compile_graph(graph_module, [*inputs, *placeholders], **options)
        layouts = {name: (tuple(value.shape), tuple(value.stride())) for name, value in zip(names, placeholders, strict=True)}
        hoisted, key = self._hoisted, self

        def run(given: list) -> Sequence:
            values = {} if hoisted.values is None else hoisted.values.setdefault(key, {})
            if any(name not in values for name in names):
                for name, value in zip(names, before(*given), strict=True):
                    values.setdefault(name, _laid_out(value, *layouts[name]))
            arguments = [*given, *(values[name] for name in names)]
            given.clear()  # so that activations are freed as soon as they have been read
            return compiled(arguments)

        run._boxed_call = True  # type: ignore[attr-defined]  # it takes a list that it may clear
        return run

    def _known_inputs(self, graph: fx.Graph) -> set[str]:
        """The names of the inputs that are weights; none where the model writes on them, since then they differ by the pass."""
        context = TracingContext.try_get()
        metadata = context.fw_metadata if context else None
        inputs = graph.find_nodes(op="placeholder")
        if metadata is None or metadata.mutated_inp_runtime_indices or len(inputs) != len(self._weights):
            return set()
        return {node.name for node, weight in zip(inputs, self._weights, strict=True) if weight}

    def _from_weights(self, graph: fx.Graph) -> set[fx.Node]:
        """The nodes that depend on weights alone, or on nothing."""
        known: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder":
                if node.name in self._known:
                    known.add(node)
            elif _is_pure(node) and all(each in known for each in node.all_input_nodes):
                known.add(node)
        self._known |= {node.name for node in known}
        return known

    def _needed(self, graph: fx.Graph, known: set[fx.Node]) -> list[str]:
        """The names of those nodes whose values the rest of the graph reads, directly or through views of them."""
        roots = {node for node in known if any(each in known for each in node.all_input_nodes)}  # not what is made of nothing
        needed = [
            node
            for node in graph.nodes
            if node in roots and node.target not in VIEWS and not _symbolic(node.meta["val"]) and _is_read(node, known)
        ]
        return [node.name for node in needed]


def _note_that_nothing_is_donated() -> None:
    """So that a backward may come again. What else lets PyTorch allow that is a setting of the process, which threads share."""
    context = TracingContext.try_get()
    if context and context.fw_metadata:
        context.fw_metadata.bw_donated_idxs = []


def _is_pure(node: fx.Node) -> bool:
    """Whether it is an op that makes one tensor, draws no random numbers and writes on none of its arguments."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return False
    return torch.Tag.nondeterministic_seeded not in op.tags and not op._schema.is_mutable


def _symbolic(value: Tensor) -> bool:
    return any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride()))


def _is_read(node: fx.Node, known: set[fx.Node]) -> bool:
    """Whether a node outside of `known` reads it, or reads a view of it."""
    return any(user not in known or (user.target in VIEWS and _is_read(user, known)) for user in node.users)


def _cut_out(graph: fx.Graph, names: list[str]) -> fx.GraphModule:
    """A function of all inputs of `graph` that returns the values of the nodes `names`."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output":
            copies[node] = part.node_copy(node, copies.__getitem__)
    named = {node.name: copy for node, copy in copies.items()}
    part.output(tuple(named[name] for name in names))
    part.eliminate_dead_code()  # inputs stay
    return fx.GraphModule({}, part)


def _replace_by_inputs(graph_module: fx.GraphModule, names: list[str]) -> list[fx.Node]:
    """Let the nodes `names` be inputs behind those that there are. Returns these, in that order."""
    graph, new = graph_module.graph, []
    nodes = {node.name: node for node in graph.nodes}
    last = graph.find_nodes(op="placeholder")[-1]
    for name in names:
        with graph.inserting_after(last):
            last = graph.placeholder(f"hoisted_{name}")
        last.meta = dict(nodes[name].meta)
        nodes[name].replace_all_uses_with(last)
        new.append(last)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return new


def _laid_out(value: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """`value` with the strides that the graph was compiled for."""
    if value.stride() == strides:
        return value
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device).copy_(value)
