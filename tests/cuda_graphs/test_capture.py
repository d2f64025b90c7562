"""Captured attacks: the same images as without a graph, and never those of another model than the one at hand."""

import gc
import random
import re
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import spat_kernels as sk
from spat_kernels import PGD, checks, cuda_graph, losses
from spat_kernels.attacks import pgd as attacks
from spat_kernels.cuda_graph import CudaGraph
from spat_kernels.cuda_graphs.cache import Graphs
from spat_kernels.input_gradient.nodes import CannotPlan
from spat_kernels.input_gradient.trace import _NoLooking
from tests.cuda_graphs.fake_graph import FakeGraph, captured_and_eager
from tests.helpers import EPS, Around, Recorder, assert_same, batch, cnn, snapshot
from tests.input_gradient import models as networks
from tests.input_gradient.test_tokens import network


def square(z, y):
    return z.square().sum(1) - z.gather(1, y[:, None])[:, 0]


SETTINGS = {
    "plain": {},
    "l2": {"norm": "l2"},
    "l1": {"norm": "l1"},
    "smoothed": {"loss": losses.LabelSmoothedCE(0.3)},
    "kl": {"loss": "kl"},
    "kl_l2": {"loss": "kl", "norm": "l2"},
    "margin": {"loss": "margin"},
    "dlr": {"loss": "dlr"},
    "pma": {"loss": "pma"},
    "pma_targeted": {"loss": "pma", "targeted": True},
    "dlr_targeted": {"loss": "dlr", "targeted": True},
    "mmc": {"loss": "mmc"},
    "custom": {"loss": square},
    "targeted": {"targeted": True},
    "restarts": {"restarts": 3, "steps": 2},
    "restarts_by_loss": {"restarts": 3, "steps": 2, "select": "loss", "norm": "l2"},
    "restarts_kl": {"restarts": 2, "steps": 2, "loss": "kl"},
    "from_x": {"random_start": False},
    "from_x_l2": {"random_start": False, "norm": "l2"},
    "from_x_l1": {"random_start": False, "norm": "l1"},
    "no_steps": {"steps": 0},
    "train_mode": {"bn_mode": "train"},
    "as_it_is": {"bn_mode": "keep"},
    "other_bounds": {"bounds": (-0.5, 1.5)},
    "alone": {"fuse": False},
    "fused": {"fuse": True},
}


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    """The cache that attacks use, with captures that work on the CPU."""
    graphs = Graphs(graph=FakeGraph)
    monkeypatch.setattr(attacks, "graphs", graphs)
    return graphs


@pytest.fixture
def real(monkeypatch) -> Graphs:
    """CUDA's graphs, and the same algorithms of cuDNN with and without."""
    graphs = Graphs()
    monkeypatch.setattr(attacks, "graphs", graphs)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return graphs


@pytest.fixture
def each_graphs(device, request) -> Graphs:
    """`graphs` on the CPU, and `real` on a GPU."""
    return request.getfixturevalue("real" if device == "cuda" else "graphs")


def on_gpu(*tensors):
    return [t.cuda() for t in tensors]


def pairs(model, attack: dict, n: int = 4, dtype=torch.float32, seeds=(1, 2, 3), eps=lambda i: EPS * (1 + i)):
    """For batches of their own and radii of their own: images with graph=True and False, from the same seed."""
    device = next(model.parameters()).device
    for i, seed in enumerate(seeds):
        x, y = batch(n)
        yield captured_and_eager(PGD, eps(i), model, x.to(device, dtype), y.to(device), seed, **attack)


