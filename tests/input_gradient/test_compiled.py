"""Compiled graphs give what autograd gives, for the weights as they are, and leave no trace; what fails goes through autograd.

Most tests let Inductor's compiler of a graph be an interpreter: all but the kernels is as it is, in a tenth of the time.
"""

import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import spat_kernels as sk
from spat_kernels import APGD, PGD
from spat_kernels.attacks import pgd as attacks
from spat_kernels.cuda_graph import undisturbed
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.input_gradient import compiled
from spat_kernels.input_gradient.autograd import InputGradient
from spat_kernels.input_gradient.choose import input_gradient
from spat_kernels.input_gradient.compiled import CompiledGradient
from spat_kernels.model_state.borrow import borrowed
from spat_kernels.model_state.structure import Structure
from tests.cuda_graphs.fake_graph import FakeGraph
from tests.helpers import EPS, assert_same, batch, cnn, snapshot


class Net(nn.Module):
    """Layer norm, a table of biases and batch norm: much that depends on weights alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm(36)
        self.table, self.fc = nn.Parameter(torch.randn(9, 36)), nn.Linear(144, 10)
        self.register_buffer("index", torch.tensor([3, 1, 4, 1]))
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        for p in (self.bn.weight, self.bn.bias, self.norm.weight, self.norm.bias):
            nn.init.uniform_(p, 0.5, 1.5)

    def forward(self, x):
        x = nn.functional.gelu(self.bn(self.conv(x))).flatten(2)
        return self.fc(nn.functional.silu(self.norm(x) + self.table[self.index]).flatten(1))


@pytest.fixture
def interpreted(monkeypatch) -> list:
    """Graphs are interpreted, not compiled. What was, (graph, whether it is a backward)."""
    seen = []

    def compile_graph(graph_module, inputs, **options):
        seen.append((graph_module, options.get("is_backward", False)))

        def run(given):
            with torch.no_grad():
                return graph_module(*given)

        run._boxed_call = True
        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", compile_graph)
    return seen


@pytest.fixture(autouse=True)
def _no_warning():
    """Nothing goes through autograd without a test's expecting it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="attacks on this")
        yield


def passes(gradient, x, bn_mode="eval"):
    """Logits, the gradient at x twice over, and logits without a graph."""
    model = gradient.model
    with borrowed(model, bn_mode), gradient.arithmetic(x.device.type):
        gradient.prepare()
        logits = gradient.forward(x)
        dlogits = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        first, again = gradient.backward(dlogits, keep=True), gradient.backward(dlogits)
        assert torch.equal(first, again)
        return logits, first, gradient.logits(x)


def assert_as_autograd(model, x, precision=None, tolerance=1e-10, bn_mode="eval"):
    ours = passes(CompiledGradient(model, x, precision), x, bn_mode)
    for found, expected in zip(ours, passes(InputGradient(model, precision), x, bn_mode), strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).norm() <= tolerance * expected.norm()


def compilations(model) -> int:
    return sum(g.compilations for graphs in compiled._models[model]._graphs.values() for g in graphs.values())