@pytest.mark.parametrize("name", SETTINGS)
def test_replays_equal_the_attack_itself(each_graphs, device, name):
    if device == "cuda" and name == "train_mode":
        pytest.skip("see test_gpu_dropout_is_fresh_and_follows_the_seed")
    model = cnn().to(device)
    (model if device == "cuda" else model[1]).eval()
    for got, expected in pairs(model, SETTINGS[name]):
        assert torch.equal(got, expected)
    assert len(each_graphs) == 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(graphs, norm, dtype):
    model = cnn().to(dtype)
    for got, expected in pairs(model, {"norm": norm, "steps": 3}, dtype=dtype):
        assert torch.equal(got, expected)
        assert got.dtype == dtype
    assert len(graphs) == 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_radius_and_step_per_sample_and_start(graphs, norm):
    model, attack = cnn(), {"norm": norm, "steps": 3}
    for got, expected in pairs(model, attack, eps=lambda i: torch.tensor([0.0, 0.01, 0.02, 0.04]) * (i + 1)):
        assert torch.equal(got, expected)
    for got, expected in pairs(model, attack | {"step_size": torch.tensor([0.01, 0.0, 0.02, 0.1])}):
        assert torch.equal(got, expected)
    for i in range(3):
        x, y = batch(4)
        start = x.double() + 0.01 * i
        for steps in (0, 3):
            got, expected = (
                PGD(torch.tensor(EPS), graph=graph, norm=norm, steps=steps)(model, x, y, start=start) for graph in (True, False)
            )
            assert torch.equal(got, expected)
    assert len(graphs) == 4


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode(graphs, context):
    model, (x, y) = cnn(), batch()
    for mode in (context, torch.enable_grad, context):
        with mode():
            got, expected = (PGD(EPS, random_start=False, graph=graph)(model, x + 0, y + 0) for graph in (True, False))
        assert torch.equal(got, expected)
        assert not got.is_inference()
    assert len(graphs) == 1


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_noise_is_fresh_and_follows_a_generator(graphs, norm):
    model, (x, y), images = cnn(), batch(), []
    for graph in (True, True, False):
        attack = PGD(EPS, steps=1, norm=norm, generator=torch.Generator().manual_seed(5), graph=graph)
        images.append(torch.stack([attack(model, x, y) for _ in range(3)]))
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[2])
    assert not torch.equal(*images[1][1:])
    assert len(graphs) == 1


def test_the_caller_is_left_alone(graphs):
    for attack in ({}, {"restarts": 2, "norm": "l2"}, {"bn_mode": "train"}, {"bn_mode": "keep", "loss": "kl"}):
        model, (x, y) = cnn(), batch()
        model[1].eval()
        x.requires_grad_()
        before = snapshot(model, x, y)
        results = [PGD(EPS, graph=True, **attack)(model, x, y) for _ in range(3)]
        assert_same(before, snapshot(model, x, y))
        kept = [r.clone() for r in results]
        PGD(EPS, graph=True, **attack)(model, x * 0.5, y)
        assert all(map(torch.equal, results, kept)), "results do not share memory with later ones"


# --- what the model may and may not do meanwhile ---