@pytest.mark.parametrize("precision", ["fp64", pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_as_autograd(interpreted, precision):
    model, (x, _) = Net().eval(), batch(4)
    if precision == "fp64":
        assert_as_autograd(model.double(), x.double())
    else:
        assert_as_autograd(model, x, precision, tolerance=1e-5 if precision == "fp32" else 2**-5)


NETWORKS = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 4, "depths": (2,), "num_heads": (2,), "embed_dim": 16},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "ls_init_value": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_today(interpreted, name):
    timm = pytest.importorskip("timm", exc_type=Exception)
    model = timm.create_model(name, num_classes=10, **NETWORKS[name]).double().eval()
    for p in model.parameters():
        if p.ndim <= 1:
            nn.init.uniform_(p, 0.5, 1.5)
    assert_as_autograd(model, torch.rand(2, 3, 32, 32).double())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert_as_autograd(model, torch.rand(2, 3, 32, 32).double())
    assert compilations(model) == 2


def test_weights_are_read_at_each_attack(interpreted):
    """Those an optimiser has changed in place, others in their stead, and buffers."""
    model, x = Net().double().eval(), batch(4)[0].double()
    assert_as_autograd(model, x)
    with torch.no_grad():
        for tensor in (model.conv.weight, model.bn.running_var, model.bn.weight, model.table):
            tensor.mul_(1.5)
    assert_as_autograd(model, x)
    model.fc.weight = nn.Parameter(torch.randn(10, 144, dtype=torch.float64))
    model.bn.running_mean = torch.randn(4, dtype=torch.float64)
    assert_as_autograd(model, x)
    model.load_state_dict(Net().double().state_dict())
    assert_as_autograd(model, x)
    assert compilations(model) == 2  # with a graph of autograd's, and without


def test_global_pooling_is_a_mean(interpreted):
    """In channels_last PyTorch's own sets strides by as_strided, whose backward Inductor puts in the wrong order."""
    layers = nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(4, 5)
    model = nn.Sequential(*layers).double().eval().to(memory_format=torch.channels_last)
    x = batch(4)[0].double().contiguous(memory_format=torch.channels_last)
    assert_as_autograd(model, x)
    ops = {node.target for graph, _ in interpreted for node in graph.graph.nodes}
    assert torch.ops.aten.mean.dim in ops
    assert torch.ops.aten.as_strided.default not in ops


def test_what_depends_on_weights_alone_is_computed_once_an_attack(interpreted):
    model, (x, y) = Net().eval(), batch(4)
    attack = PGD(EPS, steps=3, precision="bf16", input_gradient="compile")
    attack(model, x, y)
    ops = [node.target for graph, _ in interpreted for node in graph.graph.nodes]
    assert torch.ops.aten.rsqrt.default in ops  # layer norm's
    assert torch.ops.aten.index.Tensor not in ops
    assert torch.ops.aten.sqrt.default not in ops  # batch norm's
    for graph, _ in interpreted:
        weights = {node for node in graph.graph.find_nodes(op="placeholder") if "primals" in node.name}
        casts = [n for n in graph.graph.nodes if n.target == torch.ops.prims.convert_element_type.default]
        images = {n for n in weights if n.meta["val"].shape == x.shape}
        assert not any(n.args[0] in weights - images for n in casts)


@pytest.mark.slow
def test_batches_of_all_sizes_share_a_graph(interpreted):
    model = Net().double().eval()
    for size in (6, 5, 4, 6, 3):
        assert_as_autograd(model, torch.rand(size, 3, 8, 8).double())
    assert compilations(model) == 4  # for 6 images, and for any number, each with a graph of autograd's and without
    assert_as_autograd(model, torch.rand(1, 3, 8, 8).double())
    assert compilations(model) == 6


class FixedBatch(Net):
    """Its code knows the number of images."""

    def forward(self, x):
        return super().forward(x) * {4: 1, 5: 2}[len(x)]


@pytest.mark.slow
def test_sizes_are_compiled_one_by_one_where_the_code_knows_them(interpreted):
    model = FixedBatch().double().eval()
    for size in (4, 5, 4, 5):
        assert_as_autograd(model, torch.rand(size, 3, 8, 8).double())
    assert compilations(model) < 8


@pytest.mark.slow
def test_few_sizes_are_compiled_one_by_one(interpreted, monkeypatch):
    monkeypatch.setattr(compiled, "SIZES", 1)
    model = FixedBatch().double().eval()
    images = {size: torch.rand(size, 3, 8, 8).double() for size in (4, 5)}
    assert_as_autograd(model, images[4])
    with pytest.warns(RuntimeWarning, match="1 numbers have been compiled") as caught:
        assert_as_autograd(model, images[5])
    assert len(caught) == 1
    assert_as_autograd(model, images[4])


@pytest.mark.slow
def test_nothing_is_compiled_twice(interpreted):
    model, (x, y) = Net(), batch(4)
    attack = PGD(EPS, steps=2, input_gradient="compile", restarts=2)
    for _ in range(2):
        attack(model, x, y)
        for p in model.parameters():
            p.requires_grad_(not p.requires_grad)
        model.eval()
    assert compilations(model) == 2
    for _ in range(2):
        APGD(EPS, steps=3, input_gradient="compile")(model, x, y)  # whose batches become smaller
    assert compilations(model) <= 4


def test_attacks_give_what_they_give_through_autograd(interpreted):
    model, x, y = Net().double().eval(), *batch(6)
    x = x.double()
    for attack in (PGD(EPS, steps=5), PGD(EPS, steps=4, norm="l2", loss="kl", restarts=2), APGD(EPS, steps=8)):
        found = []
        for attack.input_gradient in ("compile", "autograd"):
            torch.manual_seed(1)
            found.append(attack(model, x, y))
        torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bn_mode", ["eval", "train", pytest.param("keep", marks=pytest.mark.slow)])
def test_leaves_no_trace(interpreted, bn_mode):
    model, (x, y) = cnn(), batch()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[3].p = 0.0  # no random numbers: they are drawn otherwise in a compiled graph
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    model[5].register_forward_hook(lambda m, args, out: out * 1.5)
    before, structure = snapshot(model, x, y), Structure(model)
    attributes = [dict(vars(p)) for p in model.parameters()]
    found = []
    for path in ("compile", "autograd"):
        torch.manual_seed(1)
        found.append(PGD(EPS, steps=3, input_gradient=path, bn_mode=bn_mode)(model, x, y))
        assert_same(snapshot(model, x, y), before)
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    assert structure.difference(model) is None
    assert [vars(p) for p in model.parameters()] == attributes


def test_graphs_go_with_their_model(interpreted):
    model, (x, y) = Net().eval(), batch(4)
    PGD(EPS, steps=1, input_gradient="compile")(model, x, y)
    graphs = [weakref.ref(g) for graphs in compiled._models[model]._graphs.values() for g in graphs.values()]
    weights, ref = weakref.ref(model.fc.weight), weakref.ref(model)
    del model
    interpreted.clear()
    gc.collect()
    assert ref() is None
    assert weights() is None
    assert [graph() for graph in graphs] == [None]


def test_values_of_an_attack_go_with_it(interpreted):
    model, (x, _) = Net().eval(), batch(4)
    gradient = CompiledGradient(model, x, "bf16")
    passes(gradient, x)
    kept = [weakref.ref(t) for values in gradient._values.values() for each in values.values() for t in each.values()]
    assert len(kept) > 4
    del gradient
    gc.collect()
    assert not any(ref() is not None for ref in kept)


# ---- what cannot be compiled


class Broken(Net):
    """Dynamo breaks the graph: the code looks at a value."""

    def forward(self, x):
        return super().forward(x) * (2 if x.sum() > 1e9 else 1)


def broken(kind, monkeypatch):
    """A model, and what the warning says."""
    if kind == "graph break":
        return Broken().eval(), "Data-dependent"
    if kind == "function":
        model = Net().eval()
        return lambda x: model(x), "plain callable"
    if kind == "hooks":
        model = nn.DataParallel(Net()).eval()
        model.register_forward_hook(lambda *_: None)
        return model, "hooks"

    def fails(graph_module, inputs, **options):
        def run(given):
            if options.get("is_backward"):  # as where Inductor's code is wrong
                raise RuntimeError("No working C++ compiler found")
            with torch.no_grad():
                return graph_module(*given)

        if kind == "inductor" or (kind == "backward" and options.get("is_backward")):
            raise RuntimeError("No working C++ compiler found")
        run._boxed_call = True
        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", fails)
    return Net().eval(), "No working C.*Install one, such as g"


@pytest.mark.parametrize("kind", ["graph break", "function", "hooks", "inductor", "backward", "code"])
def test_failures_fall_back_to_autograd_with_a_warning(interpreted, monkeypatch, kind):
    model, message = broken(kind, monkeypatch)
    x, y = batch(4)
    attack = PGD(EPS, steps=2, input_gradient="compile", random_start=False)
    with pytest.warns(RuntimeWarning, match=f"(?s)go through autograd.*{message}.*'autograd'") as caught:
        found = attack(model, x, y)
    assert len(caught) == 1
    if kind != "function":  # which may be another one each time
        torch.testing.assert_close(attack(model, x, y), found)  # without one
        explanation = sk.explain(model, x, input_gradient="compile")
        assert explanation.path == "autograd"
    expected = PGD(EPS, steps=2, input_gradient="autograd", random_start=False)(model, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Counts(Net):
    """Its code changes what it looks at."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.slow
def test_models_that_are_compiled_again_and_again_are_given_up(interpreted, monkeypatch):
    monkeypatch.setattr(compiled, "COMPILATIONS", 2)
    model, (x, y) = Counts().eval(), batch(4)
    with pytest.warns(RuntimeWarning, match="has been compiled 2 times") as caught:
        PGD(EPS, steps=4, input_gradient="compile")(model, x, y)
    assert len(caught) == 1


def test_errors_of_the_model_are_its_own(interpreted):
    model, (x, y) = Net().eval(), batch(4, size=9)
    with pytest.raises(RuntimeError, match="[Ss]hape"):
        PGD(EPS, steps=1, input_gradient="compile")(model, x, y)
    with pytest.raises(ValueError, match="x.to"):
        PGD(EPS, steps=1, input_gradient="compile")(model, batch(4)[0].double(), y)


def test_compile_that_is_switched_off_is_no_compilation(interpreted):
    model, (x, y) = Net().eval(), batch(4)
    with torch.compiler.set_stance("force_eager"), pytest.warns(RuntimeWarning, match="switched off"):
        PGD(EPS, steps=1, input_gradient="compile")(model, x, y)


# ---- which path is taken


def test_auto_compiles_only_if_it_is_asked_to(interpreted, monkeypatch):
    model, planned, (x, y) = Net().eval(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), batch(4)
    kinds = {}
    for setting in (False, True):
        monkeypatch.setattr(sk, "compile_auto", setting)
        for name, each in {"net": Broken().eval(), "planned": planned, "function": lambda v: model(v)}.items():
            with borrowed(each, "eval"):
                kinds[setting, name] = type(input_gradient(each, x)).__name__
    assert kinds == {
        (False, "net"): "InputGradient", (False, "planned"): "PlannedGradient", (False, "function"): "InputGradient",
        (True, "net"): "CompiledGradient", (True, "planned"): "PlannedGradient", (True, "function"): "InputGradient",
    }  # fmt: skip
    monkeypatch.setattr(sk, "compile_auto", "yes")
    with pytest.raises(TypeError, match="spat_kernels.compile_auto must be True or False"):
        PGD(EPS)(Broken().eval(), x, y)


def test_explain(interpreted, monkeypatch):
    model, (x, _) = Net().eval(), batch(4)
    explanation = sk.explain(model, x, input_gradient="compile", precision="bf16")
    assert (explanation.path, explanation.dtype) == ("compile", torch.bfloat16)
    assert str(explanation) == "compile, because input_gradient='compile' asks for it"
    assert compilations(model) == 1
    monkeypatch.setattr(sk, "compile_auto", True)
    odd = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(144, 4)).eval()
    auto = sk.explain(odd, x, precision="bf16")
    assert auto.path in ("plan", "compile")
    assert "asks for it" not in auto.reason


def test_the_users_own_compilation_is_left_alone(interpreted):
    """Dynamo's settings, and what it has compiled."""
    model, (x, y) = Net().eval(), batch(4)
    count = CompileCounter()
    theirs = torch.compile(model, backend=count)
    configs = torch._dynamo.config, torch._inductor.config, torch._functorch.config
    settings = [config.get_config_copy() for config in configs]
    expected = theirs(x).detach()
    PGD(EPS, steps=1, input_gradient="compile")(theirs, x, y)
    torch.testing.assert_close(theirs(x), expected)
    assert count.frame_count == 1
    assert [config.get_config_copy() for config in configs] == settings


@pytest.mark.slow
def test_threads(interpreted):
    """On one model one after another, on others at once."""
    models, (x, y) = [Net().double().eval() for _ in range(2)], batch(4)
    x, attack = x.double(), PGD(EPS, steps=3, random_start=False, input_gradient="compile")
    expected = [PGD(EPS, steps=3, random_start=False, input_gradient="autograd")(model, x, y) for model in models]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: attack(models[i % 2], x, y), range(8)))
    for i, images in enumerate(found):
        torch.testing.assert_close(images, expected[i % 2], rtol=0, atol=1e-9)
    assert [compilations(model) for model in models] == [1, 1]


@pytest.mark.skipif(torch.__version__ >= "2.12", reason="compiled code does not run below FakeGraph's dispatch mode there")
def test_in_a_capture(interpreted, monkeypatch):
    """Compiled before it, in the attack that is run as it is; a replay reads the weights that there are."""
    monkeypatch.setattr(attacks, "graphs", graphs := Graphs(graph=FakeGraph))
    model, (x, y) = Net().double().eval(), batch(4)
    x = x.double()
    settings = {"steps": 2, "input_gradient": "compile"}
    for i in range(3):
        found = []
        for graph in (True, False):
            torch.manual_seed(i)
            found.append(PGD(EPS, graph=graph, **settings)(model, x, y))
        torch.testing.assert_close(*found, rtol=0, atol=1e-9)
        with torch.no_grad():
            model.conv.weight.mul_(1.1)
            model.bn.running_var.mul_(1.2)
    assert len(graphs) == 1
    assert compilations(model) == 1


def test_a_capture_compiles_nothing_again(interpreted):
    """A capture switches autocast's cache off, which Dynamo looks at (below FakeGraph's dispatch mode it looks at nothing)."""
    model, x = Net().eval(), torch.rand(2, 3, 8, 8)
    gradient = CompiledGradient(model, x)
    for context in (nullcontext, undisturbed, nullcontext):
        caching = torch.is_autocast_cache_enabled()
        with context():
            gradient.forward(x)
            gradient.logits(x)
        assert torch.is_autocast_cache_enabled() == caching
    assert compilations(model) == 2