@pytest.mark.parametrize("precision", [None, "autocast", "bf16", "fp16"])
def test_updates_in_place_are_seen(each_graphs, device, precision):
    """A training loop: SGD and batch statistics change the weights, which half precision casts in the graph."""
    model = cnn().to(device)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"precision": precision, "input_gradient": "autograd"} if precision in ("bf16", "fp16") else {}
    for seed in range(5):
        x, y = (t.to(device) for t in batch(16))
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            images = captured_and_eager(PGD, EPS, model, x, y, seed, "auto", loss=losses.LabelSmoothedCE(0.1), **settings)
            assert torch.equal(*images)
            assert torch.is_autocast_cache_enabled()
            loss = F.cross_entropy(model(images[0]), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert len(each_graphs) == 1


def test_nothing_looks_at_values_where_a_launched_attack_is_replayed(graphs):
    model, (x, y), attack = cnn().eval(), batch(), PGD(EPS, graph=True)
    attack(model, x, y)
    torch.manual_seed(1)
    expected = attack(model, x, y)
    torch.manual_seed(1)
    with _NoLooking():
        with pytest.raises(CannotPlan, match="looks at the values"):
            attack(model, x, y)
        x_adv, nan_seen = attack.launch(model, x, y)
    assert torch.equal(x_adv, expected)
    assert not nan_seen.any()
    assert len(graphs) == 1


def test_a_replay_is_launched_before_values_are_looked_at(graphs, monkeypatch):
    """As on a GPU, where that waits for it."""
    model, (x, y), attack, events = cnn().eval(), batch(), PGD(EPS, graph=True), []
    attack(model, x, y)
    read, replay = checks.Values.read, FakeGraph.replay
    monkeypatch.setattr(PGD, "_may_check_late", lambda self, model, x: True)
    monkeypatch.setattr(FakeGraph, "replay", lambda self: (replay(self), events.append("replayed")))
    monkeypatch.setattr(checks.Values, "read", lambda self, *counts: (events.append("read"), read(self, *counts))[1])
    attack(model, x, y)
    assert events == ["replayed", "read"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale, self.powers, self.offset, self.act = cnn().eval(), 1.0, [1, 2], torch.zeros(()), F.relu

    def forward(self, x):
        return self.act(self.net(x) * self.scale + self.offset).pow(self.powers[1])


CHANGES = {
    "moved weight": lambda m: setattr(m.net[0].weight, "data", torch.randn_like(m.net[0].weight)),
    "flipped weight": lambda m: setattr(m.net[-1].weight, "data", m.net[-1].weight.data.flip(0)),
    "parameter": lambda m: setattr(m.net[-1], "bias", nn.Parameter(torch.randn(10, device=m.offset.device))),
    "load by assignment": lambda m: m.net.load_state_dict({k: v + 0.1 for k, v in m.net.state_dict().items()}, assign=True),
    "buffer": lambda m: setattr(m.net[1], "running_mean", torch.ones(8, device=m.offset.device)),
    "module": lambda m: m.net.__setitem__(5, nn.Tanh()),
    "number": lambda m: setattr(m, "scale", -3.0),
    "in a list": lambda m: m.powers.__setitem__(1, 3),
    "tensor": lambda m: setattr(m, "offset", torch.ones_like(m.offset) * 5),
    "function": lambda m: setattr(m, "act", torch.sigmoid),
    "class": lambda m: setattr(m.net[2], "__class__", nn.Sigmoid),
    "eps of batch norm": lambda m: setattr(m.net[1], "eps", 10.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(each_graphs, device, change):
    model, (x, y) = Scaled().to(device), (t.to(device) for t in batch())
    model.offset = model.offset.to(device)
    attack = PGD(EPS, random_start=False, graph=True)
    before = [attack(model, x, y) for _ in range(2)][1]
    CHANGES[change](model)
    expected = PGD(EPS, random_start=False, graph=False)(model, x, y)
    assert not torch.equal(before, expected), "a change that matters"
    for _ in range(2):
        assert torch.equal(attack(model, x, y), expected)
    assert len(each_graphs) == 1


def test_mode_counts_where_it_is_kept(graphs):
    model, (x, y) = cnn(), batch()
    model[3].p = 0.0
    for training in (True, False, True):
        model.train(training)
        for bn_mode in ("keep", "eval", "keep", "eval"):
            got, expected = (PGD(EPS, random_start=False, bn_mode=bn_mode, graph=g)(model, x, y) for g in (True, False))
            assert torch.equal(got, expected)
    assert len(graphs) == 2


def test_auto_recaptures_on_the_second_attack_after_a_change(graphs):
    model, (x, y) = Recorder(cnn()), batch()
    model.inputs = Forgetful()
    attack = PGD(EPS, random_start=False, input_gradient="autograd")
    forwards = []
    for i in range(9):
        if i in (4, 7):
            model.model[1].eps += 0.1
        attack(model, x, y)
        forwards.append(model.inputs.count)
        model.inputs.count = 0
    # itself; itself and capture; replays | the same again after a change
    assert forwards == [10, 20, 0, 0, 10, 20, 0, 10, 20]


class Forgetful:
    """Counts what is appended; an object whose inside a capture does not look into."""

    count = 0

    def append(self, _):
        self.count += 1


# --- policy ---


def test_true_names_what_is_missing():
    model, (x, y) = cnn(), batch()
    with pytest.raises(ValueError, match="graph=True, but x is on cpu.*graph='auto'"):
        sk.pgd_ls(model, x, y, EPS, 0.1, graph=True)
    with pytest.raises(ValueError, match="graph='always': choose one of"):
        PGD(EPS, graph="always")


def test_plain_callables_cannot_be_checked(graphs):
    model, (x, y) = cnn().eval(), batch()
    with pytest.raises(ValueError, match="model is a plain function.*nn.Module"):
        sk.pgd(lambda x: model(x), x, y, EPS, graph=True)
    own_loss = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            sk.pgd(lambda x: model(x), x, y, EPS)
            sk.pgd(model, x, y, EPS, loss=own_loss)
            sk.pgd(model, x, y, EPS, graph=False)
    assert len(graphs) == 0
    calls = Counted()
    counts = []
    with calls:
        for _ in range(3):
            sk.pgd(model, x, y, EPS)
            counts.append(calls.count)
    assert len(graphs) == 0
    assert counts[2] - counts[1] == counts[0], "replays would be invisible to a dispatch mode"


class Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Weighted(losses.Loss):
    def __init__(self, weight):
        self.weight = weight

    def gradient(self, logits, reference, dlogits, value, *, targeted, scale):
        dlogits.copy_(self.weight * logits)

    def changed(self, weight):
        self.weight = weight
        return self

    def method(self, z, y):
        return self.weight * square(z, y)


OWN_LOSSES = {
    "closure": lambda weight: lambda z, y: weight * square(z, y),
    "default": lambda weight: lambda z, y, weight=weight: weight * square(z, y),
    "object": Weighted,
    "same object": Weighted(1.0).changed,
}


@pytest.mark.parametrize("kind", OWN_LOSSES)
def test_losses_of_the_callers_go_by_what_they_are_made_of(graphs, kind):
    model, (x, y) = cnn(), batch()
    weights = (1.0, 1.0, -1.0, 1.0)
    images = [sk.pgd(model, x, y, EPS, loss=OWN_LOSSES[kind](w), random_start=False, graph=True) for w in weights]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[3])
    assert not torch.equal(images[0], images[2])
    assert len(graphs) == 2


def test_objects_and_tensors_that_losses_read_go_by_identity(graphs):
    model, (x, y), loss = cnn(), batch(), Weighted(1.0)
    for function in (loss.method, loss.method, Weighted(1.0).method):
        sk.pgd(model, x, y, EPS, loss=function, graph=True)
    assert len(graphs) == 2
    for _ in range(2):
        anchor = torch.ones(1)
        sk.pgd(model, x, y, EPS, loss=lambda z, y, anchor=anchor: square(z, y) + anchor, graph=True)
    assert len(graphs) == 4


def test_every_setting_tells_captures_apart(graphs):
    graphs.capacity = 100
    model, (x, y) = cnn(), batch(4)
    calls = [
        *((PGD(EPS, graph=True, **settings), {}) for settings in SETTINGS.values()),
        (PGD(torch.full((4,), EPS), graph=True), {}),
        (PGD(EPS, step_size=torch.full((4,), EPS), graph=True), {}),
        (PGD(EPS, loss=losses.LabelSmoothedCE(0.31), graph=True), {}),
        (PGD(EPS, loss="kl", graph=True), {"y": None}),
        (PGD(EPS, graph=True), {"start": x}),
        (PGD(EPS, graph=True), {"x": x[:1], "y": y[:1]}),
        (PGD(EPS, graph=True), {"x": x.to(memory_format=torch.channels_last)}),
    ]
    for n, (attack, given) in enumerate(calls, 1):
        for _ in range(2):
            attack(model, **({"x": x, "y": y} | given))
        assert len(graphs) == n, n
    with torch.autocast("cpu", torch.bfloat16):
        PGD(EPS, graph=True)(model, x, y)
    torch.use_deterministic_algorithms(True)
    try:
        PGD(EPS, graph=True)(model, x, y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(graphs) == len(calls) + 2


def test_labels_are_checked_in_replays_too(graphs):
    model, (x, y) = cnn(), batch()
    for _ in range(2):
        sk.pgd(model, x, y, EPS, graph=True)
    with pytest.raises(ValueError, match=r"y holds class 12, outside \[0, 10\)"):
        sk.pgd(model, x, y.clone().fill_(12), EPS, graph=True)


def test_nan_gradients_are_counted_in_replays(graphs):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * torch.where(x[:, 0, 0, 0] > 0.9, torch.nan, 1.0)[:, None]

    model, (x, y) = Broken(), (torch.rand(5, 3, 4, 4) * 0.8, torch.tensor([0, 1, 2, 0, 1]))
    for bad in ([1, 4], [2], []):
        images = x.clone()
        images[bad, 0, 0, 0] = 0.95
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x_adv = sk.pgd(model, images, y, 0.02, random_start=False, graph=True)
        assert [f"NaN for {len(bad)} of 5 samples" in str(w.message) for w in caught] == [True] * bool(bad)
        assert torch.equal(x_adv[bad], images[bad])


# --- padding ---


@pytest.mark.parametrize("attack", [{}, {"norm": "l2"}, {"restarts": 2, "loss": "kl"}, {"norm": "l2", "restarts": 2}], ids=str)
def test_short_batches_are_padded_where_samples_are_independent(graphs, attack):
    model = cnn().double()
    for independent, captures in ((False, 3), (True, 2)):
        graphs.free()
        attack = attack | {"input_gradient": "plan" if independent else "autograd"}
        for n in (8, 8, 5, 4, 5) if independent else (8, 8, 5, 4):
            for got, expected in pairs(model, attack | {"steps": 3}, n=n, dtype=torch.float64, seeds=(3,)):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        for got, expected in pairs(model, attack, n=3, dtype=torch.float64, seeds=(1,)):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
        assert len(graphs) == captures + (not independent), "8, and 3, which is less than half"
    graphs.free()
    for n in (8, 5):
        sk.pgd(model, *(t.double() if t.is_floating_point() else t for t in batch(n)), EPS, loss=square, graph=True)
    assert len(graphs) == 2, "a loss of the caller's may couple samples"


def test_padded_radii_and_layouts(graphs):
    model = cnn().double()
    eps = torch.linspace(0, 0.1, 8)
    for n in (8, 5, 8, 6):
        x, y = batch(n)
        x = x.double().to(memory_format=torch.channels_last)
        images = captured_and_eager(PGD, eps[:n], model, x, y, n)
        torch.testing.assert_close(*images, rtol=0, atol=1e-14)
        assert images[0].shape == x.shape
        assert images[0].stride() == x.stride()
    assert len(graphs) == 1


# --- what cannot be captured ---


class Waits(Around):
    """Decides on the host by what is in the images."""

    def forward(self, x):
        return self.net(x) if x.mean() > 0.5 else -self.net(x)


class Draws(Around):
    """Chooses by random numbers of the host."""

    def __init__(self, net, draw):
        super().__init__(net)
        self.draw = draw

    def forward(self, x):
        return self.net(x) if self.draw() < 0.5 else -self.net(x)


class Counts(Around):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.net(x)


class Remembers(Weighted):
    def reference(self, y, clean_logits, targeted):
        self.calls = getattr(self, "calls", 0) + 1
        return y


def hooked():
    model = cnn()
    model[2].register_forward_hook(lambda *_: None)
    return model


def elsewhere():
    model = Counts(cnn())
    model.unused = torch.zeros((), device="meta")
    return model


REFUSED = {
    "waits": (lambda: Waits(cnn()), {}, "operation not permitted when stream is capturing"),
    "hooks": (hooked, {}, "Sequential.2 has hooks, which would not run in a replay"),
    "tensors elsewhere": (elsewhere, {}, "it has tensors on meta and x is on cpu"),
    "random": (lambda: Draws(cnn(), random.random), {}, "drawn on the host"),
    "numpy": (lambda: Draws(cnn(), np.random.rand), {}, "drawn on the host"),
    "changing model": (lambda: Counts(cnn()), {}, "the model changes as it runs .*an attribute changed"),
    "changing loss": (cnn, {"loss": Remembers(1.0)}, "the loss changes its attributes as it runs"),
}


@pytest.mark.parametrize("graph", [True, "auto"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_runs_without(graphs, name, graph):
    make, settings, reason = REFUSED[name]
    model, (x, y), images = make(), batch(), []
    before = snapshot(model, x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for choice in (graph, False):
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(1)
            bright = (0.9, 0.9, 0.1, 0.9, 0.1)
            images.append([sk.pgd(model, x * 0.1 + b * 0.9, y, EPS, graph=choice, **settings) for b in bright])
        PGD(EPS, steps=3, graph=True, **settings)(model, x, y)
    assert all(map(torch.equal, *images))
    assert_same(before, snapshot(model, x, y))
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert re.search(f"attacks on this {type(model).__name__} run without a CUDA graph.*{reason}", str(warning.message))
    assert warning.filename == __file__
    assert len(graphs) == 0
    assert not torch.is_inference_mode_enabled()
    assert gc.isenabled()


def test_failed_captures_keep_nothing_alive(graphs):
    model, (x, y) = Waits(cnn()), batch()
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        sk.pgd(model, x, y, EPS, graph=True)
    part = weakref.ref(model.net[0])
    gc.disable()
    try:
        del model
        assert part() is None
    finally:
        gc.enable()


def test_refused_captures_are_not_tried_again(graphs, monkeypatch):
    tries = []
    monkeypatch.setattr(FakeGraph, "capture", lambda self, function: tries.append(1) or 1 / 0)
    model, (x, y) = cnn(), batch()
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError: division by zero"):
        sk.pgd(model, x, y, EPS, graph=True)
    for _ in range(3):
        sk.pgd(model, x, y, EPS, graph=True)
    assert len(tries) == 1
    graphs.free(model)
    with pytest.warns(RuntimeWarning, match="division"):
        sk.pgd(model, x, y, EPS, graph=True)
    assert len(tries) == 2


def test_models_that_finish_themselves_on_first_use_are_captured(graphs):
    class Lazy(Around):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.full_like(x[:1].detach(), 0.01)
            return self.net(x + self.table)

    for graph in (True, "auto"):
        graphs.free()
        model = Lazy(cnn())
        for seed in range(4):
            x, y = batch()
            assert torch.equal(*captured_and_eager(PGD, EPS, model, x, y, seed, graph))
        assert len(graphs) == 1


@pytest.mark.parametrize("graph", [True, "auto"])
def test_errors_of_the_model_are_raised_and_leave_it_as_it_was(graphs, graph):
    class Fails(Recorder):
        def forward(self, x):
            if fails:
                raise KeyError("in the middle")
            return self.model(x)

    model, (x, y), fails = Fails(cnn()), batch(), False
    attack = {"eps": EPS, "graph": graph, "input_gradient": "autograd"}  # which runs the model's own code
    if graph == "auto":
        sk.pgd(model, x, y, **attack)
    before, fails = snapshot(model, x, y), True
    for _ in range(2):
        with pytest.raises(KeyError, match="in the middle"):
            sk.pgd(model, x, y, **attack)
        assert_same(before, snapshot(model, x, y))
    fails = False
    for got, expected in pairs(model, {}):
        assert torch.equal(got, expected)
    assert torch.is_grad_enabled()


# --- memory ---


def test_least_recently_used_captures_go_first(graphs):
    graphs.capacity = 2
    model, (x, y) = Recorder(cnn()), batch()
    model.inputs = Forgetful()

    def forwards(steps):
        model.inputs.count = 0
        PGD(EPS, steps=steps, graph=True, input_gradient="autograd")(model, x, y)
        return model.inputs.count

    assert [forwards(1), forwards(2), forwards(1), forwards(3)] == [2, 4, 0, 6]
    assert [forwards(1), forwards(2), len(graphs)] == [0, 4, 2]
    graphs.capacity = 1
    assert len(graphs) == 1
    assert forwards(2) == 0
    graphs.free(model)
    assert len(graphs) == 0
    assert forwards(2) == 4
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        graphs.capacity = 0


def test_attacks_seen_once_are_forgotten(graphs):
    model, (x, y) = cnn(), batch(2)
    for steps in range(150):
        PGD(EPS, steps=0, step_size=1.0, bounds=(0.0, 1.0 + steps))(model, x, y)
    assert len(graphs._entries()) <= 128


@pytest.mark.parametrize(
    "attack",
    [lambda _: {}, lambda _: {"loss": "kl"}, lambda _: {"restarts": 2}, lambda m: {"loss": lambda z, y, model=m: square(z, y)}],
    ids=["ce", "kl", "restarts", "loss that knows the model"],
)
def test_models_are_not_kept_alive(graphs, attack):
    models = [cnn() for _ in range(3)]
    for model in models:
        for got, expected in pairs(model, attack(model)):
            assert torch.equal(got, expected)
    assert len(graphs) == 3
    parts = [weakref.ref(part) for part in (*models[0].modules(), *models[0].parameters())]
    del model
    models.pop(0)
    assert not any(part() is not None for part in parts), "without a cycle to collect"
    assert len(graphs) == 2
    assert len(graphs._models) == 2


def test_threads(graphs):
    """Two models, two threads, one cache: nobody gets another's images."""
    models, (x, y) = [cnn(), cnn()], batch()
    attack = PGD(EPS, random_start=False, steps=2)
    expected = [[PGD(EPS, random_start=False, steps=2, graph=False)(m, v, y) for v in (x, x * 0.5)] for m in models]

    def hammer(_):
        for i in range(20):
            for m, images in zip(models, expected, strict=True):
                assert torch.equal(attack(m, (x, x * 0.5)[i % 2], y), images[i % 2])

    # The modes of a model are set while it is attacked, so threads share one only once it is captured.
    for m in models:
        attack(m, x, y), attack(m, x, y)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(hammer, range(3)))
    assert len(graphs) == 2


# --- the real class, with CUDA's part of it played ---


class PlayedGenerator:
    """torch.Generator on CUDA: a handle on a state, which a capture registers and a failed one leaves in capture mode."""

    def __init__(self, state):
        self.state = state

    def graphsafe_get_state(self):
        return PlayedGenerator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def clone_state(self):
        return PlayedGenerator(dict(self.state))

    def get_state(self):
        return dict(self.state)

    def set_state(self, state):
        self.state.update(state)

    def get_offset(self):
        return self.state["offset"]

    def set_offset(self, offset):
        self.state["offset"] = offset


@pytest.fixture
def played(monkeypatch):
    """torch.cuda as far as CudaGraph uses it: what it calls, in order, and the default generator."""
    calls, default = [], PlayedGenerator({"seed": 7, "offset": 4, "capturing": False})

    class Stream:
        device_index = device = 0

        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            calls.append("its stream waits" if other is caller else "the caller waits")

    class Graph:
        def replay(self):
            self.state["offset"] += self.drawn

    @contextmanager
    def capturing(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert pool == "pool"
        graph.state, before = default.state, default.state["offset"]
        graph.state["capturing"] = True
        try:
            yield
        except BaseException:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        graph.state["capturing"], graph.drawn, graph.state["offset"] = False, graph.state["offset"] - before, before

    caller = Stream()
    for name, value in {
        "Stream": Stream, "CUDAGraph": Graph, "graph": capturing, "graph_pool_handle": lambda: "pool",
        "default_generators": (default,), "current_stream": lambda device: caller, "stream": lambda stream: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *args, name=name: calls.append((name, *args)), raising=False)  # on CPU builds
    return calls, default


def test_captures_draw_like_the_attack_itself(played):
    calls, default = played
    graph, state = CudaGraph(torch.device("cpu")), default.state
    with graph.here():
        graph.capture(lambda: default.set_offset(default.get_offset() + 8))
        assert default.state is state
        assert state == {"seed": 7, "offset": 4, "capturing": False}, "nothing drawn by a capture"
        graph.replay()
        assert default.state is state
        assert default.get_offset() == 12
        default.state.update(seed=9, offset=0)  # torch.manual_seed
        graph.replay()
    assert graph._random.state == default.state == {"seed": 9, "offset": 8, "capturing": False}
    clear = ("_cuda_clearCublasWorkspaces",)
    assert calls == ["its stream waits", clear, clear, "the caller waits"]


def test_failed_captures_raise_the_cause_and_clean_up(played, monkeypatch):
    calls, default = played
    undead = []
    monkeypatch.setattr(cuda_graph, "_undead", undead)
    graph, state = CudaGraph(torch.device("cpu")), default.state

    def fails():
        default.set_offset(16)
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"), graph.here():
        graph.capture(fails)
    assert default.state is state
    assert state == {"seed": 7, "offset": 4, "capturing": False}
    assert ("_cuda_endAllocateToPool", 0, "pool") in calls
    assert ("_cuda_releasePool", 0, "pool") in calls
    assert len(undead) == 1, "torch still points to it"
    assert calls[-1] == "the caller waits"


# --- on a GPU ---


@pytest.mark.gpu
def test_gpu_dropout_is_fresh_and_follows_the_seed(real):
    model, (x, y) = cnn().cuda(), on_gpu(*batch(8))
    attack = PGD(EPS, bn_mode="train", graph=True)
    attack(model, x, y)

    def two():
        torch.manual_seed(3)
        return [attack(model, x, y) for _ in range(2)], torch.cuda.get_rng_state()

    (first, state), (again, state_again) = two(), two()
    assert all(map(torch.equal, first, again))
    assert torch.equal(state, state_again)
    assert not torch.equal(*first)
    torch.manual_seed(3)
    eager = PGD(EPS, bn_mode="train", graph=False)
    assert torch.equal(eager(model, x, y), first[0])
    eager(model, x, y)
    assert torch.equal(torch.cuda.get_rng_state(), state), "as many numbers are drawn"


@pytest.mark.gpu
def test_gpu_streams(real):
    model, attack = cnn().eval().cuda(), PGD(EPS, random_start=False, graph=True)
    batches = [on_gpu(*batch(64)) for _ in range(6)]
    expected = [PGD(EPS, random_start=False, graph=False)(model, x, y) for x, y in batches]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    got = []
    for i, (x, y) in enumerate(batches):
        with torch.cuda.stream(streams[i % 3]):
            got.append(attack(model, x * 1, y))
    torch.cuda.synchronize()
    assert all(map(torch.equal, got, expected))
    assert len(real) == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_gpu_second_device(real):
    for got, expected in pairs(cnn().eval().to("cuda:1"), {}):
        assert torch.equal(got, expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_gpu_failed_captures_leave_cuda_and_random_numbers_usable(real):
    class Waits(Around):
        def forward(self, x):
            x = F.dropout(x, 0.1)
            return self.net(x) if x.mean().item() > -1 else self.net(-x)

    model, (x, y) = Waits(cnn()).cuda(), on_gpu(*batch())
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="run without a CUDA graph"):
        first = sk.pgd(model, x, y, EPS, graph=True)
    after = torch.rand(4, device="cuda")
    torch.manual_seed(1)
    assert torch.equal(sk.pgd(model, x, y, EPS, graph=False), first)
    assert torch.equal(torch.rand(4, device="cuda"), after)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert all(torch.equal(*images) for images in pairs(cnn().eval().cuda(), {}))  # another capture
    t = torch.rand(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    t.record_stream(side)  # deferred for ever while the allocator believes in a capture
    del t
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.mark.gpu
def test_gpu_models_in_turn_whose_memory_is_freed_with_them(real):
    def attack(model):
        x, y = on_gpu(*batch(64, size=32))
        assert torch.equal(*captured_and_eager(PGD, EPS, model, x, y))

    def captured():
        model = cnn(size=32).eval().cuda()
        for _ in range(2):
            attack(model)
        return model

    def used():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    captured()
    before = used()
    models = [captured() for _ in range(3)]
    for _ in range(2):
        list(map(attack, models))
    assert len(real) == 3
    assert used() > before
    models.clear()
    gc.collect()
    assert len(real) == 0
    assert used() <= before
    model = captured()
    assert used() > before
    real.free(model)
    del model
    assert used() <= before


@pytest.mark.gpu
def test_gpu_replays_launch_one_graph_and_wait_once_if_at_all(real):
    model, (x, y), attack = cnn().eval().cuda(), on_gpu(*batch()), PGD(EPS, graph=True)
    attack(model, x, y), attack.launch(model, x, y)
    try:
        torch.cuda.set_sync_debug_mode("error")
        attack.launch(model, x, y)
        with pytest.raises(RuntimeError, match="synchronizing"):
            attack(model, x, y)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            attack(model, x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        attack(model, x, y)
    assert [e.name for e in profile.events()].count("cudaGraphLaunch") == 1


@pytest.mark.parametrize(("name", "precision"), [("convnext", "fp32"), ("vit", "bf16"), ("swin", "fp32")])
def test_plans_of_tokens_are_captured_and_follow_the_weights(graphs, name, precision):
    """No step looks at a value; class tokens, position biases and folded layer scales are made of the weights in each replay."""
    model, size = network(name, torch.float32)
    x, y = networks.images(2, size, torch.float32), torch.tensor([0, 1])
    assert sk.explain(model, x).path == "plan"
    for scale in (1, 1.2):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        assert torch.equal(*captured_and_eager(PGD, EPS, model, x, y, steps=2, precision=precision))