def test_wrong_gradients_of_pooling_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 0, True), nn.Flatten(), nn.Linear(36, 5)).eval()
    x = torch.rand(2, 3, 8, 8)
    with pytest.warns(RuntimeWarning, match="Inductor's gradient of avg_pool2d is wrong"):
        assert_as_autograd(model, x, "fp32", 1e-6)


# ---- with Inductor's kernels


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2**-5)])
def test_kernels(precision, tolerance):
    model = Net().eval()
    for size in (6, 5, 3):
        assert_as_autograd(model, torch.rand(size, 3, 8, 8), precision, tolerance)
    with torch.no_grad():
        model.table.mul_(1.5)
    assert_as_autograd(model, torch.rand(6, 3, 8, 8), precision, tolerance)
    assert compilations(model) == 4
    attack, (x, y) = PGD(EPS, steps=3, random_start=False, input_gradient="compile", precision=precision), batch(6)
    assert torch.equal(attack(model, x, y), attack(model, x, y))


@pytest.mark.slow
@pytest.mark.gpu
def test_in_a_cuda_graph():
    model, (x, y) = Net().eval().cuda(), (t.cuda() for t in batch(8))
    found = []
    for graph in (True, True, False):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found.append(PGD(EPS, steps=5, graph=graph, input_gradient="compile")(model, x, y))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-6)
